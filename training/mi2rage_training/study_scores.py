"""The teachers' scores of a store in a file, so that a study that was killed need not make them again."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_rt.files import atomic_bytes
from mi2rage_training.teacher import TeacherScores

__all__ = ["read_scores", "write_scores"]

_FIELDS = tuple(field.name for field in dataclasses.fields(TeacherScores))
_TUPLES = ("labels", "temperatures")


def write_scores(path: Path, scores: TeacherScores) -> None:
    """Write `scores` as an .npz file, whole or not at all."""
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: np.asarray(getattr(scores, name)) for name in _FIELDS}
    np.savez(buffer, **columns)
    atomic_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> TeacherScores:
    """Read what `write_scores` wrote; no pickle is read."""
    with np.load(path, allow_pickle=False) as file:
        found: dict[str, Any] = {name: file[name] for name in _FIELDS}
    for name, value in found.items():
        if name in _TUPLES:
            found[name] = tuple(value.tolist())
        elif value.ndim == 0:
            found[name] = value.item()
    return TeacherScores(**found)
