"""Captions for one link: decoded as asked for, and drawn again where they repeat a sibling's or are of no use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mi2rage_rt.protocols import Image, ImageToText
from mi2rage_training.chain_config import ChainConfig, Decoding

__all__ = ["Request", "Written", "write_captions"]


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A caption to write.

    Attributes:
        image: uint8 `(H, W, 3)`.
        prefix: what it is to begin with.
        siblings: key of the group within which captions are to differ.
        seed_of: the seed of an attempt (0 is the first).
        text_of: what the words written after the prefix come to, or None where they are of no use.
    """

    image: Image
    prefix: str
    siblings: str
    seed_of: Callable[[int], int]
    text_of: Callable[[str], str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What the captioner wrote after the prefix, what it comes to, and the seed it was drawn from."""

    words: str
    text: str
    seed: int


def write_captions(
    captioner: ImageToText, requests: Sequence[Request], config: ChainConfig, seen: dict[str, set[str]]
) -> list[Written | None]:
    """Write a caption for every request, siblings' ones different as far as `config.attempts` reach.

    Of equal captions the first stays; the later ones are drawn again from the nucleus, and in the end kept, or with
    `config.drop_duplicates` given up. A text that is of no use is given up in any case.

    Args:
        seen: the texts that each group of siblings has already; those written are added.

    Returns:
        One for each request, None where it was given up.
    """
    written: list[Written | None] = [None] * len(requests)
    doubles: dict[int, Written] = {}
    waiting = list(range(len(requests)))
    for attempt in range(config.attempts + 1):
        for row, found in zip(
            waiting, _drawn(captioner, [requests[row] for row in waiting], attempt, config), strict=True
        ):
            text = requests[row].text_of(found.words)
            if text is None:
                continue
            usable = dataclasses.replace(found, text=text)
            texts = seen.setdefault(requests[row].siblings, set())
            if text in texts:
                doubles.setdefault(row, usable)
            else:
                texts.add(text)
                written[row] = usable
        waiting = [row for row in waiting if written[row] is None]
        if not waiting:
            break
    if not config.drop_duplicates:
        for row in waiting:
            written[row] = doubles.get(row)
    return written


def _drawn(captioner: ImageToText, requests: Sequence[Request], attempt: int, config: ChainConfig) -> list[Written]:
    seeds = [request.seed_of(attempt) for request in requests]
    sampled = attempt > 0 or config.decoding is Decoding.NUCLEUS
    words = captioner.caption(
        [request.image for request in requests],
        [request.prefix for request in requests],
        seeds if sampled else None,
        with_prefix=False,
    )
    return [Written(text, text, seed) for text, seed in zip(words, seeds, strict=True)]
