"""The teacher: how much information about the label each candidate carries, in nats.

The Barber-Agakov bound (*The IM Algorithm*, NIPS 2003): I(X; Y) >= H(Y) + E[log q(y | x)]. A candidate's share of it is
log q(y | x) + H(Y); what its made modality adds to the real one is log q(y | both) - log q(y | real modality).
Teachers are cross-fitted: the one that scores a candidate never saw it, nor another child of the same real sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.noise import seed_from
from mi2rage_training.calibration import calibration_error, fit_temperature, log_softmax
from mi2rage_training.classifier_model import LoadedClassifier
from mi2rage_training.fit import FitConfig, View, fit_classifier, labels_of, logits_of_pairs
from mi2rage_training.folds import fold_of, fold_seed_for
from mi2rage_training.pairs import Pair, pairs_from_candidates
from mi2rage_training.ranking import posterior_weights_of
from mi2rage_training.store import Candidate

__all__ = [
    "TeacherConfig",
    "TeacherScores",
    "Teachers",
    "fit_teachers",
    "label_entropy_nats",
]


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherConfig:
    """How the teachers are made.

    Attributes:
        folds: of the cross-fitting, 2 or more.
        fit: of each teacher; how often it hides the made modality is set by `hidden`.
        members: classifiers of a fold's ensemble; their probabilities are averaged.
        rounds: of expectation maximisation. In each round after the first the teachers are fitted anew with candidates
            weighted by q(y | both) among their siblings, as the round before scored them: the made modality is a hidden
            variable, its candidates draws from p(made | real), and the weights turn them into draws from
            p(made | real, label).
        sharpness: power of q(y | both) in these weights.
        hidden: share (0 to 1) of rows whose made modality is hidden in a step, so that one network also gives
            q(y | real modality).
        device: of fitting and scoring.
    """

    folds: int = 4
    fit: FitConfig = dataclasses.field(default_factory=lambda: FitConfig(epochs=8))
    members: int = 1
    rounds: int = 1
    sharpness: float = 1.0
    hidden: float = 0.3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(f"folds: came {self.folds}; expected 2 or more, so that no teacher scores what it saw")
        for name in ("members", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 1 or more")
        if not 0 < self.hidden < 1:
            raise InputError(f"hidden: came {self.hidden}; expected a share above 0 and below 1, e.g. 0.3")
        if self.sharpness <= 0:
            raise InputError(f"sharpness: came {self.sharpness}; expected a number above 0; 1 is the posterior")


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherScores:
    """Scores of candidates, in their order, by calibrated teachers.

    Attributes:
        information_nats: log q(y | both) + H(Y), float64 (N,).
        added_nats: log q(y | both) - log q(y | real modality), float64 (N,).
        label_entropy_nats: H(Y) over the real samples.
        weights: of the last round, by which its teachers were fitted; 1 on average, float64 (N,).
        probabilities: q(. | both), float64 (N, labels), in the order of `labels`.
        temperatures: of each fold, with both modalities shown.
        calibration_error_before, calibration_error: expected calibration error (0 to 1) of q(y | both) on the held-out
            candidates, before and after the temperatures.
    """

    information_nats: NDArray[np.float64]
    added_nats: NDArray[np.float64]
    label_entropy_nats: float
    weights: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    labels: tuple[str, ...]
    temperatures: tuple[float, ...]
    calibration_error_before: float
    calibration_error: float

    @property
    def bound_nats(self) -> float:
        """Barber-Agakov lower bound on I(text and image; label)."""
        return float(self.information_nats.mean())

    @property
    def real_bound_nats(self) -> float:
        """Barber-Agakov lower bound on I(real modality; label), by the same teachers."""
        return float((self.information_nats - self.added_nats).mean())


def label_entropy_nats(labels: Sequence[str]) -> float:
    """Empirical entropy of labels, in nats."""
    counts = Counter(labels)
    return -sum(count / len(labels) * math.log(count / len(labels)) for count in counts.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Teachers:
    """The fitted teachers of all folds; fulfils `judge.Judge`.

    Attributes:
        members: of each fold, the classifiers of its ensemble, on the CPU.
        temperatures: of each fold, for the views `both` and `single`.
        single: the view of the real modality alone.
        fold_seed: what `fold_of` takes.
    """

    name: str
    members: tuple[tuple[LoadedClassifier, ...], ...]
    temperatures: tuple[tuple[float, float], ...]
    single: View
    fold_seed: int
    device: str = "cpu"

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the logits."""
        return self.members[0][0].labels

    def folds_of(self, candidates: Sequence[Candidate]) -> NDArray[np.int64]:
        """The fold of each candidate's parent, int64 (N,)."""
        folds = len(self.members)
        return np.array([fold_of(item.provenance.parent, folds, self.fold_seed) for item in candidates], np.int64)

    def log_probabilities(self, candidates: Sequence[Candidate]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """log q(. | both) and log q(. | real modality), float64 (N, labels), by teachers that never saw the parents."""
        pairs, folds = pairs_from_candidates(candidates), self.folds_of(candidates)
        both, single = (np.zeros((len(pairs), len(self.labels))) for _ in range(2))
        for fold, members in enumerate(self.members):
            rows = np.flatnonzero(folds == fold)
            if len(rows):
                raw = _ensemble_logits(members, [pairs[row] for row in rows], self.single, self.device)
                for target, logits, temperature in zip((both, single), raw, self.temperatures[fold], strict=True):
                    target[rows] = log_softmax(logits, temperature)
        return both, single

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """log q(y | both) - log q(y | real modality) at the candidates' labels, float64 (N,)."""
        both, single = self.log_probabilities(candidates)
        gold = self.members[0][0].label_ids([candidate.sample for candidate in candidates])
        each = np.arange(len(gold))
        difference: NDArray[np.float64] = both[each, gold] - single[each, gold]
        return difference


def _ensemble_logits(
    members: Sequence[LoadedClassifier], pairs: Sequence[Pair], single: View, device: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logs of the members' mean probabilities, (N, labels), for both modalities and for the real one alone."""
    views: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
    for member in members:
        member.module.to(device)
        for found, logits in zip(views, logits_of_pairs(member, pairs, views=(View.BOTH, single)), strict=True):
            found.append(log_softmax(logits))
        member.module.cpu()
    both, only = (np.logaddexp.reduce(found) - math.log(len(members)) for found in views)
    return both, only


def _single_view(candidates: Sequence[Candidate]) -> View:
    """What is shown of a candidate when the made modality is hidden.

    Raises:
        DataError: made images and made texts are mixed.
    """
    made = {candidate.made for candidate in candidates}
    if len(made) != 1:
        raise DataError(f"candidates: came with made {' and '.join(sorted(made))}; expected one kind; score them apart")
    return View.TEXT if made == {"image"} else View.IMAGE


@dataclasses.dataclass(slots=True)
class _Round:
    """One round's teachers, and their logits on the candidates that each never saw."""

    members: list[tuple[LoadedClassifier, ...]]
    both: NDArray[np.float64]
    single: NDArray[np.float64]


def _fit_round(
    candidates: Sequence[Candidate],
    folds: NDArray[np.int64],
    weights: NDArray[np.float64],
    labels: tuple[str, ...],
    config: TeacherConfig,
    number: int,
) -> _Round:
    pairs, single = pairs_from_candidates(candidates), _single_view(candidates)
    settings = (
        dataclasses.replace(config.fit, image_dropout=config.hidden)
        if single is View.TEXT
        else dataclasses.replace(config.fit, text_dropout=config.hidden)
    )
    found = _Round([], np.zeros((len(pairs), len(labels))), np.zeros((len(pairs), len(labels))))
    for fold in range(config.folds):
        seen, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        members = []
        for member in range(config.members):
            fit = dataclasses.replace(settings, seed=config.fit.seed + 1009 * member + 7919 * number)
            fitted = fit_classifier(
                [pairs[row] for row in seen],
                fit,
                labels=labels,
                device=config.device,
                weights=weights[seen].tolist(),
                description=f"teacher {fold + 1}/{config.folds}" + (f", round {number + 1}" if number else ""),
            )
            members.append(fitted.classifier)
        found.members.append(tuple(members))
        rows = [pairs[row] for row in held_out]
        found.both[held_out], found.single[held_out] = _ensemble_logits(members, rows, single, config.device)
    return found


def _temperatures(
    logits: NDArray[np.float64], gold: NDArray[np.int64], folds: NDArray[np.int64], weights: NDArray[np.float64]
) -> list[float]:
    """A temperature for each fold, fitted on the held-out candidates of the other folds: none sees what it scores."""
    return [
        fit_temperature(logits[folds != fold], gold[folds != fold], weights[folds != fold])
        for fold in range(int(folds.max()) + 1)
    ]


def _calibrated(
    logits: NDArray[np.float64], temperatures: Sequence[float], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    return log_softmax(logits / np.array(temperatures)[folds][:, None])


def fit_teachers(candidates: Sequence[Candidate], config: TeacherConfig) -> tuple[Teachers, TeacherScores]:
    """Fit the teachers, and score every candidate by those that never saw its parent.

    From the second round on, the weights of what a teacher is fitted on come from scores of the round before, some of
    them by teachers that saw the parents which it is to score: labels of those reach it through the weights alone.

    Raises:
        DataError: there are too few parents for the folds, only one label, or made images and texts are mixed.
    """
    labels = labels_of(pairs_from_candidates(candidates))
    parents = np.array([candidate.provenance.parent for candidate in candidates])
    fold_seed = fold_seed_for(parents.tolist(), config.folds, config.fit.seed)
    folds = np.array([fold_of(parent, config.folds, fold_seed) for parent in parents.tolist()], np.int64)
    gold = np.array([labels.index(str(candidate.sample.label)) for candidate in candidates], np.int64)
    each = np.arange(len(gold))
    weights, log_both = np.ones(len(gold)), np.zeros((len(gold), len(labels)))
    for number in range(config.rounds):
        # The first round has flat likelihoods, and so weights of 1.
        weights = posterior_weights_of(parents, log_both[each, gold], config.sharpness)
        found = _fit_round(candidates, folds, weights, labels, config, number)
        hot = _temperatures(found.both, gold, folds, weights), _temperatures(found.single, gold, folds, weights)
        log_both = _calibrated(found.both, hot[0], folds)
        log_single = _calibrated(found.single, hot[1], folds)
    entropy = label_entropy_nats(list({item.provenance.parent: str(item.sample.label) for item in candidates}.values()))
    teachers = Teachers(
        # By what they say of what they never saw: those of other candidates are others, whatever was asked for.
        f"teachers-{seed_from(repr(config), hashlib.sha256(found.both.tobytes()).hexdigest()):016x}",
        tuple(found.members),
        tuple(zip(*hot, strict=True)),
        _single_view(candidates),
        fold_seed,
        config.device,
    )
    scores = TeacherScores(
        log_both[each, gold] + entropy,
        log_both[each, gold] - log_single[each, gold],
        entropy,
        weights,
        np.exp(log_both),
        labels,
        tuple(hot[0]),
        calibration_error(log_softmax(found.both), gold, weights),
        calibration_error(log_both, gold, weights),
    )
    return teachers, scores
