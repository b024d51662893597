"""What a classifier is fitted on or tested on: samples, each with a way to its image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from mi2rage_engines.errors import DataError
from mi2rage_rt.image_folder import find_image
from mi2rage_rt.images import decode_image, load_image
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample, read_samples
from mi2rage_training.store import Candidate, is_store, read_store

__all__ = ["Modality", "Pair", "load_pairs", "pairs_from_candidates"]


class Modality(StrEnum):
    """What the classifier is shown."""

    BOTH = "both"
    TEXT = "text"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A sample and where its image is: encoded bytes, a file, or nowhere."""

    sample: Sample
    image: bytes | Path | None = None

    def load(self) -> Image | None:
        """Decode the image, uint8 (H, W, 3), or None.

        Raises:
            DataError: the image cannot be decoded.
        """
        if self.image is None:
            return None
        if isinstance(self.image, bytes):
            return decode_image(self.image, f"image of sample {self.sample.id}")
        return load_image(self.image)


def pairs_from_candidates(candidates: Iterable[Candidate]) -> list[Pair]:
    """Pairs of made images and real sentences."""
    return [Pair(candidate.sample, candidate.image) for candidate in candidates]


def load_pairs(
    path: Path, *, images: Path | None = None, modality: Modality = Modality.BOTH, skip_bad: bool = False
) -> list[Pair]:
    """Read a store of candidates, or a file of samples with the images it names.

    Args:
        path: a store folder, or a JSONL or MNRE file.
        images: the folder of the images; by default the file's own.
        modality: with `text` no image is looked for.
        skip_bad: leave bad rows, and rows whose image is not there, out.

    Raises:
        DataError: nothing to read, a bad row, or an image that is not there.
    """
    if path.is_dir() and is_store(path):
        pairs = pairs_from_candidates(read_store(path))
        return [Pair(pair.sample) for pair in pairs] if modality is Modality.TEXT else pairs
    samples = read_samples(path, skip_bad=skip_bad)
    if modality is Modality.TEXT:
        return [Pair(sample) for sample in samples]
    folder = images or path.parent
    pairs = []
    for sample in samples:
        try:
            pairs.append(Pair(sample, find_image(folder, sample.image) if sample.image else None))
        except DataError:
            if not skip_bad:
                raise
    if not pairs:
        raise DataError(f"{path}: none of its {len(samples)} images is in {folder}; pass --images or --modality text")
    return pairs
