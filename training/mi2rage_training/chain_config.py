"""What a run of Chained Cross-modal Generation is asked for."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from mi2rage_engines.errors import InputError
from mi2rage_rt.samples import Sample

__all__ = ["ChainConfig", "Decoding", "Given", "ImageFormat", "fill", "label_words", "without_label"]

NONE = "None"
"""The label of pairs without a relation."""
_PROMPT_FIELDS = ("sentence", "head", "tail", "label", "caption")
_PREFIX_FIELDS = ("head", "tail", "label")
_NEWER = ("jpeg_quality", "png_level", "least_added_nats")
"""Settings that unfinished stores of earlier releases do not have."""
DEFAULT_TEXT_PREFIXES = (
    "{head} and {tail} :",
    "{head} , {tail} :",
    "{head} with {tail} ,",
    "a photo of {head} and {tail} ,",
)


class Given(StrEnum):
    """The modality that the labelled data have; the chain makes the other one."""

    TEXT = "text"
    IMAGE = "image"


class Decoding(StrEnum):
    """How a caption is decoded the first time; one that repeats a sibling's is drawn again from the nucleus."""

    GREEDY = "greedy"
    NUCLEUS = "nucleus"
    BEAM = "beam"


class ImageFormat(StrEnum):
    """How images are encoded in the store: `png` keeps every pixel, `jpeg` is smaller and faster."""

    PNG = "png"
    JPEG = "jpeg"


@dataclasses.dataclass(frozen=True, slots=True)
class ChainConfig:
    """How long and how wide the chains are, and what they are made with.

    Attributes:
        given: `text` makes images, `image` makes texts.
        links: samples made one after the other, 1 or more (1 is direct generation).
        width: children a real sample has at every link, 1 or more.
        seed: of the whole run.
        shard_size: real samples a shard; part of the settings, since a batch's shape can change its last bits.
        image_format: of made images in the store.
        jpeg_quality: 1 to 95.
        png_level: effort at making PNG files small, 0 to 9: level 1 is five times as fast as 6, and files a few per
            cent larger.
        first_prompt, next_prompt: templates of what the generator draws, of `{sentence}`, `{head}`, `{tail}`,
            `{label}` (in words) and, at later links, `{caption}`.
        prefixes: templates that captions begin with, of `{head}`, `{tail}`, `{label}`; siblings take turns. Empty is
            no prefix where text is given and `DEFAULT_TEXT_PREFIXES` where images are.
        label_words: words for labels in templates; by default those of the label's last part.
        decoding: of captions.
        attempts: how often a caption that a sibling has already, or that lacks a mention, is drawn again.
        drop_duplicates: leave out a child whose caption a sibling still has after that, and all that would come of it.
        sharpness: power of the judge's likelihood where there is a judge, see `judge`; 1 is the posterior.
        least_added_nats: a child that adds less by the judge, which there must be, has no children, see `chain_places`.
            Its exponential is the least ratio q(y | both) / q(y | real modality). None has the judge draw what children
            are made from instead.
    """

    given: Given = Given.TEXT
    links: int = 3
    width: int = 1
    seed: int = 0
    shard_size: int = 32
    image_format: ImageFormat = ImageFormat.PNG
    jpeg_quality: int = 90
    png_level: int = 6
    first_prompt: str = "{sentence}"
    next_prompt: str = "{caption}"
    prefixes: tuple[str, ...] = ()
    label_words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decoding: Decoding = Decoding.NUCLEUS
    attempts: int = 3
    drop_duplicates: bool = False
    sharpness: float = 1.0
    least_added_nats: float | None = None

    def __post_init__(self) -> None:
        for name in ("links", "width", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 1 or more")
        if self.attempts < 0:
            raise InputError(f"attempts: came {self.attempts}; expected 0 (never again) or more")
        if self.sharpness <= 0:
            raise InputError(f"sharpness: came {self.sharpness}; expected a number above 0; 1 is the posterior")
        if self.least_added_nats is not None and not math.isfinite(self.least_added_nats):
            raise InputError(f"least added nats: came {self.least_added_nats}; expected a finite number, e.g. 0")
        if self.least_added_nats is not None and self.sharpness != 1:
            raise InputError(
                f"sharpness: came {self.sharpness} with least added nats (--select-online); expected one of them, "
                "since nothing is drawn by the judge where bad children end their chains; leave one out"
            )
        self._check_image_format()
        _check_template("first prompt", self.first_prompt, tuple(set(_PROMPT_FIELDS) - {"caption"}))
        _check_template("next prompt", self.next_prompt, _PROMPT_FIELDS)
        for prefix in self.prefixes:
            fields = _check_template("prefix", prefix, _PREFIX_FIELDS)
            words = prefix.split()
            if self.given is Given.IMAGE and not (words.count("{head}") == words.count("{tail}") == 1):
                raise InputError(
                    f"prefix {prefix!r}: names {sorted(fields) or 'neither mention'}; expected {{head}} and {{tail}} "
                    "once each, set off by spaces, since every made text must hold both mentions"
                )

    def _check_image_format(self) -> None:
        """An option of the other format is refused too, so that none is without effect."""
        if not 1 <= self.jpeg_quality <= 95:
            raise InputError(f"jpeg quality: came {self.jpeg_quality}; expected 1 to 95, e.g. 90")
        if not 0 <= self.png_level <= 9:
            raise InputError(f"png level: came {self.png_level}; expected 0 to 9, e.g. 1 (fast) or 6 (smaller)")
        for name, usual, format_ in (("jpeg_quality", 90, ImageFormat.JPEG), ("png_level", 6, ImageFormat.PNG)):
            if getattr(self, name) != usual and self.image_format is not format_:
                raise InputError(
                    f"{name.replace('_', ' ')}: came with the image format {self.image_format.value}; expected it with "
                    f"{format_.value} only; leave it out, or take that format"
                )

    @property
    def used_prefixes(self) -> tuple[str, ...]:
        """The prefixes that siblings take turns in."""
        return self.prefixes or (DEFAULT_TEXT_PREFIXES if self.given is Given.IMAGE else ("",))

    def without_labels(self) -> ChainConfig:
        """The same chains, told nothing of the labels."""
        return dataclasses.replace(
            self,
            first_prompt=without_label(self.first_prompt),
            next_prompt=without_label(self.next_prompt),
            prefixes=tuple(map(without_label, self.prefixes)),
        )

    def described(self) -> dict[str, Any]:
        """The settings as JSON values; newer ones only where they are set, so that older stores can be gone on with."""
        values = dataclasses.asdict(self) | {"prefixes": list(self.prefixes), "label_words": dict(self.label_words)}
        usual = {field.name: field.default for field in dataclasses.fields(self) if field.name in _NEWER}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def _check_template(subject: str, template: str, allowed: tuple[str, ...]) -> set[str]:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(f"{subject} {template!r}: {error}; expected a template of {_listed(allowed)}") from error
    if unknown := sorted(fields - set(allowed)):
        raise InputError(f"{subject} {template!r}: unknown field {unknown[0]!r}; expected some of {_listed(allowed)}")
    return fields


def _listed(fields: tuple[str, ...]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(fields))


def label_words(label: str | None, words: Mapping[str, str]) -> str:
    """What a label is called in a template: `/per/org/member_of` is `member of` unless `words` says otherwise.

    `None`, which is no relation, has no words.
    """
    if label is None:
        return ""
    return words.get(label, "" if label == NONE else label.rsplit("/", 1)[-1].replace("_", " "))


def fill(template: str, sample: Sample, words: Mapping[str, str], caption: str = "") -> str:
    """A template with a sample's words in place of its fields.

    Where the label has no words (`None`), separators that would stand alone before the rest go too.
    """
    label = label_words(sample.label, words)
    filled = template.format(
        sentence=sample.text,
        head=sample.mention(sample.head),
        tail=sample.mention(sample.tail),
        label=label,
        caption=caption,
    )
    if not label and "{label}" in template:
        filled = " ".join(filled.split())
        if template.startswith("{label}"):
            filled = filled.lstrip(" :,;-")
    return filled


def without_label(template: str) -> str:
    """A template that does not name the label: `{label} : {sentence}` becomes `{sentence}`."""
    if "{label}" not in template:
        return template
    bare = " ".join(template.replace("{label}", "").split())
    return bare.lstrip(" :,;-") if template.startswith("{label}") else bare
