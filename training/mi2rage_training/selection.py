"""Which candidates the student sees: a policy's choice, within limits for each sentence and each label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.files import atomic_bytes, check_absent
from mi2rage_training.embeddings import caption_similarity, clip_similarity, made_embeddings
from mi2rage_training.policies import Decision, Policy, PolicyConfig, Table, decide, posterior_weights
from mi2rage_training.store import Candidate, StoreManifest, StoreWriter, read_manifest, read_store
from mi2rage_training.teacher import TeacherConfig, TeacherScores, fit_teachers
from mi2rage_training.teacher_folder import save_teachers

__all__ = ["SCORES_NAME", "Selection", "SelectionConfig", "select", "table_from_candidates"]

SCORES_NAME = "scores.parquet"
_SHARD_ROWS = 1024
_TAUGHT = (Policy.INFORMATION, Policy.ADDED, Policy.POSTERIOR)


@dataclasses.dataclass(frozen=True, slots=True)
class SelectionConfig:
    """What is kept, and what that is decided by.

    Attributes:
        policy: the ranking and its limits.
        teacher: how candidates are scored, where the policy asks for scores; its encoders also make the embeddings for
            diversity, and the similarity of sentence and caption.
        similarity_model: folder or hub id of a whole CLIP model, for the similarity of sentence and image; None
            compares the sentence with the image's caption.
        weighted: write weights into the store, q(y | both) among all siblings, for training; see `posterior_weights`.
        keep_teachers: folder to write the fitted teachers to, for a judge inside a later chain; None keeps none.
    """

    policy: PolicyConfig = dataclasses.field(default_factory=lambda: PolicyConfig(Policy.ADDED, per_parent=2))
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    similarity_model: str | None = None
    keep_teachers: Path | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.weighted and self.policy.policy not in _TAUGHT:
            raise InputError(
                f"weights: asked for with the policy {self.policy.policy.value}; expected one that fits teachers "
                f"({', '.join(_TAUGHT)}); take one of these, or ask for none"
            )
        if self.keep_teachers is not None and self.policy.policy not in _TAUGHT:
            raise InputError(
                f"teachers: to be kept with the policy {self.policy.policy.value}; expected one that fits some "
                f"({', '.join(_TAUGHT)}); leave the folder out, or take one of these"
            )
        if self.similarity_model is not None and self.policy.policy is not Policy.SIMILARITY:
            raise InputError(
                f"similarity model: came {self.similarity_model!r} with the policy {self.policy.policy.value}; "
                f"expected it with {Policy.SIMILARITY.value} only; leave it out, or take that policy"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What `select` did.

    Attributes:
        manifest: of the store of kept candidates.
        scores: of all candidates, or None where the policy asks for no teacher.
        kept: bool (N,).
        reasons: why each was kept or dropped, one a candidate.
        similarity: float64 (N,), or None where the policy asks for none.
        weights: see `posterior_weights`, float64 (N,), or None without a teacher.
    """

    manifest: StoreManifest
    scores: TeacherScores | None
    kept: NDArray[np.bool_]
    reasons: tuple[str, ...] = ()
    similarity: NDArray[np.float64] | None = None
    weights: NDArray[np.float64] | None = None


def table_from_candidates(
    candidates: Sequence[Candidate],
    *,
    scores: TeacherScores | None = None,
    similarity: NDArray[np.float64] | None = None,
    embeddings: NDArray[np.float32] | None = None,
) -> Table:
    """What policies see of some candidates.

    Raises:
        DataError: a candidate has no label.
    """
    for candidate in candidates:
        if candidate.sample.label is None:
            raise DataError(
                f"candidate {candidate.sample.id}: came without a label; expected one; make the store again"
            )
    return Table(
        ids=np.array([candidate.sample.id for candidate in candidates]),
        parents=np.array([candidate.provenance.parent for candidate in candidates]),
        labels=np.array([str(candidate.sample.label) for candidate in candidates]),
        links=np.array([candidate.provenance.link for candidate in candidates], np.int64),
        information_nats=None if scores is None else scores.information_nats,
        added_nats=None if scores is None else scores.added_nats,
        similarity=similarity,
        embeddings=embeddings,
    )


def _table(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[Table, TeacherScores | None]:
    """Computes what the policy asks for, and nothing else."""
    policy, fit, device = config.policy, config.teacher.fit, config.teacher.device
    scores = similarity = embeddings = None
    if policy.policy is Policy.SIMILARITY and config.similarity_model is not None:
        similarity = clip_similarity(candidates, config.similarity_model, device)
    elif policy.policy is Policy.SIMILARITY:
        similarity = caption_similarity(candidates, fit.text_encoder, fit.max_length, device)
    if policy.policy in _TAUGHT:
        teachers, scores = fit_teachers(candidates, config.teacher)
        if config.keep_teachers is not None:
            save_teachers(teachers, config.keep_teachers)
    if policy.covers:
        embeddings = made_embeddings(candidates, fit, device)
    table = table_from_candidates(candidates, scores=scores, similarity=similarity, embeddings=embeddings)
    return table, scores


def _write_scores(
    path: Path,
    candidates: Sequence[Candidate],
    table: Table,
    decision: Decision,
    weights: NDArray[np.float64] | None,
) -> None:
    optional = {
        "information_nats": table.information_nats,
        "added_nats": table.added_nats,
        "similarity": table.similarity,
        "weight": weights,
    }
    nothing = pa.nulls(len(candidates), pa.float64())
    columns = {
        "id": table.ids,
        "parent": table.parents,
        "link": pa.array(table.links, pa.int32()),
        "child": pa.array([candidate.provenance.child for candidate in candidates], pa.int32()),
        "label": table.labels,
        **{name: nothing if values is None else values for name, values in optional.items()},
        "kept": decision.kept,
        "reason": list(decision.reasons),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    atomic_bytes(path, buffer.getvalue().to_pybytes())


def _scored(
    candidate: Candidate, scores: TeacherScores | None, weights: NDArray[np.float64] | None, row: int
) -> Candidate:
    if scores is None:
        return candidate
    information, added = float(scores.information_nats[row]), float(scores.added_nats[row])
    weight = None if weights is None else float(weights[row])
    return dataclasses.replace(candidate, information_nats=information, added_nats=added, weight=weight)


def select(store: Path, out: Path, config: SelectionConfig) -> Selection:
    """Decide on the candidates of `store` and write the kept ones, with their scores, as the store `out`.

    `out/scores.parquet` has a row for every candidate: id, parent, link, child, label, both scores in nats, similarity
    and posterior weight (each null where the policy asked for none), kept or not, and the reason.

    Raises:
        DataError: `store` is empty, unfinished or damaged, or lacks what the policy needs (sentences enough for the
            folds, captions).
        InputError: `out` holds something else.
    """
    source = read_manifest(store)
    candidates = list(read_store(store))
    if not candidates:
        raise DataError(f"{store}: holds no candidates; nothing to select from")
    settings = {
        "step": "select",
        "source": source.model_dump(mode="json")["shards"],
        "config": dataclasses.asdict(dataclasses.replace(config, keep_teachers=None)),
    }
    if config.keep_teachers is not None:
        check_absent(config.keep_teachers, force=False)
    writer = StoreWriter(out, settings)
    table, scores = _table(candidates, config)
    decision = decide(table, config.policy)
    weights = None if scores is None else posterior_weights(table)
    written = weights if config.weighted else None
    rows = [_scored(candidates[row], scores, written, row) for row in np.flatnonzero(decision.kept).tolist()]
    starts = range(0, len(rows), _SHARD_ROWS)
    for index, start in enumerate(starts):
        writer.write(index, rows[start : start + _SHARD_ROWS])
    _write_scores(out / SCORES_NAME, candidates, table, decision, weights)
    manifest = writer.finish(len(starts))
    return Selection(manifest, scores, decision.kept, decision.reasons, table.similarity, weights)
