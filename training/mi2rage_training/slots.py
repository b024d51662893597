"""Texts about an entity pair: composed of a prefix and what a captioner wrote after it, with exact spans.

A captioner that was taught so writes slots, words that stand for the head's and the tail's mention, so that it need not
spell names that it never saw.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mi2rage_rt.samples import Sample, Span

__all__ = ["HEAD_SLOT", "POST_PREFIX", "TAIL_SLOT", "compose", "with_slots"]

HEAD_SLOT = "xhead"
TAIL_SLOT = "xtail"
_SLOT = re.compile(rf"\b({HEAD_SLOT}|{TAIL_SLOT})\b")  # decoders join words and the punctuation after them

POST_PREFIX = "{head} , {tail} post {label} :"
"""After this prefix the embedded captioner writes a post, with slots in place of the two entities."""


def with_slots(tokens: Sequence[str], head: Span, tail: Span) -> list[str]:
    """The tokens with each mention replaced by its slot; of mentions that overlap, the head's is replaced alone."""
    overlap = head.start < tail.end and tail.start < head.end
    slotted: list[str] = []
    for index, token in enumerate(tokens):
        if head.start <= index < head.end:
            if index == head.start:
                slotted.append(HEAD_SLOT)
        elif tail.start <= index < tail.end and not overlap:
            if index == tail.start:
                slotted.append(TAIL_SLOT)
        else:
            slotted.append(token)
    return slotted


def compose(prefix: str, written: str, sample: Sample) -> tuple[tuple[str, ...], Span, Span] | None:
    """Tokens, head span and tail span of a made text, or None where it cannot hold each mention once.

    What was written stands alone if it has each slot once; else it follows the prefix, and must have no slot.

    Args:
        prefix: a template with `{head}` and `{tail}` as words of their own.
        written: what the captioner wrote after the prefix.
        sample: whose mentions are put in, word for word.
    """
    words = _SLOT.sub(r" \1 ", written).split()
    counts = words.count(HEAD_SLOT), words.count(TAIL_SLOT)
    if counts == (0, 0):
        frame = [*prefix.split(), *words]
        return _filled(frame, {"{head}": sample.head, "{tail}": sample.tail}, sample) if words else None
    if counts == (1, 1):
        return _filled(words, {HEAD_SLOT: sample.head, TAIL_SLOT: sample.tail}, sample)
    return None


def _filled(words: Sequence[str], slots: dict[str, Span], sample: Sample) -> tuple[tuple[str, ...], Span, Span]:
    tokens: list[str] = []
    by_slot: dict[str, Span] = {}
    for word in words:
        span = slots.get(word)
        if span is None:
            tokens.append(word)
            continue
        start = len(tokens)
        tokens.extend(sample.tokens[span.start : span.end])
        by_slot[word] = Span(start, len(tokens))
    head, tail = (by_slot[slot] for slot in slots)
    return tuple(tokens), head, tail
