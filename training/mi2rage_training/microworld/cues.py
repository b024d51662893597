"""The eight objects that bear on relations, each in varying sizes, places and tones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.microworld.painting import Canvas

__all__ = ["draw_cue"]

_DARK = (0.15, 0.13, 0.13)


def _tone(rng: np.random.Generator, tone: tuple[float, float, float]) -> NDArray[np.float64]:
    return np.clip(np.array(tone) + rng.uniform(-0.06, 0.06, 3), 0, 1)


def _heart(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    y, color = rng.uniform(5.5, 13), _tone(rng, (0.95, 0.10, 0.35))
    lobe = 0.56 * size
    canvas.disc(x - 0.48 * size, y - 0.35 * size, lobe, color)
    canvas.disc(x + 0.48 * size, y - 0.35 * size, lobe, color)
    canvas.polygon([(x - 0.98 * size, y - 0.12 * size), (x + 0.98 * size, y - 0.12 * size), (x, y + 1.1 * size)], color)


def _ball(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    y, color = rng.uniform(7, 19.5), _tone(rng, (0.97, 0.52, 0.10))
    canvas.disc(x, y, size, _DARK)
    canvas.disc(x, y, 0.86 * size, color)
    canvas.box(x - 0.16 * size, y - 0.85 * size, x + 0.16 * size, y + 0.85 * size, _DARK)
    canvas.box(x - 0.85 * size, y - 0.16 * size, x + 0.85 * size, y + 0.16 * size, _DARK)


def _trophy(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot, color = rng.uniform(17.5, 21), _tone(rng, (0.98, 0.80, 0.10))
    top = foot - 2.3 * size
    canvas.disc(x - 0.8 * size, top + 0.5 * size, 0.45 * size, color)
    canvas.disc(x + 0.8 * size, top + 0.5 * size, 0.45 * size, color)
    canvas.polygon(
        [(x - 0.9 * size, top), (x + 0.9 * size, top), (x + 0.35 * size, foot - size), (x - 0.35 * size, foot - size)],
        color,
    )
    canvas.box(x - 0.22 * size, foot - 1.1 * size, x + 0.22 * size, foot - 0.3 * size, color)
    canvas.box(x - 0.75 * size, foot - 0.45 * size, x + 0.75 * size, foot, (0.35, 0.20, 0.12))


def _house(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot = rng.uniform(16.5, 20)
    wall, roof = _tone(rng, (0.96, 0.90, 0.80)), _tone(rng, (0.62, 0.20, 0.12))
    canvas.box(x - size, foot - 1.4 * size, x + size, foot, wall)
    canvas.polygon(
        [(x - 1.3 * size, foot - 1.3 * size), (x + 1.3 * size, foot - 1.3 * size), (x, foot - 2.6 * size)], roof
    )
    canvas.box(x - 0.3 * size, foot - 0.9 * size, x + 0.3 * size, foot, (0.30, 0.18, 0.12))


def _stage(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot = rng.uniform(18.5, 21)
    light = _tone(rng, (0.85, 0.55, 0.98))
    canvas.polygon(
        [(x - 0.25 * size, 1.5), (x + 0.25 * size, 1.5), (x + 1.25 * size, foot - 1), (x - 1.25 * size, foot - 1)],
        light,
    )
    canvas.box(x - 0.7 * size, 0.3, x + 0.7 * size, 1.9, _DARK)
    canvas.box(x - 1.4 * size, foot - 1.2, x + 1.4 * size, foot + 1.2, _tone(rng, (0.40, 0.08, 0.42)))


def _tower(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot, color = rng.uniform(17, 20), _tone(rng, (0.10, 0.52, 0.56))
    top = foot - rng.uniform(12.5, 15.5)
    canvas.polygon(
        [(x - 0.45 * size, top), (x + 0.45 * size, top), (x + 0.75 * size, foot), (x - 0.75 * size, foot)], color
    )
    canvas.box(x - 0.12 * size - 0.2, top - 2.6, x + 0.12 * size + 0.2, top, _DARK)
    for y in np.arange(top + 1.2, foot - 1, 2.6):
        canvas.box(x - 0.3 * size, y, x + 0.3 * size, y + 1.1, (0.98, 0.92, 0.50))


def _cake(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot, color = rng.uniform(17, 21), _tone(rng, (0.98, 0.66, 0.76))
    top = foot - 1.3 * size
    canvas.box(x - 1.15 * size, top, x + 1.15 * size, foot, color)
    canvas.box(x - 1.15 * size, top, x + 1.15 * size, top + 0.4 * size, (0.99, 0.97, 0.94))
    for shift in (-0.65, 0.0, 0.65):
        canvas.box(x + shift * size - 0.35, top - 1.9, x + shift * size + 0.35, top, (0.30, 0.60, 0.95))
        canvas.disc(x + shift * size, top - 2.3, 0.6, (0.99, 0.65, 0.10))


def _flag(canvas: Canvas, x: float, size: float, rng: np.random.Generator) -> None:
    foot = rng.uniform(18, 21.5)
    top = foot - rng.uniform(12.5, 15)
    left = x - size
    canvas.box(left, top, left + 0.8, foot, (0.88, 0.88, 0.90))
    band = 0.62 * size
    tones = ((0.10, 0.30, 0.85), (0.98, 0.98, 0.98), (0.90, 0.12, 0.15))
    for row, color in enumerate(tones):
        canvas.box(left + 0.8, top + row * band, left + 0.8 + 1.9 * size, top + (row + 1) * band, color)


_DRAW: dict[str, Callable[[Canvas, float, float, np.random.Generator], None]] = {
    "heart": _heart,
    "ball": _ball,
    "trophy": _trophy,
    "house": _house,
    "stage": _stage,
    "tower": _tower,
    "cake": _cake,
    "flag": _flag,
}


def draw_cue(canvas: Canvas, cue: str, x: float, rng: np.random.Generator) -> None:
    """Paint `cue` around the column `x`, 7 to 10 px wide."""
    _DRAW[cue](canvas, x, float(rng.uniform(3.3, 4.2)), rng)
