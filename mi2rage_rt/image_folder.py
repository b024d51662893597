"""Where the image that a sample names lies."""

from __future__ import annotations

from pathlib import Path

from mi2rage_engines.errors import DataError

__all__ = ["find_image"]

_SUBFOLDERS = ("", "images", "train", "val", "test", "images/train", "images/val", "images/test")
"""MNRE keeps its images by split, beside the rows or in a folder `images`."""


def find_image(folder: Path, name: str) -> Path:
    """The file of an image that a sample names.

    Args:
        folder: the data set's image folder, or the folder of its rows.
        name: as in the sample, relative to `folder` or to one of MNRE's subfolders of it.

    Raises:
        DataError: it is in none of them.
    """
    for subfolder in _SUBFOLDERS:
        path = folder / subfolder / name
        if path.is_file():
            return path
    raise DataError(
        f"image {name!r}: not found in {folder}, nor in its folders images/, train/, val/, test/; "
        "pass the folder of the images with --images"
    )
