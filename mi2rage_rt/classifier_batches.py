"""Which samples a classifier runs together, and which images it encodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.protocols import Image

__all__ = ["ImageGroup", "distinct_images", "image_groups", "length_batches"]

_LOOKED_AT = 16
"""Pixels a side that are compared first: images that differ mostly differ there."""


def distinct_images(images: Sequence[Image | None]) -> list[int | None]:
    """For each image the place of the first that is equal to it, its own where there is none; None without an image.

    Args:
        images: uint8 `(H, W, 3)` each; the same object, or equal pixels.
    """
    held = list(images)  # an array of images makes a new object of each every time, and ids come again
    by_object: dict[int, int] = {}
    by_look: dict[tuple[tuple[int, ...], bytes], list[tuple[int, Image]]] = {}
    for place, image in enumerate(held):
        if image is None or id(image) in by_object:
            continue
        height, width = image.shape[:2]
        few = image[:: max(1, height // _LOOKED_AT), :: max(1, width // _LOOKED_AT)]
        alike = by_look.setdefault((image.shape, few.tobytes()), [])
        first = next((known for known, other in alike if np.array_equal(other, image)), place)
        if first == place:
            alike.append((place, image))
        by_object[id(image)] = first
    return [None if image is None else by_object[id(image)] for image in held]


@dataclasses.dataclass(frozen=True, slots=True)
class ImageGroup:
    """Samples whose images are encoded in one run.

    Attributes:
        images: places of distinct images.
        rows: places of the samples, by ascending length.
        index: int64, for each of `rows` its image among `images`, -1 where it has none.
    """

    images: list[int]
    rows: list[int]
    index: NDArray[np.int64]


def image_groups(lengths: Sequence[int], firsts: Sequence[int | None], most: int) -> list[ImageGroup]:
    """Group samples so that each image is in one group, and samples of like length are together as far as can be.

    Images are taken in the order of the shortest sentence that shows them; a sample without one goes where its length
    belongs.

    Args:
        lengths: of the samples, in ids.
        firsts: of their images, see `distinct_images`.
        most: images of a group.
    """
    number: dict[int, int] = {}
    groups: list[tuple[list[int], list[int]]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        first = firsts[row]
        image = max(0, len(number) - 1) if first is None else number.setdefault(first, len(number))
        if image // most == len(groups):
            groups.append(([], []))
        rows, index = groups[image // most]
        rows.append(row)
        index.append(-1 if first is None else image % most)
    images = list(number)
    return [
        ImageGroup(images[start * most : (start + 1) * most], rows, np.array(index, dtype=np.int64))
        for start, (rows, index) in enumerate(groups)
    ]


def length_batches(lengths: Sequence[int], most: int, ids: int, padding: int) -> list[slice]:
    """Cut rows into batches, each padded to its longest row; a row that fits nowhere is a batch of its own.

    Args:
        lengths: of the rows in ids, ascending.
        most: rows of a batch.
        ids: of a batch, padding included.
        padding: ids of a batch that are nothing but padding.
    """
    batches, start, needed = [], 0, 0
    for end, length in enumerate(lengths):
        count = end - start
        if count and (count == most or (count + 1) * length > ids or count * length - needed > padding):
            batches.append(slice(start, end))
            start, needed = end, 0
        needed += length
    if start < len(lengths):
        batches.append(slice(start, len(lengths)))
    return batches
