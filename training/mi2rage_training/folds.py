"""Folds of the cross-fitting, by real parent."""

from __future__ import annotations

from collections.abc import Iterable

from mi2rage_engines.errors import DataError
from mi2rage_rt.noise import seed_from

__all__ = ["fold_of", "fold_seed_for"]

_TRIES = 64


def fold_of(parent: str, folds: int, seed: int) -> int:
    """The fold of a real sample and so of all its children; it does not depend on the other samples."""
    return seed_from("fold", seed, parent) % folds


def fold_seed_for(parents: Iterable[str], folds: int, seed: int) -> int:
    """The first seed from `seed` on that leaves no fold empty; with more than a few parents that is `seed` itself.

    Raises:
        DataError: none of 64 seeds does; there are too few parents.
    """
    names = sorted(set(parents))
    for candidate in range(seed, seed + _TRIES):
        if len({fold_of(name, folds, candidate) for name in names}) == folds:
            return candidate
    raise DataError(
        f"{len(names)} real samples leave one of {folds} folds empty; expected one at least in each; give more data or "
        "fewer --folds"
    )
