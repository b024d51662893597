"""Teachers for stores that are too large for memory: fitted on the candidates of some real samples, they score all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import steps
from mi2rage_training.ranking import Table
from mi2rage_training.store import Candidate, Candidates, StoredCandidates
from mi2rage_training.teacher import TeacherConfig, Teachers, TeacherScores, fit_teachers, label_entropy_nats

__all__ = ["LogProbabilities", "Scorer", "chosen_parents", "fit_teachers_on_some", "joined", "score_some"]

_BATCH = 1024

LogProbabilities = tuple[NDArray[np.float64], NDArray[np.float64]]
"""log q(. | both) and log q(. | real modality), each (N, labels)."""
Scorer = Callable[[Teachers], LogProbabilities]
"""Has fitted teachers score every candidate, in order."""


def chosen_parents(known: Table, count: int, folds: int, seed: int) -> frozenset[str]:
    """Some parents, drawn by the key (seed, parent), and of each label as many as there are folds, if it has them."""
    parents, first = np.unique(known.parents, return_index=True)
    drawn = sorted(
        (seed_from("fit on", seed, parent), parent, label)
        for parent, label in zip(parents.tolist(), known.labels[first].tolist(), strict=True)
    )
    of_label: dict[str, int] = {}
    turns = []
    for key, parent, label in drawn:
        of_label[label] = of_label.get(label, 0) + 1
        turns.append((of_label[label] > folds, key, parent))
    return frozenset(parent for _, _, parent in sorted(turns)[:count])


def fit_teachers_on_some(
    candidates: Candidates, known: Table, config: TeacherConfig, count: int, scorer: Scorer | None = None
) -> tuple[Teachers, TeacherScores]:
    """Fit the teachers on all candidates of `count` parents, and score every candidate; only those are in memory.

    No teacher scores what it saw, as with `fit_teachers`, for folds are by parent. Temperatures and calibration errors
    are those of the candidates that the teachers were fitted on; the other candidates have the weight 0.

    Args:
        candidates: gone through twice, with their images.
        known: of the same, in the same order.
        scorer: scores them elsewhere; None scores them here.

    Raises:
        DataError: as `fit_teachers`; or a label has no candidate among those that are fitted on.
    """
    chosen = chosen_parents(known, count, config.folds, config.fit.seed)
    if len(chosen) == len(np.unique(known.parents)):
        return fit_teachers(list(candidates), config)
    _refuse_unseen_labels(known, chosen)
    teachers, fitted = fit_teachers([row for row in candidates if row.provenance.parent in chosen], config)
    log_both, log_single = _score_here(teachers, candidates) if scorer is None else scorer(teachers)
    labels = {label: index for index, label in enumerate(teachers.labels)}
    gold = np.array([labels[label] for label in known.labels.tolist()])
    each = np.arange(len(gold))
    entropy = _entropy(known)
    weights = np.zeros(len(gold))
    weights[_of(known, chosen)] = fitted.weights
    scores = TeacherScores(
        log_both[each, gold] + entropy,
        log_both[each, gold] - log_single[each, gold],
        entropy,
        weights,
        np.exp(log_both),
        fitted.labels,
        fitted.temperatures,
        fitted.calibration_error_before,
        fitted.calibration_error,
    )
    return teachers, scores


def _score_here(teachers: Teachers, candidates: Candidates) -> LogProbabilities:
    """As `Teachers.log_probabilities`, a shard at a time where they are stored."""
    shards = candidates.by_shard() if isinstance(candidates, StoredCandidates) else [candidates]
    found: list[LogProbabilities] = []
    with steps("score", len(candidates)) as bar:
        for shard in shards:
            found.append(score_some(teachers, shard))
            bar.advance(len(found[-1][0]))
    return joined(found)


def score_some(teachers: Teachers, candidates: Iterable[Candidate]) -> LogProbabilities:
    """As `Teachers.log_probabilities`, a batch at a time; the same batches give the same bits."""
    nothing = np.zeros((0, len(teachers.labels)))
    rows, found = iter(candidates), [(nothing, nothing)]
    while batch := list(itertools.islice(rows, _BATCH)):
        found.append(teachers.log_probabilities(batch))
        del batch  # before the next is read
    return joined(found)


def joined(parts: Sequence[LogProbabilities]) -> LogProbabilities:
    """One after the other; at least one."""
    return np.concatenate([both for both, _ in parts]), np.concatenate([single for _, single in parts])


def _of(known: Table, parents: AbstractSet[str]) -> NDArray[np.bool_]:
    return np.array([parent in parents for parent in known.parents.tolist()])


def _refuse_unseen_labels(known: Table, chosen: AbstractSet[str]) -> None:
    unseen = np.setdiff1d(known.labels, known.labels[_of(known, chosen)])
    if len(unseen):
        raise DataError(
            f"{len(chosen)} real samples to fit teachers on: none has the label {unseen[0]!r}; expected some of each; "
            "give a larger --fit-on"
        )


def _entropy(known: Table) -> float:
    """H(Y) over the real samples."""
    first = np.unique(known.parents, return_index=True)[1]
    return label_entropy_nats(known.labels[first].tolist())
