"""A small painter: shapes on a supersampled canvas, averaged down to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Canvas"]

Color = Sequence[float] | NDArray[np.float64]
_OVER = 4


class Canvas:
    """A square canvas of `size` px; coordinates are in px, (0, 0) at the top left; colours are RGB in [0, 1]."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._paint = np.zeros((size * _OVER, size * _OVER, 3))
        axis = (np.arange(size * _OVER) + 0.5) / _OVER
        self._y, self._x = axis[:, None], axis[None, :]

    def fill(self, color: Color) -> None:
        """Paint everything."""
        self._paint[:] = color

    def _put(self, mask: NDArray[np.bool_], color: Color) -> None:
        self._paint[mask] = color

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """An upright rectangle."""
        self._put((self._x >= left) & (self._x < right) & (self._y >= top) & (self._y < bottom), color)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        """A disc around (x, y)."""
        self._put((self._x - x) ** 2 + (self._y - y) ** 2 < radius**2, color)

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        """A convex polygon, its corners in either turn."""
        left = np.ones((self._y.shape[0], self._x.shape[1]), dtype=bool)
        right = left.copy()
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            side = (bx - ax) * (self._y - ay) - (by - ay) * (self._x - ax)
            left &= side >= 0
            right &= side <= 0
        self._put(left | right, color)

    def pixels(self, light: float, grain: NDArray[np.float64]) -> NDArray[np.uint8]:
        """The picture, uint8 `(size, size, 3)`: averaged, times `light`, plus `grain` (that shape, white is 1)."""
        mean = self._paint.reshape(self._size, _OVER, self._size, _OVER, 3).mean(axis=(1, 3))
        pixels: NDArray[np.uint8] = np.round(np.clip(mean * light + grain, 0, 1) * 255).astype(np.uint8)
        return pixels
