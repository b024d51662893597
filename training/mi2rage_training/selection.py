"""Which candidates the student sees: a policy's choice, within limits for each sentence and each label.

The store is gone through several times, one shard in memory: for what is known of every candidate but its images, for
the images where they are looked at, and for what is kept. Held are ids, labels and scores of every candidate; policies
that cover, the vectors of all; teachers, the encoded images of what they are fitted on (`SelectionConfig.fit_on`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.files import check_absent
from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_training.embeddings import caption_similarity, clip_similarity, made_embeddings, made_kind
from mi2rage_training.policies import Decision, Policy, PolicyConfig, Table, decide, posterior_weights
from mi2rage_training.score_cluster import score_on_cluster
from mi2rage_training.store import (
    Candidate,
    StoredCandidates,
    StoreManifest,
    StorePlace,
    StoreWriter,
    read_columns,
    read_manifest,
    read_tables,
)
from mi2rage_training.store_rows import bytes_from_table
from mi2rage_training.teacher import TeacherConfig, Teachers, TeacherScores, fit_teachers
from mi2rage_training.teacher_folder import is_teachers, keep_teachers
from mi2rage_training.teacher_sample import fit_teachers_on_some

__all__ = ["SCORES_NAME", "Selection", "SelectionConfig", "select", "table_from_candidates"]

SCORES_NAME = "scores.parquet"
_SHARD_ROWS = 1024
_SHARD_BYTES = 128 << 20
_PIECE_ROWS = 64
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
        fit_on: how many real samples' candidates the teachers are fitted on at most; None for all. All are scored.
    """

    policy: PolicyConfig = dataclasses.field(default_factory=lambda: PolicyConfig(Policy.ADDED, per_parent=2))
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    similarity_model: str | None = None
    keep_teachers: Path | None = None
    weighted: bool = False
    fit_on: int | None = None

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
        if self.fit_on is not None and (self.fit_on < 1 or self.policy.policy not in _TAUGHT):
            raise InputError(
                f"fit on: came {self.fit_on} with the policy {self.policy.policy.value}; expected 1 or more real "
                f"samples, and a policy that fits teachers ({', '.join(_TAUGHT)}); leave it out, or give such"
            )
        if self.similarity_model is not None and self.policy.policy is not Policy.SIMILARITY:
            raise InputError(
                f"similarity model: came {self.similarity_model!r} with the policy {self.policy.policy.value}; "
                f"expected it with {Policy.SIMILARITY.value} only; leave it out, or take that policy"
            )

    def described(self) -> dict[str, Any]:
        """What decides on the outcome; what was not there in earlier releases is left out where it is off."""
        found = dataclasses.asdict(dataclasses.replace(self, keep_teachers=None))
        return {name: value for name, value in found.items() if name != "fit_on" or value is not None}


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
            raise _unlabelled(candidate.sample.id)
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


def _unlabelled(name: str) -> DataError:
    return DataError(f"candidate {name}: came without a label; expected one; make the store again")


def _known(store: StorePlace) -> tuple[Table, NDArray[np.int32]]:
    """What is known of a store's candidates before any is scored, and the number of each as a child."""
    columns = pa.concat_tables(read_columns(store, ("id", "parent", "label", "link", "child")))
    if columns["label"].null_count:
        raise _unlabelled(columns["id"][columns["label"].to_pylist().index(None)].as_py())
    ids, parents, labels = (np.array(columns[name].to_pylist()) for name in ("id", "parent", "label"))
    table = Table(ids, parents, labels, columns["link"].to_numpy().astype(np.int64))
    return table, columns["child"].to_numpy()


def _scored(
    candidates: StoredCandidates, known: Table, config: SelectionConfig, pool: PoolOptions | None
) -> tuple[Table, TeacherScores | None, Teachers | None]:
    """Computes what the policy asks for, and nothing else."""
    policy, fit, device = config.policy, config.teacher.fit, config.teacher.device
    words = candidates.without_images()
    teachers = scores = similarity = embeddings = None
    if policy.policy is Policy.SIMILARITY and config.similarity_model is not None:
        similarity = clip_similarity(candidates, config.similarity_model, device)
    elif policy.policy is Policy.SIMILARITY:
        similarity = caption_similarity(words, fit.text_encoder, fit.max_length, device)
    if policy.policy in _TAUGHT:
        teachers, scores = (
            fit_teachers(list(candidates), config.teacher)
            if config.fit_on is None
            else fit_teachers_on_some(
                candidates,
                known,
                config.teacher,
                config.fit_on,
                None if pool is None else functools.partial(score_on_cluster, place=candidates.place, pool=pool),
            )
        )
    if policy.covers:
        embeddings = made_embeddings(candidates if made_kind(words) == "image" else words, fit, device)
    table = dataclasses.replace(
        known,
        information_nats=None if scores is None else scores.information_nats,
        added_nats=None if scores is None else scores.added_nats,
        similarity=similarity,
        embeddings=embeddings,
    )
    return table, scores, teachers


def _bytes_of_scores(
    table: Table, children: NDArray[np.int32], decision: Decision, weights: NDArray[np.float64] | None
) -> bytes:
    optional = {
        "information_nats": table.information_nats,
        "added_nats": table.added_nats,
        "similarity": table.similarity,
        "weight": weights,
    }
    nothing = pa.nulls(len(table), pa.float64())
    columns = {
        "id": table.ids,
        "parent": table.parents,
        "link": pa.array(table.links, pa.int32()),
        "child": pa.array(children, pa.int32()),
        "label": table.labels,
        **{name: nothing if values is None else values for name, values in optional.items()},
        "kept": decision.kept,
        "reason": list(decision.reasons),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def _kept(
    store: StorePlace, kept: NDArray[np.bool_], scores: TeacherScores | None, weights: NDArray[np.float64] | None
) -> Iterator[pa.Table]:
    """The rows that are kept, some at a time, with their scores where there are any."""
    nothing = np.full(len(kept), None) if weights is None else weights
    end = 0
    for table in read_tables(store):
        start, end = end, end + len(table)
        rows = start + np.flatnonzero(kept[start:end])
        chosen = table.take(rows - start)
        if scores is not None:
            columns = {"information_nats": scores.information_nats, "added_nats": scores.added_nats, "weight": nothing}
            for name, values in columns.items():
                place = chosen.schema.get_field_index(name)
                chosen = chosen.set_column(place, name, pa.array(values[rows], pa.float64()))
        for first in range(0, len(chosen), _PIECE_ROWS):
            yield chosen.slice(first, _PIECE_ROWS)


def _shards(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of each shard: so many and hardly more, or fewer with so many bytes."""
    found: list[pa.Table] = []
    rows = size = 0
    for piece in pieces:
        found.append(piece)
        rows, size = rows + len(piece), size + piece.nbytes
        if rows >= _SHARD_ROWS or size >= _SHARD_BYTES:
            yield pa.concat_tables(found)
            found, rows, size = [], 0, 0
    if found:
        yield pa.concat_tables(found)


def select(store: StorePlace, out: StorePlace, config: SelectionConfig, pool: PoolOptions | None = None) -> Selection:
    """Decide on the candidates of `store` and write the kept ones, with their scores, as the store `out`.

    `out/scores.parquet` has a row for every candidate: id, parent, link, child, label, both scores in nats, similarity
    and posterior weight (each null where the policy asked for none), kept or not, and the reason.

    Args:
        store, out: folders or addresses, see `store_files`.
        pool: workers that score the candidates where `config.fit_on` is given; None scores them here.

    Raises:
        DataError: `store` is empty, unfinished or damaged, or lacks what the policy needs (sentences enough for the
            folds, captions).
        InputError: `out` holds something else; or there is a `pool`, and nothing for it to do.
    """
    if pool is not None and config.fit_on is None:
        raise InputError(
            "--ray: came without --fit-on; expected it, for workers score what teachers were not fitted on; give the "
            "number of real samples to fit them on, or leave --ray out"
        )
    source, candidates = read_manifest(store), StoredCandidates(store)
    if not len(candidates):
        raise DataError(f"{store}: holds no candidates; nothing to select from")
    shards = source.model_dump(mode="json")["shards"]
    writer = StoreWriter(out, {"step": "select", "source": shards, "config": config.described()})
    if config.keep_teachers is not None and not is_teachers(config.keep_teachers):
        check_absent(config.keep_teachers)
    known, children = _known(store)
    table, scores, teachers = _scored(candidates, known, config, pool)
    if teachers is not None and config.keep_teachers is not None:
        keep_teachers(teachers, config.keep_teachers)
    decision = decide(table, config.policy)
    weights = None if scores is None else posterior_weights(table)
    written = weights if config.weighted else None
    count = 0
    for count, rows in enumerate(_shards(_kept(store, decision.kept, scores, written)), 1):
        writer.put(count - 1, bytes_from_table(rows), len(rows))
    writer.files.write(SCORES_NAME, _bytes_of_scores(table, children, decision, weights))
    return Selection(writer.finish(count), scores, decision.kept, decision.reasons, table.similarity, weights)
