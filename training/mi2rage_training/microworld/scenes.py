"""What is in a picture, and the pixels of it: plain NumPy, the same bytes for the same scene."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.noise import rng as keyed_rng
from mi2rage_rt.noise import seed_from
from mi2rage_training.microworld.cues import draw_cue
from mi2rage_training.microworld.painting import Canvas
from mi2rage_training.microworld.words import COLORS, SETTINGS

__all__ = ["IMAGE_PX", "Scene", "draw_scene", "render"]

IMAGE_PX = 24

_SHIRTS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "blue": (0.15, 0.28, 0.88),
    "green": (0.10, 0.62, 0.22),
    "yellow": (0.95, 0.85, 0.15),
    "white": (0.96, 0.96, 0.96),
    "black": (0.10, 0.10, 0.12),
}
_SKIN = ((0.96, 0.80, 0.67), (0.80, 0.58, 0.42), (0.52, 0.35, 0.24))
_HAIR = ((0.15, 0.10, 0.08), (0.45, 0.27, 0.12), (0.88, 0.75, 0.40))


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One picture.

    Attributes:
        setting: one of `SETTINGS`.
        shirts: shirt colours of the people in it, left to right; none to two.
        cue: the object that bears on relations, or None where the picture lacks one.
        seed: key of everything else (positions, sizes, tones, clutter, grain).
    """

    setting: str
    shirts: tuple[str, ...]
    cue: str | None
    seed: int

    @property
    def attributes(self) -> frozenset[str]:
        """What can be seen, e.g. `{"setting:park", "shirt:red", "cue:heart"}`."""
        seen = {f"setting:{self.setting}", *(f"shirt:{color}" for color in self.shirts)}
        return frozenset(seen if self.cue is None else seen | {f"cue:{self.cue}"})


def draw_scene(rng: np.random.Generator, cue: str | None, seed: int, people: tuple[float, float, float]) -> Scene:
    """A scene with the given cue; `people` holds the probabilities of none, one and two people."""
    count = int(rng.choice(3, p=people))
    shirts = tuple(COLORS[int(index)] for index in rng.integers(len(COLORS), size=count))
    return Scene(SETTINGS[int(rng.integers(len(SETTINGS)))], shirts, cue, seed)


def _jitter(rng: np.random.Generator, color: tuple[float, ...], by: float) -> NDArray[np.float64]:
    return np.clip(np.array(color) * rng.uniform(1 - by, 1 + by) + rng.uniform(-by, by, 3) / 2, 0, 1)


def _background(canvas: Canvas, setting: str, rng: np.random.Generator) -> None:
    ground = rng.uniform(14, 18)
    tones = {
        "street": ((0.70, 0.73, 0.78), (0.42, 0.42, 0.44)),
        "park": ((0.55, 0.80, 0.95), (0.36, 0.66, 0.28)),
        "beach": ((0.62, 0.86, 0.97), (0.93, 0.84, 0.58)),
        "night": ((0.06, 0.07, 0.22), (0.13, 0.12, 0.20)),
        "room": ((0.86, 0.70, 0.56), (0.50, 0.33, 0.22)),
    }[setting]
    canvas.fill(_jitter(rng, tones[0], 0.12))
    if setting == "street":
        for x in np.arange(rng.uniform(-4, 0), 24, 7):
            canvas.box(x, ground - rng.uniform(4, 10), x + 5.5, ground, _jitter(rng, (0.55, 0.50, 0.50), 0.2))
    if setting == "beach":
        canvas.box(0, ground - 4, 24, ground, _jitter(rng, (0.12, 0.50, 0.72), 0.1))
    if setting == "night":
        for _ in range(int(rng.integers(3, 7))):
            canvas.disc(rng.uniform(0, 24), rng.uniform(0, 12), 0.5, (0.95, 0.95, 0.80))
    canvas.box(0, ground, 24, 24, _jitter(rng, tones[1], 0.12))
    if setting == "park":
        x = rng.uniform(0, 24)
        canvas.box(x - 0.7, ground - 4, x + 0.7, ground + 1, (0.40, 0.26, 0.14))
        canvas.disc(x, ground - 6, rng.uniform(2.2, 3.4), _jitter(rng, (0.14, 0.48, 0.18), 0.1))
    if setting == "room":
        x = rng.uniform(2, 18)
        canvas.box(x, 2, x + 5, 6.5, _jitter(rng, (0.75, 0.90, 0.98), 0.1))


def _person(canvas: Canvas, x: float, shirt: str, rng: np.random.Generator) -> None:
    foot, scale = rng.uniform(20.5, 23), rng.uniform(0.85, 1.1)
    skin, hair = _SKIN[int(rng.integers(3))], _HAIR[int(rng.integers(3))]
    head, hip = foot - 11 * scale, foot - 3.6 * scale
    canvas.box(x - 1.7 * scale, hip, x - 0.3, foot, _jitter(rng, (0.25, 0.25, 0.38), 0.3))
    canvas.box(x + 0.3, hip, x + 1.7 * scale, foot, _jitter(rng, (0.25, 0.25, 0.38), 0.3))
    canvas.box(x - 2.2 * scale, head + 1.7 * scale, x + 2.2 * scale, hip + 0.3, _jitter(rng, _SHIRTS[shirt], 0.08))
    canvas.disc(x, head - 0.5 * scale, 1.8 * scale, hair)
    canvas.disc(x, head + 0.3 * scale, 1.5 * scale, skin)


def _clutter(canvas: Canvas, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(0, 4))):
        x, y, size = rng.uniform(0, 24), rng.uniform(0, 23), rng.uniform(0.5, 1.1)
        if rng.random() < 0.5:
            canvas.disc(x, y, size, rng.uniform(0, 1, 3))
        else:
            canvas.box(x - size, y - size / 2, x + size, y + size / 2, rng.uniform(0, 1, 3))


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene's pixels, uint8 `(24, 24, 3)` RGB, antialiased."""
    rng = keyed_rng(seed_from("microworld-pixels", scene.seed))
    canvas = Canvas(IMAGE_PX)
    _background(canvas, scene.setting, rng)
    _clutter(canvas, rng)
    slots = rng.permutation([4.2, 12.0, 19.8]) + rng.uniform(-1.2, 1.2, 3)
    if scene.cue is not None:
        draw_cue(canvas, scene.cue, float(slots[0]), rng)
    for x, shirt in zip(sorted(slots[1 : 1 + len(scene.shirts)]), scene.shirts, strict=True):
        _person(canvas, float(x), shirt, rng)
    return canvas.pixels(light=rng.uniform(0.85, 1.08), grain=0.012 * rng.standard_normal((IMAGE_PX, IMAGE_PX, 3)))
