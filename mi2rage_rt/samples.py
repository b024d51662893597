"""Labelled entity pairs: the `Sample`, its JSONL form, and the reader that takes every format."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.errors import DataError
from mi2rage_engines.validation import first_problem
from mi2rage_rt import mnre
from mi2rage_rt.files import atomic_text

logger = logging.getLogger(__name__)

__all__ = ["BadRow", "Provenance", "Sample", "Span", "read_samples", "write_samples"]


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Token offsets of an entity mention, `start` inclusive, `end` exclusive."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Where a made sample came from.

    Attributes:
        parent: id of the real sample at the root of the chain.
        link: 1 for what was made from the real sample directly, 2 for the next, ...
        child: index among the siblings of one link.
        seed: 64-bit key of the noise that made the image.
        models: model names by role, e.g. `{"generator": ..., "captioner": ...}`.
        made_from: id of what it was made from directly: the real sample, or another made one of the link before.
    """

    parent: str
    link: int
    child: int
    seed: int
    models: dict[str, str]
    made_from: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sentence with a head and a tail mention, optionally labelled and with an image.

    Attributes:
        id: unique within a data set.
        tokens: the words of the sentence.
        head, tail: non-empty spans into `tokens`; they may overlap.
        label: the relation's name, or None where it is not known.
        image: path of the image file, relative to the data set's image folder, or None.
        provenance: None for real data.
    """

    id: str
    tokens: tuple[str, ...]
    head: Span
    tail: Span
    label: str | None = None
    image: str | None = None
    provenance: Provenance | None = None

    @property
    def text(self) -> str:
        """The sentence, its tokens joined by single spaces."""
        return " ".join(self.tokens)

    def mention(self, span: Span) -> str:
        """The words of `span`, joined by single spaces."""
        return " ".join(self.tokens[span.start : span.end])


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read: its line number (from 1) and what is wrong with it."""

    line: int
    reason: str


class _Row(BaseModel):
    """One line of our JSONL format; `head` and `tail` are `[start, end]`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    tokens: list[str]
    head: list[int]
    tail: list[int]
    label: str | None = None
    image: str | None = None
    provenance: dict[str, Any] | None = None


def _span(name: str, offsets: list[int], length: int) -> Span:
    if len(offsets) != 2:
        raise ValueError(f"{name} span {offsets!r}: expected two token offsets [start, end]")
    start, end = offsets
    if not 0 <= start < end <= length:
        raise ValueError(
            f"{name} span [{start}, {end}] does not fit the sentence's {length} tokens: "
            f"expected 0 <= start < end <= {length}"
        )
    return Span(start, end)


def _sample_from_json(line: str) -> Sample:
    try:
        row = _Row.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    try:
        provenance = Provenance(**row.provenance) if row.provenance is not None else None
    except TypeError as error:
        raise ValueError(f"provenance: {error}") from error
    return Sample(
        id=row.id,
        tokens=tuple(row.tokens),
        head=_span("head", row.head, len(row.tokens)),
        tail=_span("tail", row.tail, len(row.tokens)),
        label=row.label,
        image=row.image,
        provenance=provenance,
    )


def _sample_from_mnre(line: str, number: int) -> Sample:
    row = mnre.row_from_line(line)
    length = len(row.tokens)
    return Sample(
        id=f"row-{number:06d}",
        tokens=row.tokens,
        head=_span("head", list(row.head), length),
        tail=_span("tail", list(row.tail), length),
        label=row.relation,
        image=row.image,
    )


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a mark
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start}); expected JSONL or MNRE rows"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a file of samples, JSONL or MNRE"
        ) from error


_JSON_START = re.compile(r'\s*\{\s*"')


def read_samples(path: Path | str, *, skip_bad: bool = False, bad_rows: list[BadRow] | None = None) -> list[Sample]:
    """Read a file of samples: our JSONL, or MNRE's Python dict literals, told apart row by row.

    Args:
        path: the file, UTF-8, one row a line; blank lines are passed over.
        skip_bad: leave bad rows out (each is logged) instead of refusing the file.
        bad_rows: a list that the bad rows are appended to.

    Raises:
        DataError: the file cannot be read, holds no sample, repeats an id, or has a bad row
            (and `skip_bad` is off); the message names file, line and fault.
    """
    path = Path(path)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, line in _rows(path):
        try:
            is_json = _JSON_START.match(line) is not None
            sample = _sample_from_json(line) if is_json else _sample_from_mnre(line, number)
            if sample.id in seen:
                raise ValueError(f"id {sample.id!r} stands in line {seen[sample.id]} already; ids must be unique")
        except ValueError as error:
            if not skip_bad:
                raise DataError(
                    f"{path}, line {number}: {error}; correct the row, or leave it out (some commands have --skip-bad)"
                ) from error
            logger.warning("%s, line %d skipped: %s", path, number, error)
            if bad_rows is not None:
                bad_rows.append(BadRow(number, str(error)))
            continue
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: no samples in it; expected at least one JSONL or MNRE row")
    return samples


def json_from_sample(sample: Sample) -> str:
    """The sample as one line of JSON, without a line feed; fields that are None are left out."""
    row: dict[str, Any] = {
        "id": sample.id,
        "tokens": list(sample.tokens),
        "head": [sample.head.start, sample.head.end],
        "tail": [sample.tail.start, sample.tail.end],
    }
    if sample.label is not None:
        row["label"] = sample.label
    if sample.image is not None:
        row["image"] = sample.image
    if sample.provenance is not None:
        row["provenance"] = dataclasses.asdict(sample.provenance)
    return json.dumps(row, ensure_ascii=False)


def write_samples(path: Path | str, samples: Iterable[Sample]) -> None:
    """Write samples as JSONL, UTF-8, the whole file or nothing."""
    with atomic_text(Path(path)) as file:
        for sample in samples:
            file.write(json_from_sample(sample) + "\n")
