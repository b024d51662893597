"""Names of people, organisations, places and events: syllables and endings that tell the type.

A name is made of a stem and an ending. Every stem belongs to one split, so no two splits share a name, yet each name's
endings are known words of the world: a name never seen can be typed by its pieces.
"""

from __future__ import annotations

import functools

import numpy as np

from mi2rage_rt.noise import seed_from
from mi2rage_training.microworld.words import SPLITS

__all__ = ["draw_name", "draw_user", "stems"]

_ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ee")
_CODAS = ("l", "n", "r", "v", "m", "d", "k", "s")
_SHARES = (0.35, 0.15, 0.2, 0.3)
"""Share of the stems for each of `SPLITS`."""

_FIRST_ENDINGS = ("ina", "ella", "ey", "io", "aya", "us")
_LAST_ENDINGS = ("son", "sky", "ez", "berg", "man", "elli")
_SPELT_OUT = 0.9
"""Share of organisations, places and events whose type is a word of its own."""
_PERSON_TITLES = ("Mr", "Dr", "Lady", "DJ", "Coach")
_ORG_ENDINGS = ("United", "FC", "Labs", "Records")
_ORG_SUFFIXES = ("corp", "tech")
_PLACE_SUFFIXES = ("ville", "burgh")
_PLACE_ENDINGS = ("City", "Bay", "Hills", "Town")
_EVENT_ENDINGS = ("Awards", "Cup", "Festival", "Tour")
_EVENT_SUFFIXES = ("fest",)


@functools.cache
def stems(split: str) -> tuple[str, ...]:
    """The stems that belong to `split`, e.g. `("brav", "keem", ...)`; those of two splits are disjoint."""
    bounds = np.cumsum(_SHARES)
    chosen = []
    for onset in _ONSETS:
        for vowel in _VOWELS:
            for coda in _CODAS:
                stem = onset + vowel + coda
                part = seed_from("microworld-stem", stem) % 10_000 / 10_000
                if SPLITS[int(np.searchsorted(bounds, part, side="right"))] == split:
                    chosen.append(stem)
    return tuple(chosen)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _stem(rng: np.random.Generator, split: str) -> str:
    return _pick(rng, stems(split)).capitalize()


def draw_name(rng: np.random.Generator, split: str, kind: str) -> tuple[str, ...]:
    """A name of `kind` (`per`, `org`, `loc` or `misc`) as tokens; every token with a stem is the split's own."""
    stem, form = _stem(rng, split), rng.random()
    if kind == "per":
        last = _stem(rng, split) + _pick(rng, _LAST_ENDINGS)
        if form < 0.2:
            return (_pick(rng, _PERSON_TITLES), last)
        first = stem + _pick(rng, _FIRST_ENDINGS)
        return (first,) if form < 0.35 else (first, last)
    if kind == "org":
        return (stem, _pick(rng, _ORG_ENDINGS)) if form < _SPELT_OUT else (stem + _pick(rng, _ORG_SUFFIXES),)
    if kind == "loc":
        return (stem + _pick(rng, _PLACE_SUFFIXES),) if form < _SPELT_OUT else (stem, _pick(rng, _PLACE_ENDINGS))
    return (stem, _pick(rng, _EVENT_ENDINGS)) if form < _SPELT_OUT else (stem + _pick(rng, _EVENT_SUFFIXES),)


def draw_user(rng: np.random.Generator, split: str) -> str:
    """A user name, e.g. `keemdrav7`, of the split's own stems."""
    return _pick(rng, stems(split)) + _pick(rng, stems(split)) + str(rng.integers(10))
