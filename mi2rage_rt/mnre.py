"""The row format of MNRE and MNRE-2: one Python dict literal a line (not JSON).

Source: Zheng et al., *MNRE: A Challenge Multimodal Dataset for Neural Relation Extraction with
Visual Evidence in Social Media Posts* (ICME 2021) and its second version, MNRE-2.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

__all__ = ["MnreRow", "row_from_line"]


@dataclasses.dataclass(frozen=True, slots=True)
class MnreRow:
    """What a row says: tokens, the two `(start, end)` spans (end exclusive), image file and relation."""

    tokens: tuple[str, ...]
    head: tuple[int, int]
    tail: tuple[int, int]
    image: str | None
    relation: str | None


def _entity(row: dict[str, Any], key: str, tokens: list[str]) -> tuple[int, int]:
    entity = row.get(key)
    if not isinstance(entity, dict) or "pos" not in entity:
        raise ValueError(f"'{key}' is {entity!r}: expected {{'name': str, 'pos': [start, end]}}")
    position = entity["pos"]
    if (
        not isinstance(position, list | tuple)
        or len(position) != 2
        or not all(isinstance(offset, int) for offset in position)
    ):
        raise ValueError(f"'{key}' has pos {position!r}: expected two integers [start, end]")
    start, end = position
    name = entity.get("name")
    if name is not None and 0 <= start < end <= len(tokens) and " ".join(tokens[start:end]) != name:
        raise ValueError(
            f"'{key}' is named {name!r}, but its tokens [{start}, {end}] read {' '.join(tokens[start:end])!r}"
        )
    return start, end


def row_from_line(line: str) -> MnreRow:
    """Parse one row; extra keys (`caption`, `entity`, ...) are ignored.

    Raises:
        ValueError: the line is no dict literal, or a key is missing or of the wrong kind.
    """
    try:
        row = ast.literal_eval(line.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"not an MNRE row: expected a Python dict literal or a JSON object, got {line.strip()[:60]!r}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"not an MNRE row: expected a dict, got {type(row).__name__}")
    tokens = row.get("token")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"'token' is {tokens!r}: expected a non-empty list of words")
    for key in ("img_id", "relation"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise ValueError(f"'{key}' is {row[key]!r}: expected a string")
    return MnreRow(
        tokens=tuple(tokens),
        head=_entity(row, "h", tokens),
        tail=_entity(row, "t", tokens),
        image=row.get("img_id"),
        relation=row.get("relation"),
    )
