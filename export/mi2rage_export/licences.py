"""What a model's own card says of its licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["UNKNOWN", "licence_of"]

UNKNOWN = "unknown"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def licence_of(folder: Path | str | None) -> str:
    """The `license` in the front matter of a model folder's README.md (its hub card), or `unknown`.

    Several are joined by ", "; the name and the link of one that is no standard licence stand behind it, e.g.
    `other (sai-nc-community)`.

    Args:
        folder: of the model; None where it has none on this disk.
    """
    if folder is None:
        return UNKNOWN
    try:
        front = _FRONT_MATTER.search((Path(folder) / "README.md").read_text(encoding="utf-8-sig"))
        card = yaml.safe_load(front.group(1)) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return UNKNOWN
    if not isinstance(card, dict):
        return UNKNOWN
    found = ", ".join(_words(card.get("license")))
    more = ", ".join([*_words(card.get("license_name")), *_words(card.get("license_link"))])
    if not found:
        return more or UNKNOWN
    return f"{found} ({more})" if more else found


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [" ".join(item.split()) for item in values if isinstance(item, str) and item.strip()]
