"""Tweets (two named entities, slang, a hint now and then) and captions (what is in the picture, or part of it)."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from mi2rage_rt.samples import Span
from mi2rage_training.microworld.names import draw_name, draw_user
from mi2rage_training.microworld.relations import CUES
from mi2rage_training.microworld.scenes import Scene
from mi2rage_training.microworld.words import (
    CLOSERS,
    COLORS,
    CUE_WORDS,
    EVERYDAY_TAGS,
    HINTS,
    OPENERS,
    PHRASES,
    SETTING_WORDS,
)

__all__ = ["HINT_RATE", "HINT_RIGHT", "Tweet", "attributes_in", "draw_caption", "draw_tweet"]

HINT_RATE = 0.45
"""Share of tweets with a hint on the picture."""
HINT_RIGHT = 0.85
"""Share of hints that fit the tweet's own cue; the others fit any."""
LEFT_OUT = 0.15
"""Share of a scene's attributes that a caption leaves out."""

_CODE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclasses.dataclass(frozen=True, slots=True)
class Tweet:
    """Tokens and spans of a tweet, and the frame (opener and closer) that it was made from."""

    tokens: tuple[str, ...]
    head: Span
    tail: Span
    frame: tuple[str, str]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _linked(phrase: str, names: dict[str, tuple[str, ...]], offset: int) -> tuple[list[str], dict[str, Span]]:
    tokens: list[str] = []
    spans: dict[str, Span] = {}
    for word in phrase.split():
        if word in names:
            start = offset + len(tokens)
            tokens.extend(names[word])
            spans[word] = Span(start, offset + len(tokens))
        else:
            tokens.append(word)
    return tokens, spans


def _tags(rng: np.random.Generator, cue: str) -> list[str]:
    tags = []
    if rng.random() < HINT_RATE:
        hinted = cue if rng.random() < HINT_RIGHT else _pick(rng, CUES)
        tags.append(_pick(rng, HINTS[hinted]))
    if rng.random() < 0.35:
        tags.insert(int(rng.integers(len(tags) + 1)), _pick(rng, EVERYDAY_TAGS))
    return tags


def draw_tweet(rng: np.random.Generator, split: str, types: tuple[str, str], family: str, cue: str) -> Tweet:
    """A tweet in the words of `split` on two entities of `types`; `cue` only bears on the hints."""
    opener, closer = _pick(rng, OPENERS[split]), _pick(rng, CLOSERS[split])
    fill = {
        "u": draw_user(rng, split),
        "v": draw_user(rng, split),
        "c": "".join(_CODE[int(index)] for index in rng.integers(len(_CODE), size=6)),
    }
    names = {"{h}": draw_name(rng, split, types[0]), "{t}": draw_name(rng, split, types[1])}
    before = opener.format(**fill).split()
    tags = _tags(rng, cue)
    if tags and rng.random() < 0.15:
        before += tags.pop().split()
    linked, spans = _linked(_pick(rng, PHRASES[family]), names, len(before))
    after = closer.format(**fill).split()
    words = [word for tag in tags for word in tag.split()]
    after = words + after if rng.random() < 0.3 else after + words
    return Tweet(tuple(before + linked + after), spans["{h}"], spans["{t}"], (opener, closer))


def _people(shirts: list[str]) -> str:
    return " and ".join(f"a person in {color}" for color in shirts)


def draw_caption(rng: np.random.Generator, scene: Scene) -> str:
    """What is in the picture, in plain words; attributes are left out now and then, none is invented."""
    shirts = [color for color in scene.shirts if rng.random() >= LEFT_OUT]
    cue = scene.cue if rng.random() >= LEFT_OUT else None
    setting = scene.setting if rng.random() >= LEFT_OUT else None
    thing = _pick(rng, CUE_WORDS[cue]) if cue is not None else ""
    people = _people(shirts)
    link = _pick(rng, ("next to", "with", "near"))
    parts = [
        f"{people} {link} {thing}" if people and thing else people or thing or _pick(rng, ("a picture", "a photo"))
    ]
    if setting is not None:
        parts.append(_pick(rng, SETTING_WORDS[setting]))
    return " ".join(parts)


def attributes_in(text: str) -> frozenset[str]:
    """The attributes that a caption names, found by their words, e.g. `{"cue:heart", "shirt:red"}`."""
    words = text.lower().replace(",", " ").split()
    found = {f"cue:{word}" for word in words if word in CUE_WORDS}
    found |= {f"setting:{word}" for word in words if word in SETTING_WORDS}
    found |= {f"shirt:{after}" for before, after in itertools.pairwise(words) if before == "in" and after in COLORS}
    return frozenset(found)
