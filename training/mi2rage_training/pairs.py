"""What a classifier is fitted on or tested on: samples, each with a way to its image."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from mi2rage_engines.errors import DataError
from mi2rage_rt.image_folder import find_image
from mi2rage_rt.images import decode_image, load_image
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import BadRow, Sample, Span, read_samples
from mi2rage_training.store import Candidate, StoredCandidates, StorePlace, is_store
from mi2rage_training.store_files import is_address

logger = logging.getLogger(__name__)

__all__ = ["Modality", "Pair", "load_pairs", "mentions_only", "pairs_from_candidates"]


class Modality(StrEnum):
    """What the classifier is shown: all, no image, or the image and of the sentence the two mentions alone."""

    BOTH = "both"
    TEXT = "text"
    IMAGE = "image"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A sample and where its image is: encoded bytes, a file, or nowhere; and what it counts for in training."""

    sample: Sample
    image: bytes | Path | None = None
    weight: float = 1.0

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


def mentions_only(sample: Sample) -> Sample:
    """The sample, its sentence reduced to the words of the head and, after them, of the tail.

    Words that both mentions share stand in both.
    """
    head = sample.tokens[sample.head.start : sample.head.end]
    tail = sample.tokens[sample.tail.start : sample.tail.end]
    spans = Span(0, len(head)), Span(len(head), len(head) + len(tail))
    return dataclasses.replace(sample, tokens=head + tail, head=spans[0], tail=spans[1])


def pairs_from_candidates(candidates: Iterable[Candidate]) -> list[Pair]:
    """Pairs of made images and real sentences, or of made sentences and real images, with their weights."""
    return [Pair(item.sample, item.image, 1.0 if item.weight is None else item.weight) for item in candidates]


def load_pairs(
    path: StorePlace,
    *,
    images: Path | None = None,
    modality: Modality = Modality.BOTH,
    skip_bad: bool = False,
    bad_rows: list[BadRow] | None = None,
) -> list[Pair]:
    """Read a store of candidates, or a file of samples with the images it names.

    Args:
        path: a store's folder or address, or a JSONL or MNRE file.
        images: the folder of the images; by default the file's own.
        modality: with `text` no image is looked for; with `image` sentences are reduced to their mentions.
        skip_bad: leave bad rows, and rows whose image is not there, out.
        bad_rows: a list that the bad rows are appended to, those without their images with line 0.

    Raises:
        DataError: nothing to read, a bad row, an image that is not there, or `image` and no row has one.
    """
    if is_address(path) or is_store(path):
        pairs = pairs_from_candidates(StoredCandidates(path, images=modality is not Modality.TEXT))
        if modality is Modality.TEXT:
            return [dataclasses.replace(pair, image=None) for pair in pairs]
    elif modality is Modality.TEXT:
        return [Pair(sample) for sample in read_samples(Path(path), skip_bad=skip_bad, bad_rows=bad_rows)]
    else:
        pairs = _pairs_of_file(Path(path), images or Path(path).parent, skip_bad=skip_bad, bad_rows=bad_rows)
    if modality is Modality.IMAGE:
        if all(pair.image is None for pair in pairs):
            raise DataError(
                f"{path}: none of its {len(pairs)} rows has an image; expected some with --modality image; "
                "pass --modality text"
            )
        return [dataclasses.replace(pair, sample=mentions_only(pair.sample)) for pair in pairs]
    return pairs


def _pairs_of_file(path: Path, folder: Path, *, skip_bad: bool, bad_rows: list[BadRow] | None) -> list[Pair]:
    samples = read_samples(path, skip_bad=skip_bad, bad_rows=bad_rows)
    pairs, missing = [], []
    for sample in samples:
        try:
            pairs.append(Pair(sample, find_image(folder, sample.image) if sample.image else None))
        except DataError as error:
            if not skip_bad:
                raise
            missing.append(BadRow(0, f"sample {sample.id}: {error}"))
    if not pairs:
        raise DataError(f"{path}: none of its {len(samples)} images is in {folder}; pass --images or --modality text")
    if missing:
        logger.warning("%s: left out %d rows without their images, first %s", path, len(missing), missing[0].reason)
    if bad_rows is not None:
        bad_rows += missing
    return pairs
