"""Everything about a row but its words, as features that a look-up or a bag-of-words model can use.

A `Column` gives each row one value; a `Bag` gives it any number of words. Both carry the field that they are made from,
so that a leak is told once for the field, not once for each of its features.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from mi2rage_training.data_check.image_files import ImageFile
from mi2rage_training.data_check.rows import Row

__all__ = ["ALL_EXTRAS", "Bag", "Column", "Role", "bags_of", "columns_of", "text_bag"]

ALL_EXTRAS = "all extra fields"
"""The field of the bag of all of them."""

BINS = 32
"""Numbers of more distinct values than this are cut at so many quantiles: sizes and positions are not names."""

MAX_COLUMNS = 120
"""Of a field that is nested deeper, the features that most rows have; the field's bag still holds all of it."""

_MAX_ITEMS = 4
"""Positions of a list that get features of their own: the leak of MNRE's objects is at the third."""

_MAX_DEPTH = 4
_MAX_WORDS = 200
_MAX_LETTERS = 80
_NAME_PARTS = 8


class Role(StrEnum):
    """Where a feature comes from."""

    EXTRA = "extra field"
    IMAGE = "image file"
    ID = "id"
    ORDER = "row order"
    TEXT = "mentions"


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One value a row, as text; rows of one value share what is learnt about it."""

    name: str
    field: str
    role: Role
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Bag:
    """Any number of words a row."""

    name: str
    field: str
    role: Role
    words: tuple[tuple[str, ...], ...]


def _describe(value: Any, path: str, out: dict[str, Any], depth: int = 0) -> None:
    """Add to `out` what can be said of a nested value: its kind, itself, its length, its parts."""
    empty = value is None or (isinstance(value, str | list | tuple | dict | set) and not value)
    out[f"{path} kind"] = "empty" if empty else type(value).__name__
    if isinstance(value, bool | int | float):
        out[path] = value
    elif isinstance(value, str):
        out[path] = value[:_MAX_LETTERS]
        out[f"{path} length"] = len(value)
    elif isinstance(value, list | tuple | set | dict) and depth < _MAX_DEPTH:
        out[f"{path} count"] = len(value)
        for name, part in _parts(value):
            _describe(part, f"{path}{name}", out, depth + 1)
        if not isinstance(value, dict):
            _describe_together(list(value), path, out)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f".{key}", part) for key, part in value.items())
    else:
        yield from ((f"[{position}]", part) for position, part in enumerate(list(value)[:_MAX_ITEMS]))


def _describe_together(items: Sequence[Any], path: str, out: dict[str, Any]) -> None:
    """The items of a list as a set, so that their order does not hide what they say together."""
    collected: dict[str, set[str]] = {}
    for item in items:
        for key, part in item.items() if isinstance(item, dict) else [("", item)]:
            if isinstance(part, str | bool | int | float):
                collected.setdefault(f".{key}" if key else "", set()).add(str(part))
    for key, parts in collected.items():
        out[f"{path}[]{key} together"] = "|".join(sorted(parts))[: 2 * _MAX_LETTERS]


def _texts(raw: Sequence[Any]) -> tuple[str, ...]:
    """Values as text; where all are numbers and many, the number of their quantile."""
    numbers = [value for value in raw if value is not None]
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    if not is_number or len(set(numbers)) <= BINS:
        return tuple("absent" if value is None else str(value) for value in raw)
    edges = np.unique(np.quantile(np.array(numbers, np.float64), np.linspace(0, 1, BINS + 1)[1:-1]))
    return tuple("absent" if value is None else f"bin {int(np.searchsorted(edges, value, 'right'))}" for value in raw)


def _columns(field: str, role: Role, described: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of one field, the most covered ones; without constants and without those equal to another."""
    coverage = Counter(name for row in described for name in row)
    columns: dict[tuple[str, ...], Column] = {}
    for name, _ in coverage.most_common(MAX_COLUMNS):
        values = _texts([row.get(name) for row in described])
        if len(set(values)) > 1:
            columns.setdefault(values, Column(name, field, role, values))
    return list(columns.values())


def _name_facts(kind: str, name: str | None) -> dict[str, Any]:
    """What a file name or an id says by its form: its pattern, its length, its parts."""
    if name is None:
        return {f"{kind} kind": "absent"}
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", name) if part]
    facts: dict[str, Any] = {f"{kind} pattern": re.sub(r"\d+", "0", name), f"{kind} length": len(name)}
    for position, part in enumerate(parts[:_NAME_PARTS]):
        facts[f"{kind} part {position + 1}"] = int(part) if re.fullmatch(r"[0-9]{1,18}", part) else part
    return facts


def _file_facts(file: ImageFile | None) -> dict[str, Any]:
    if file is None:
        return {}
    return {
        "image bytes": file.size_bytes,
        "image width": file.width_px,
        "image height": file.height_px,
        "image shape": f"{file.width_px}x{file.height_px}",
    }


def _mention_facts(row: Row) -> dict[str, Any]:
    head, tail = row.mention(row.head), row.mention(row.tail)
    return {
        "head string": head,
        "tail string": tail,
        "head and tail string": f"{head} | {tail}",
        "head position": row.head[0],
        "tail position": row.tail[0],
        "distance of the mentions": row.tail[0] - row.head[0],
        "words in the sentence": len(row.tokens),
    }


def columns_of(rows: Sequence[Row], files: Mapping[str, ImageFile]) -> list[Column]:
    """Every one-valued feature of the rows.

    Args:
        rows: the rows, of all splits, in the order of their files.
        files: the image files by name, where there are some.
    """
    columns: list[Column] = []
    for field in sorted({name for row in rows for name in row.extras}):
        described: list[dict[str, Any]] = []
        for row in rows:
            described.append({})
            if field in row.extras:
                _describe(row.extras[field], field, described[-1])
        columns += _columns(field, Role.EXTRA, described)
    columns += _columns("image name", Role.IMAGE, [_name_facts("image name", row.image) for row in rows])
    columns += _columns("image file", Role.IMAGE, [_file_facts(files.get(row.image or "")) for row in rows])
    columns += _columns("id", Role.ID, [_name_facts("id", row.id) for row in rows])
    columns += _columns("row order", Role.ORDER, [{"line": row.line, "split": row.split} for row in rows])
    return columns + _columns("mentions", Role.TEXT, [_mention_facts(row) for row in rows])


def _leaf_words(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaf_words(part, f"{path}.{key}")
    elif isinstance(value, list | tuple | set):
        yield f"{path} count={len(value)}"
        for part in value:
            yield from _leaf_words(part, f"{path}[]")
    elif isinstance(value, str):
        yield from (f"{path}={word}" for word in value.lower().split())
    else:
        yield f"{path}={value}"


def bags_of(rows: Sequence[Row]) -> list[Bag]:
    """The words of each nested or worded extra field, of all extra fields together, and of the image names."""
    names = sorted({name for row in rows for name in row.extras})
    by_field = {
        name: tuple(
            tuple(_leaf_words(row.extras[name], name))[:_MAX_WORDS] if name in row.extras else (f"{name} absent",)
            for row in rows
        )
        for name in names
    }
    bags = [Bag(f"{name} words", name, Role.EXTRA, words) for name, words in by_field.items()]
    if len(names) > 1:
        together = tuple(tuple(word for words in row for word in words) for row in zip(*by_field.values(), strict=True))
        bags.append(Bag("all extra fields together", ALL_EXTRAS, Role.EXTRA, together))
    if any(row.image for row in rows):
        parts = tuple(tuple(re.findall(r"[a-z]+|\d+", (row.image or "").lower())) for row in rows)
        bags.append(Bag("image name parts", "image name", Role.IMAGE, parts))
    return bags


def _shape(word: str) -> str:
    return re.sub("[A-Z]+", "A", re.sub("[a-z]+", "a", re.sub("[0-9]+", "0", word)))


def _mention_words(row: Row, side: str, span: tuple[int, int], low: Sequence[str]) -> Iterator[str]:
    """Words, form, neighbours, first and last letters of a mention: what stands in for its entity type."""
    start, end = span
    yield f"{side}shape={' '.join(map(_shape, row.tokens[start:end]))}"
    yield f"{side}name={' '.join(low[start:end])}"
    yield f"{side}left={low[start - 1] if start else '^'}"
    yield f"{side}right={low[end] if end < len(low) else '$'}"
    for word in low[start:end]:
        yield from (f"{side}={word}", f"{side}first={word[:3]}", f"{side}last={word[-3:]}")


def text_bag(rows: Sequence[Row]) -> Bag:
    """What the sentence and its marked mentions say, for the text baseline."""
    words = []
    for row in rows:
        low = [token.lower() for token in row.tokens]
        bag = [f"w={word}" for word in low]
        for side, span in (("head", row.head), ("tail", row.tail)):
            bag += _mention_words(row, side, span, low)
        first, second = sorted((row.head, row.tail))
        bag += [f"between={word}" for word in low[first[1] : second[0]]]
        distance = row.tail[0] - row.head[0]
        bag += [f"distance={distance}", f"far={distance // 4}", f"tail first={distance < 0}"]
        bag += [f"head at={row.head[0]}", f"tail at={row.tail[0]}"]
        words.append(tuple(bag))
    return Bag("text", "text", Role.TEXT, tuple(words))
