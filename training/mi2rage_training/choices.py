"""Names from the command line, one of a few."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from mi2rage_engines.errors import InputError

__all__ = ["choice"]

E = TypeVar("E", bound=StrEnum)


def choice(kind: type[E], name: str, subject: str) -> E:
    """The member of `kind` that is called `name`.

    Raises:
        InputError: there is none; the message lists what there is.
    """
    try:
        return kind(name)
    except ValueError as error:
        raise InputError(f"{subject}: came {name!r}; expected one of: {', '.join(kind)}") from error
