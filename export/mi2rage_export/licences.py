"""What a model's own card says of its licence."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["UNKNOWN", "licence_of"]

UNKNOWN = "unknown"
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENCE = re.compile(r"^license:\s*[\"']?([^\"'\s#]+)", re.MULTILINE)


def licence_of(folder: Path | str | None) -> str:
    """The `license` in the front matter of a model folder's README.md (its hub card), or `unknown`.

    Args:
        folder: of the model; None where it has none on this disk.
    """
    if folder is None:
        return UNKNOWN
    card = Path(folder) / "README.md"
    try:
        front = _FRONT_MATTER.search(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return UNKNOWN
    found = _LICENCE.search(front.group(1)) if front else None
    return found.group(1) if found else UNKNOWN
