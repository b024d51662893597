"""Pillow's resizing as two matrices, so that a graph can do what `mi2rage_rt.images` does.

Pillow resizes columns, rounds to whole levels, then resizes rows. Each pass is linear in the pixels; its weights depend
on the sizes alone. A graph multiplies with both matrices and rounds in between (see `mi2rage_export.resampling`); the
cut to the centre and black borders are rows that are left out or zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from mi2rage_engines.spec import AxisRange, ImagePreprocessing
from mi2rage_rt.protocols import Image

__all__ = ["Filter", "image_batches", "resampling_matrices", "resampling_matrix"]

T = TypeVar("T", bound=np.generic)

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""How far a filter reaches, in pixels of the smaller of both images."""

_FIXED_POINT = float(1 << 22)
"""Pillow rounds the weights to multiples of 1 / 2^22; float32 holds those exactly."""


def _weights(filter: Filter, distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(distance)
    if filter == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    if filter == "lanczos":
        return np.where((distance >= -3.0) & (distance < 3.0), np.sinc(x) * np.sinc(x / 3.0), 0.0)
    # Keys 1981, equation 4, with a = -1/2
    near, far = (1.5 * x - 2.5) * x * x + 1.0, -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(maxsize=32)
def resampling_matrix(in_px: int, out_px: int, filter: Filter) -> NDArray[np.float32]:
    """The weights with which Pillow resizes one side of an image.

    Args:
        in_px, out_px: the side's length before and after; filters widen with in_px / out_px where the image shrinks.
        filter: Pillow's, as in `ImagePreprocessing.resample`.

    Returns:
        float32 `(out_px, in_px)`, read-only; every row sums to 1 but for Pillow's rounding to 22 bits.
    """
    scale = in_px / out_px
    matrix = np.zeros((out_px, in_px), dtype=np.float32)
    if filter == "nearest":
        # Summed up, not multiplied: Pillow steps through the image in this way, and rounds as it goes.
        places = np.cumsum(np.concatenate(([scale * 0.5], np.full(out_px - 1, scale))))
        matrix[np.arange(out_px), places.astype(np.int64)] = 1.0
    else:
        stretch = max(scale, 1.0)
        reach = _SUPPORT[filter] * stretch
        centres = ((np.arange(out_px) + 0.5) * scale)[:, None]
        pixels = np.arange(in_px)[None]
        first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
        last = (centres + reach + 0.5).astype(np.int64)
        weights = _weights(filter, (pixels - centres + 0.5) / stretch) * ((pixels >= first) & (pixels < last))
        weights *= _FIXED_POINT / weights.sum(axis=1, keepdims=True)
        matrix[:] = np.trunc(weights + np.copysign(0.5, weights)) / _FIXED_POINT
    matrix.flags.writeable = False
    return matrix


def _resized_px(height: int, width: int, spec: ImagePreprocessing) -> tuple[int, int]:
    """Height and width after resizing, before the cut; as `mi2rage_rt.images` has them."""
    if spec.resize == "exact":
        return spec.height, spec.width
    edge = spec.shortest_edge or min(spec.height, spec.width)
    return (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))


def _centred(array: NDArray[T], px: int) -> NDArray[T]:
    """The middle `px` of axis 0, with zeros around it where there are fewer; the odd one stands before."""
    missing = max(px - len(array), 0)
    if missing:
        before = -(-missing // 2)
        array = np.pad(array, [(before, missing - before), *[(0, 0)] * (array.ndim - 1)])
    start = (len(array) - px) // 2
    return array[start : start + px]


def resampling_matrices(height: int, width: int, spec: ImagePreprocessing) -> dict[str, NDArray[np.float32]]:
    """What a graph with preprocessing takes beside images of one size.

    Args:
        height, width: of the images, in px.
        spec: the preprocessing that the graph was exported with.

    Returns:
        `rows` float32 `(spec.height, height)` and `columns` float32 `(spec.width, width)`.
    """
    resized_height, resized_width = _resized_px(height, width, spec)
    rows = resampling_matrix(height, resized_height, spec.resample)
    columns = resampling_matrix(width, resized_width, spec.resample)
    return {"rows": _centred(rows, spec.height), "columns": _centred(columns, spec.width)}


def _fitted(image: Image, spec: ImagePreprocessing) -> Image:
    """The image as Pillow resizes and cuts it, uint8 `(spec.height, spec.width, 3)`."""
    height, width = _resized_px(image.shape[0], image.shape[1], spec)
    method = PilImage.Resampling[spec.resample.upper()]
    resized = np.asarray(PilImage.fromarray(np.ascontiguousarray(image)).resize((width, height), method))
    return _centred(_centred(resized, spec.height).swapaxes(0, 1), spec.width).swapaxes(0, 1)


def _is_for_graph(height: int, width: int, spec: ImagePreprocessing, axes: Mapping[str, AxisRange]) -> bool:
    """Whether the graph takes images of this size, and resizes them in Pillow's order."""
    for axis, size in (("image_height", height), ("image_width", width)):
        if axis in axes and not axes[axis].min <= size <= axes[axis].max:
            return False
    # From Pillow 13 on, an image that loses much more height than width has its rows resized first: up to 26 levels
    # apart from the other order where filters overshoot.
    resized_height, resized_width = _resized_px(height, width, spec)
    lost = height - resized_height
    return not (lost > 0 and lost > 2 * (width - resized_width))


def image_batches(
    images: Sequence[Image], spec: ImagePreprocessing, axes: Mapping[str, AxisRange]
) -> Iterator[tuple[list[int], dict[str, NDArray[Any]]]]:
    """Images of any sizes as the inputs of a graph with preprocessing; those of one size go together.

    An image that is outside the graph's range, or that Pillow resizes in the other order, is resized by Pillow, and
    the matrices then change nothing.

    Args:
        images: uint8 `(H, W, 3)` each.
        spec: the preprocessing that the graph was exported with.
        axes: the graph's ranges, of which `image_height` and `image_width` count, in px.

    Yields:
        The places of a batch's images among `images`, and `image` uint8 `(B, H, W, 3)`, `rows` and `columns`.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for place, image in enumerate(images):
        height, width = image.shape[:2]
        if _is_for_graph(height, width, spec, axes):
            groups.setdefault((height, width, True), []).append(place)
        else:
            groups.setdefault((spec.height, spec.width, False), []).append(place)
    for (height, width, in_graph), places in groups.items():
        chosen = [images[place] if in_graph else _fitted(images[place], spec) for place in places]
        if in_graph:
            matrices = resampling_matrices(height, width, spec)
        else:
            matrices = {"rows": np.eye(height, dtype=np.float32), "columns": np.eye(width, dtype=np.float32)}
        yield places, {"image": np.stack(chosen), **matrices}
