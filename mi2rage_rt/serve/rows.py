"""Requests to the three models, checked: what the protocol and the plain routes both make, and the service computes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.tensors import MODELS

__all__ = [
    "CaptionRow",
    "ImageRow",
    "RelationRow",
    "caption_options",
    "checked_parameters",
    "generate_options",
    "prompt_row",
    "relation_row",
    "relation_row_from_text",
    "short_text",
    "words_from_json",
]

_WORD = re.compile(r"\S+")
_LARGEST = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class RelationRow:
    """One sentence with its mentions, and an image file's bytes or none."""

    sample: Sample
    image: bytes | None


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionRow:
    """One image file's bytes, what its caption begins with, and a seed for nucleus sampling."""

    image: bytes
    prefix: str = ""
    seed: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRow:
    """One prompt, and the seed of its noise."""

    prompt: str
    seed: int


def short_text(name: str, text: str, limits: Limits) -> str:
    """The text, where it is not too long and can be encoded.

    Raises:
        DataError: it is not.
    """
    if len(text) > limits.max_text_chars:
        raise DataError(f"{name}: {len(text)} characters; expected at most {limits.max_text_chars}; shorten the {name}")
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{name}: holds half a surrogate pair; expected valid Unicode; encode the text again")
    return text


def _span(name: str, span: Sequence[int], length: int, of: str) -> Span:
    if len(span) != 2 or not 0 <= span[0] < span[1] <= length:
        raise DataError(
            f"{name} {list(span)[:4]}: expected [start, end] with 0 <= start < end <= {length}, the number of {of}"
        )
    return Span(int(span[0]), int(span[1]))


def words_from_json(text: str | bytes) -> list[str]:
    """The words of a sentence, as the tensor `tokens` has them.

    Raises:
        DataError: it is no JSON list of words, or has none.
    """
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise DataError('tokens: not a JSON list of words; expected e.g. ["Tim", "leads", "Apple"]; write it so')
    return words


def relation_row(
    tokens: Sequence[str], head: Sequence[int], tail: Sequence[int], image: bytes | None, limits: Limits
) -> RelationRow:
    """A row from words and token offsets.

    Raises:
        DataError: too many words, or a span that does not fit.
    """
    if len(tokens) > limits.max_tokens:
        raise DataError(f"tokens: {len(tokens)} of them; expected at most {limits.max_tokens}; shorten the sentence")
    short_text("tokens", " ".join(tokens), limits)
    spans = _span("head", head, len(tokens), "tokens"), _span("tail", tail, len(tokens), "tokens")
    return RelationRow(Sample("request", tuple(tokens), *spans), image or None)


def relation_row_from_text(
    text: str, head: Sequence[int], tail: Sequence[int], image: bytes | None, limits: Limits
) -> RelationRow:
    """A row from a text and character offsets: words end at white space, and where a mention begins or ends.

    Raises:
        DataError: the text is too long, or a mention does not fit or is blank.
    """
    short_text("text", text, limits)
    mentions = {
        name: _span(name, span, len(text), "characters of text") for name, span in (("head", head), ("tail", tail))
    }
    cuts = sorted({place for span in mentions.values() for place in (span.start, span.end)})
    starts: list[int] = []
    ends: list[int] = []
    for word in _WORD.finditer(text):
        inside = [place for place in cuts if word.start() < place < word.end()]
        starts += [word.start(), *inside]
        ends += [*inside, word.end()]
    offsets = {}
    for name, span in mentions.items():
        chosen = [place for place, start in enumerate(starts) if span.start <= start and ends[place] <= span.end]
        if not chosen:
            raise DataError(f"{name} [{span.start}, {span.end}]: only white space stands there; expected a mention")
        offsets[name] = (chosen[0], chosen[-1] + 1)
    words = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return relation_row(words, offsets["head"], offsets["tail"], image, limits)


def prompt_row(prompt: str, seed: int, limits: Limits) -> ImageRow:
    """A row for the generator. Raises DataError as `short_text`."""
    return ImageRow(short_text("prompt", prompt, limits), seed)


def checked_parameters(model: str, given: Mapping[str, Any]) -> dict[str, int | float]:
    """A request's parameters by name, each of the kind that its model's table says.

    Args:
        model: its name.
        given: what came; text that reads as a number is one, for gRPC's parameters know no fractions.

    Raises:
        InputError: an unknown name, or a value of another kind.
    """
    kinds = {parameter.name: parameter.kind for parameter in MODELS[model].parameters}
    checked: dict[str, int | float] = {}
    for name, value in given.items():
        if name not in kinds:
            known = ", ".join([*kinds, "timeout_ms"])
            raise InputError(f"parameter {name[:60]!r}: the {model} has none of this name; expected one of {known}")
        checked[name] = _number(name, value, whole=kinds[name] == "int")
    return checked


def _number(name: str, value: Any, *, whole: bool) -> int | float:
    number: Any = value
    if isinstance(value, str) and len(value) < 40:
        try:
            number = float(value)
        except ValueError:
            number = None
        if whole and isinstance(number, float) and number.is_integer():
            number = int(number)
    wanted = (int,) if whole else (int, float)
    # The bound first: whole numbers may be too large to be compared as fractions; and NaN is within no bound.
    if isinstance(number, bool) or not isinstance(number, wanted) or not -_LARGEST <= number <= _LARGEST:
        raise InputError(
            f"parameter {name} {str(value)[:40]!r}: expected a {'whole ' if whole else ''}number; give one"
        )
    return number if whole else float(number)


def _at_most(name: str, value: int | float | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise InputError(f"{name} {value}: expected 1 to {most}; give a smaller one")


def caption_options(own: CaptionOptions, given: Mapping[str, int | float], limits: Limits) -> CaptionOptions:
    """The captioner's own options with a request's parameters.

    Raises:
        InputError: one is out of range.
    """
    _at_most("max_new_tokens", given.get("max_new_tokens"), limits.max_new_tokens)
    _at_most("beams", given.get("beams"), limits.max_beams)
    top_p, temperature = given.get("top_p", own.top_p), given.get("temperature", own.temperature)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: expected a share above 0 and at most 1, e.g. 0.9")
    if not temperature > 0:
        raise InputError(f"temperature {temperature}: expected a number above 0, e.g. 1.0")
    return dataclasses.replace(own, **given)  # type: ignore[arg-type]


def generate_options(
    own: GenerateOptions, given: Mapping[str, int | float], size: tuple[int, int], limits: Limits
) -> GenerateOptions:
    """The generator's own options with a request's parameters.

    Args:
        own: the model's.
        given: what came.
        size: height and width that the model makes by default, in px.
        limits: of steps and pixels.

    Raises:
        InputError: one is out of range.
    """
    _at_most("steps", given.get("steps"), limits.max_steps)
    height, width = given.get("height", size[0]), given.get("width", size[1])
    most = max(limits.max_made_pixels, size[0] * size[1])
    if min(height, width) < 1 or height * width > most:
        raise InputError(
            f"height {height}, width {width}: expected 1 or more each, and at most {most} pixels in all; give a "
            "smaller size"
        )
    if max(height, width) > limits.max_aspect * min(height, width):
        raise InputError(f"height {height}, width {width}: expected at most {limits.max_aspect} times the other side")
    return dataclasses.replace(own, **given)  # type: ignore[arg-type]
