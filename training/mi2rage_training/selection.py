"""Which candidates the student sees: the best by the teacher, within limits for each sentence and each label."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.files import atomic_bytes
from mi2rage_training.store import Candidate, StoreManifest, StoreWriter, read_manifest, read_store
from mi2rage_training.teacher import TeacherConfig, TeacherScores, score_candidates

__all__ = ["Score", "Selection", "SelectionConfig", "choose", "select"]

SCORES_NAME = "scores.parquet"
_SHARD_ROWS = 1024


class Score(StrEnum):
    """What candidates are ranked by."""

    INFORMATION = "information"
    ADDED = "added"


@dataclasses.dataclass(frozen=True, slots=True)
class SelectionConfig:
    """What is kept.

    Attributes:
        score: `information` (log q(y | text, image) + H(Y)) or `added` (what the image adds to the sentence).
        per_parent: the most candidates kept of one real sentence.
        keep: share (0 to 1] of each label's candidates kept, after that limit; a quota by label, since otherwise the
            rich labels win.
        teacher: how the scores are made.
    """

    score: Score = Score.ADDED
    per_parent: int = 2
    keep: float = 1.0
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        if self.per_parent < 1:
            raise InputError(f"per-parent limit: came {self.per_parent}; expected 1 or more")
        if not 0 < self.keep <= 1:
            raise InputError(f"share to keep: came {self.keep}; expected more than 0 and at most 1")


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What `select` did: the manifest of the kept candidates, all scores, and which were kept (bool (N,))."""

    manifest: StoreManifest
    scores: TeacherScores
    kept: NDArray[np.bool_]


def choose(candidates: Sequence[Candidate], ranking: NDArray[np.float64], config: SelectionConfig) -> NDArray[np.bool_]:
    """Mark the candidates to keep; ties go to the earlier one.

    Args:
        ranking: float64 (N,), higher is better.

    Returns:
        bool (N,); every label of the candidates keeps at least one.
    """
    order = np.argsort(-ranking, kind="stable")
    taken: dict[str, int] = defaultdict(int)
    by_label: dict[str | None, list[int]] = defaultdict(list)
    for row in order.tolist():
        parent = candidates[row].provenance.parent
        if taken[parent] < config.per_parent:
            taken[parent] += 1
            by_label[candidates[row].sample.label].append(row)
    kept = np.zeros(len(candidates), bool)
    for rows in by_label.values():
        kept[rows[: math.ceil(config.keep * len(rows))]] = True
    return kept


def _write_scores(path: Path, candidates: Sequence[Candidate], scores: TeacherScores, kept: NDArray[np.bool_]) -> None:
    table = pa.table(
        {
            "id": [candidate.sample.id for candidate in candidates],
            "parent": [candidate.provenance.parent for candidate in candidates],
            "link": pa.array([candidate.provenance.link for candidate in candidates], pa.int32()),
            "label": [candidate.sample.label for candidate in candidates],
            "information_nats": scores.information_nats,
            "added_nats": scores.added_nats,
            "kept": kept,
        }
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    atomic_bytes(path, buffer.getvalue().to_pybytes())


def select(store: Path, out: Path, config: SelectionConfig) -> Selection:
    """Score the candidates of `store` and write the kept ones, with their scores, as the store `out`.

    `out/scores.parquet` has a row for every candidate: id, parent, link, label, both scores in nats, kept or not.

    Raises:
        DataError: `store` is empty, unfinished or damaged, or has too few sentences for the folds.
        InputError: `out` holds something else.
    """
    source = read_manifest(store)
    candidates = list(read_store(store))
    if not candidates:
        raise DataError(f"{store}: holds no candidates; nothing to select from")
    settings = {
        "step": "select",
        "source": source.model_dump(mode="json")["shards"],
        "config": dataclasses.asdict(config),
    }
    writer = StoreWriter(out, settings)
    scores = score_candidates(candidates, config.teacher)
    ranking = scores.added_nats if config.score is Score.ADDED else scores.information_nats
    kept = choose(candidates, ranking, config)
    rows = [
        dataclasses.replace(
            candidates[row],
            information_nats=float(scores.information_nats[row]),
            added_nats=float(scores.added_nats[row]),
        )
        for row in np.flatnonzero(kept)
    ]
    starts = range(0, len(rows), _SHARD_ROWS)
    for index, start in enumerate(starts):
        writer.write(index, rows[start : start + _SHARD_ROWS])
    _write_scores(out / SCORES_NAME, candidates, scores, kept)
    return Selection(writer.finish(len(starts)), scores, kept)
