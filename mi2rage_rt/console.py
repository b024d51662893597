"""What commands print on stdout: one JSON document, or a plain table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

__all__ = ["write_json", "write_table"]


def write_json(document: Any) -> None:
    """Print one JSON document; NaN and infinity are refused, for JSON has none."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def write_table(headers: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 60) -> None:
    """Print aligned columns; cells longer than `widest` characters are cut."""
    cells = [[_cut(" ".join(cell.split()), widest) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _cut(text: str, widest: int) -> str:
    return text if len(text) <= widest else text[: widest - 1] + "…"
