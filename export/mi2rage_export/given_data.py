"""Samples that an export is measured or calibrated on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from mi2rage_engines.errors import DataError

if TYPE_CHECKING:
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.samples import Sample

__all__ = ["GivenData", "read_data"]


@dataclasses.dataclass(frozen=True, slots=True)
class GivenData:
    """Samples of a file with their images, uint8 `(H, W, 3)` each or None where a sample has none."""

    file: Path
    samples: tuple[Sample, ...]
    images: tuple[Image | None, ...]


def read_data(file: Path, images: Path | None = None, limit: int | None = None) -> GivenData:
    """Read samples and their images.

    Args:
        file: JSONL or MNRE rows.
        images: folder of the images; by default the file's own.
        limit: only the first so many rows.

    Raises:
        DataError: the file or an image cannot be read.
    """
    from mi2rage_rt.image_folder import find_image
    from mi2rage_rt.images import load_image
    from mi2rage_rt.samples import read_samples

    folder = images or file.parent
    samples = read_samples(file)[:limit]
    loaded: list[Image | None] = []
    for sample in samples:
        try:
            loaded.append(None if sample.image is None else load_image(find_image(folder, sample.image)))
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error
    return GivenData(file, tuple(samples), tuple(loaded))
