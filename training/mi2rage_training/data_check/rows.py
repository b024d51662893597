"""The rows of a data set with all that stands in them, the keys that the usual reader passes over or refuses too."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.errors import DataError
from mi2rage_engines.validation import first_problem
from mi2rage_rt import mnre
from mi2rage_rt.samples import BadRow

__all__ = ["Row", "normal_tokens", "read_rows"]

_MNRE_KEYS = {"token", "h", "t", "img_id", "relation"}
_MENTION_KEYS = {"name", "pos"}
_URL = re.compile(r"(https?:|www\.|t\.co/)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of one split.

    Attributes:
        split: `train`, `validation` or `test`.
        line: line number in its file, from 1.
        id: as the row gives it; None for MNRE rows, which have none.
        tokens: the words of the sentence.
        head, tail: `(start, end)` token offsets, end exclusive, in range and not empty.
        label: the relation's name, or None.
        image: the image's file name, or None.
        parent: the real sample that a made one comes from, or None.
        extras: every further field by name; fields of the mentions as `h.<key>` and `t.<key>`.
        is_json: our JSONL, not MNRE.
    """

    split: str
    line: int
    id: str | None
    tokens: tuple[str, ...]
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str | None
    image: str | None
    parent: str | None
    extras: dict[str, Any]
    is_json: bool

    @property
    def place(self) -> str:
        """Where to find it: `train line 12`."""
        return f"{self.split} line {self.line}"

    def mention(self, span: tuple[int, int]) -> str:
        """The words of `span`, joined by single spaces."""
        return " ".join(self.tokens[slice(*span)])


class _JsonRow(BaseModel):
    """One line of JSONL as `mi2rage_rt.samples` reads it, but unknown keys are kept: they are what leaks."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str
    tokens: list[str]
    head: list[int]
    tail: list[int]
    label: str | None = None
    image: str | None = None
    provenance: dict[str, Any] | None = None


def normal_tokens(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """The words without case, urls and a leading `RT @user :`, by which near-duplicates are told."""
    words = [token.lower() for token in tokens if not _URL.match(token)]
    while len(words) > 1 and words[0] == "rt" and words[1].startswith("@"):
        words = words[3:] if words[2:3] == [":"] else words[2:]
    return tuple(words)


def _span(name: str, offsets: list[int] | tuple[int, int], length: int) -> tuple[int, int]:
    if len(offsets) != 2 or not 0 <= offsets[0] < offsets[1] <= length:
        raise ValueError(f"{name} span {list(offsets)}: expected [start, end] with 0 <= start < end <= {length}")
    return offsets[0], offsets[1]


def _row_from_json(line: str, split: str, number: int) -> Row:
    try:
        row = _JsonRow.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    extras = dict(row.model_extra or {})
    if row.provenance is not None:
        extras["provenance"] = row.provenance
    parent = (row.provenance or {}).get("parent")
    return Row(
        split=split,
        line=number,
        id=row.id,
        tokens=tuple(row.tokens),
        head=_span("head", row.head, len(row.tokens)),
        tail=_span("tail", row.tail, len(row.tokens)),
        label=row.label,
        image=row.image,
        parent=parent if isinstance(parent, str) else None,
        extras=extras,
        is_json=True,
    )


def _row_from_mnre(line: str, split: str, number: int) -> Row:
    row = mnre.row_from_line(line)
    fields = ast.literal_eval(line.strip())
    extras = {str(key): value for key, value in fields.items() if key not in _MNRE_KEYS}
    for side in ("h", "t"):
        extras |= {f"{side}.{key}": value for key, value in fields[side].items() if key not in _MENTION_KEYS}
    length = len(row.tokens)
    return Row(
        split=split,
        line=number,
        id=None,
        tokens=row.tokens,
        head=_span("head", row.head, length),
        tail=_span("tail", row.tail, length),
        label=row.relation,
        image=row.image,
        parent=None,
        extras=extras,
        is_json=False,
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start}); expected JSONL or MNRE rows; "
            "convert it to UTF-8, or pass another file"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a file of samples, JSONL or MNRE; check the path"
        ) from error


def read_rows(path: Path, split: str, *, skip_bad: bool = False) -> tuple[list[Row], list[BadRow]]:
    """Read a file of samples, our JSONL or MNRE's dict literals, told apart row by row.

    Args:
        path: the file, UTF-8, one row a line; blank lines are passed over.
        split: the name of the split that it is.
        skip_bad: return bad rows apart instead of refusing the file.

    Returns:
        The good rows, and the bad ones.

    Raises:
        DataError: the file cannot be read, holds no row, or has a bad one or an id twice (and `skip_bad` is off).
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            read = _row_from_json if line.lstrip().startswith('{"') else _row_from_mnre
            row = read(line, split, number)
            if row.id is not None and row.id in seen:
                raise ValueError(f"id {row.id!r} stands in line {seen[row.id]} already; expected unique ids")
        except ValueError as error:
            if not skip_bad:
                raise DataError(
                    f"{path}, line {number}: {error}; correct the row, or pass --skip-bad to leave bad rows out"
                ) from error
            bad.append(BadRow(number, str(error)))
            continue
        if row.id is not None:
            seen[row.id] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no samples in it; expected at least one JSONL or MNRE row; pass another file")
    return rows, bad
