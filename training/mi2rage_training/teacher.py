"""The teacher: how much information about the label each candidate carries, in nats.

The Barber-Agakov bound (*The IM Algorithm*, NIPS 2003): I(X; Y) >= H(Y) + E[log q(y | x)]. A candidate's share of it is
log q(y | x) + H(Y); what its made image adds to the real sentence is log q(y | text, image) - log q(y | text).
Teachers are cross-fitted: the one that scores a candidate never saw it, nor another child of the same real sentence.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.noise import seed_from
from mi2rage_training.fit import FitConfig, fit_classifier, labels_of, logits_of_pairs
from mi2rage_training.pairs import pairs_from_candidates
from mi2rage_training.store import Candidate

__all__ = ["TeacherConfig", "TeacherScores", "fold_of", "label_entropy_nats", "score_candidates"]


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherConfig:
    """Cross-fitting: `folds` teachers, each fitted as `fit` says (its `image_dropout` must be above 0)."""

    folds: int = 4
    fit: FitConfig = dataclasses.field(default_factory=lambda: FitConfig(epochs=8, image_dropout=0.3))
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(f"folds: came {self.folds}; expected 2 or more, so that no teacher scores what it saw")


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherScores:
    """Scores of candidates, in their order.

    Attributes:
        information_nats: log q(y | text, image) + H(Y), float64 (N,).
        added_nats: log q(y | text, image) - log q(y | text), float64 (N,).
        label_entropy_nats: H(Y) over the real sentences.
    """

    information_nats: NDArray[np.float64]
    added_nats: NDArray[np.float64]
    label_entropy_nats: float

    @property
    def bound_nats(self) -> float:
        """Barber-Agakov lower bound on I(text and image; label)."""
        return float(self.information_nats.mean())

    @property
    def text_bound_nats(self) -> float:
        """Barber-Agakov lower bound on I(text; label), by the same teachers."""
        return float((self.information_nats - self.added_nats).mean())


def fold_of(parent: str, folds: int, seed: int) -> int:
    """The fold of a real sentence and so of all its children."""
    return seed_from("fold", seed, parent) % folds


def label_entropy_nats(labels: Sequence[str]) -> float:
    """Empirical entropy of labels, in nats."""
    counts = Counter(labels)
    return -sum(count / len(labels) * math.log(count / len(labels)) for count in counts.values())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def score_candidates(candidates: Sequence[Candidate], config: TeacherConfig) -> TeacherScores:
    """Fit the teachers and score every candidate by the one that never saw its parent.

    Raises:
        DataError: there are too few parents for the folds, or only one label.
    """
    pairs = pairs_from_candidates(candidates)
    labels = labels_of(pairs)
    folds = np.array([fold_of(candidate.provenance.parent, config.folds, config.fit.seed) for candidate in candidates])
    if len(set(folds.tolist())) < config.folds:
        parents = len({candidate.provenance.parent for candidate in candidates})
        raise DataError(
            f"{parents} real sentences leave one of {config.folds} folds empty; give more data or fewer --folds"
        )
    log_both = np.zeros(len(pairs))
    log_text = np.zeros(len(pairs))
    for fold in range(config.folds):
        seen = [pairs[row] for row in np.flatnonzero(folds != fold)]
        held_out = np.flatnonzero(folds == fold)
        name = f"teacher {fold + 1}/{config.folds}"
        teacher = fit_classifier(seen, config.fit, labels=labels, device=config.device, description=name).classifier
        rows = [pairs[row] for row in held_out]
        gold = teacher.label_ids([pair.sample for pair in rows])
        both, text = logits_of_pairs(teacher, rows, hide_images=(False, True))
        log_both[held_out] = _log_softmax(both)[np.arange(len(rows)), gold]
        log_text[held_out] = _log_softmax(text)[np.arange(len(rows)), gold]
    by_parent = {candidate.provenance.parent: str(candidate.sample.label) for candidate in candidates}
    entropy = label_entropy_nats(list(by_parent.values()))
    return TeacherScores(log_both + entropy, log_both - log_text, entropy)
