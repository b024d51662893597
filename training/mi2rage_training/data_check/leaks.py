"""Label leaks: fields that predict the label far better than the sentence does.

The case that is looked for is MNRE's "visual objects", made from the gold label: a third crop is there only where
there is a relation, and its phrase names the gold entity types. An honest field hardly does better than the sentence.
Every feature answers the same questions as a text model, both cross-validated on the same folds. A field is accused
when it removes far more of the answer's uncertainty, or scores a far higher F1, and a bootstrap over groups agrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.progress import track
from mi2rage_training.data_check.features import Bag, Column, Role, bags_of, columns_of, text_bag
from mi2rage_training.data_check.giveaways import Giveaway, giveaways_of
from mi2rage_training.data_check.image_files import ImageFile
from mi2rage_training.data_check.predictors import (
    bag_log_probabilities,
    folds_of,
    groups_of,
    prior_log_probabilities,
    value_log_probabilities,
)
from mi2rage_training.data_check.rows import Row
from mi2rage_training.data_check.views import (
    LABEL,
    RELATION_OR_NONE,
    WHICH_RELATION,
    Question,
    guesses,
    micro_f1,
    question_log_likelihood,
    questions_of,
)
from mi2rage_training.metrics import NONE_LABEL

__all__ = ["LeakScan", "Score", "scan_leaks"]

MIN_ROWS = 200
"""Fewer labelled rows teach the text model so little that an honest field can look better."""

MIN_GROUPS = 50
"""Fewer independent groups of rows leave the bootstrap without a meaning."""

MARGIN_SHARE = 0.10
"""A leak removes this share of the answer's uncertainty beyond what the text removes; on MNRE no field passes 0."""

LEAK_SHARE = 0.25
"""And this share in all: beating a text that says nothing of an answer by a little is no leak."""

MARGIN_F1 = 0.10
"""Or it beats the text's F1 by this much; MNRE's objects do by about 0.4."""

RESAMPLES = 400
LOWER_PERCENTILE = 0.5
"""One-sided: chance passes one comparison of two hundred, and must pass the margin as well."""


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """How well one feature answers one question, next to the text.

    Attributes:
        feature, field, role: what predicts.
        question: what is asked.
        nats: uncertainty removed, held out; below 0 where it misleads.
        share: nats over the answer's entropy, at most 1.
        text_nats, text_share: the same of the text model.
        f1, text_f1: micro-F1 over the relations, of all rows; in a scan the best of any feature of the field.
        margin_nats: lower bound of nats beyond the better of text and label shares; None where it was not needed.
        is_leak: whether it passes the thresholds.
    """

    feature: str
    field: str
    role: str
    question: str
    nats: float
    share: float
    text_nats: float
    text_share: float
    f1: float
    text_f1: float
    margin_nats: float | None
    is_leak: bool


@dataclasses.dataclass(frozen=True, slots=True)
class LeakScan:
    """The outcome of a scan.

    Attributes:
        rows, groups, features: what was looked at.
        label_entropy_nats: H(label).
        majority_accuracy, text_accuracy: held out, 0 to 1; the majority's F1 is 0 where None is the majority.
        text_f1, text_nats: the text baseline, held out.
        scores: the question that each field answers best beside the text, the worst field first.
        giveaways: single values that give an answer away, in fields that are no leak as a whole; the most rows first.
        skipped: why nothing was scanned, or None.
    """

    rows: int
    groups: int
    features: int = 0
    label_entropy_nats: float = 0.0
    majority_accuracy: float = 0.0
    text_accuracy: float = 0.0
    text_f1: float = 0.0
    text_nats: float = 0.0
    scores: tuple[Score, ...] = ()
    giveaways: tuple[Giveaway, ...] = ()
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What every feature is measured on: labels, folds, and what text and label shares answer."""

    names: list[str]
    gold: NDArray[np.int64]
    groups: NDArray[np.int64]
    folds: NDArray[np.int64]
    questions: list[Question]
    prior: list[NDArray[np.float64]]
    text: list[NDArray[np.float64]]
    text_guess: NDArray[np.int64]
    text_f1: float
    seed: int

    def predict(self, feature: Column | Bag) -> NDArray[np.float64]:
        """Held-out log q(label | feature), float64 (N, C)."""
        if isinstance(feature, Column):
            return value_log_probabilities(feature, self.gold, self.folds, len(self.names))
        return bag_log_probabilities(feature, self.gold, self.folds, len(self.names), self.seed)


def _bench(rows: Sequence[Row], groups: NDArray[np.int64], seed: int) -> _Bench:
    names, gold = np.unique([str(row.label) for row in rows], return_inverse=True)
    labels = [str(name) for name in names]
    gold = gold.astype(np.int64)
    folds = folds_of(groups, seed)
    text = bag_log_probabilities(text_bag(rows), gold, folds, len(labels), seed)
    prior = prior_log_probabilities(gold, folds, len(labels))
    questions = questions_of(labels, gold)
    guess = guesses(labels, text, gold)
    return _Bench(
        names=labels,
        gold=gold,
        groups=groups,
        folds=folds,
        questions=questions,
        prior=[question_log_likelihood(prior, gold, question) for question in questions],
        text=[question_log_likelihood(text, gold, question) for question in questions],
        text_guess=guess,
        text_f1=micro_f1(labels, gold, guess),
        seed=seed,
    )


def _resampled(groups: NDArray[np.int64], parts: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums of `parts`, float64 (N, K), over `RESAMPLES` draws of whole groups: float64 (RESAMPLES, K)."""
    _, own = np.unique(groups, return_inverse=True)
    count = int(own.max()) + 1
    by_group = np.stack([np.bincount(own, weights=part, minlength=count) for part in parts.T], 1)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums: NDArray[np.float64] = draws.astype(np.float64) @ by_group
    return sums


def _margin_nats(bench: _Bench, gain: NDArray[np.float64], question: Question) -> float:
    """Lower bound of the mean of `gain`, float64 (M,), the rows' nats beyond the baseline."""
    sums = _resampled(bench.groups[question.rows], np.stack([gain, np.ones_like(gain)], 1), bench.seed)
    return float(np.percentile(sums[:, 0] / sums[:, 1], LOWER_PERCENTILE))


def _f1_parts(bench: _Bench, guess: NDArray[np.int64]) -> NDArray[np.float64]:
    """Columns hit, predicted, gold of the relations, float64 (N, 3)."""
    none = bench.names.index(NONE_LABEL) if NONE_LABEL in bench.names else -1
    return np.stack([(guess == bench.gold) & (guess != none), guess != none, bench.gold != none], 1).astype(np.float64)


def _margin_f1(bench: _Bench, guess: NDArray[np.int64]) -> float:
    """Lower bound of the F1 of `guess` less the text's."""
    parts = np.concatenate([_f1_parts(bench, guess), _f1_parts(bench, bench.text_guess)], 1)
    own, text = np.split(_resampled(bench.groups, parts, bench.seed), 2, axis=1)
    difference = [2 * part[:, 0] / np.maximum(part[:, 1] + part[:, 2], 1) for part in (own, text)]
    return float(np.percentile(difference[0] - difference[1], LOWER_PERCENTILE))


def _scores(bench: _Bench, feature: Column | Bag) -> list[Score]:
    predicted = bench.predict(feature)
    guess = guesses(bench.names, predicted, bench.gold)
    f1 = micro_f1(bench.names, bench.gold, guess)
    by_f1 = f1 - bench.text_f1 >= MARGIN_F1 and _margin_f1(bench, guess) > 0
    scores = []
    for question, prior, text in zip(bench.questions, bench.prior, bench.text, strict=True):
        own = question_log_likelihood(predicted, bench.gold, question)
        nats, text_nats = (float(part.mean()) + question.entropy_nats for part in (own, text))
        share, text_share = nats / question.entropy_nats, text_nats / question.entropy_nats
        margin = None
        if share >= LEAK_SHARE and share - max(text_share, 0.0) >= MARGIN_SHARE:
            margin = _margin_nats(bench, own - (text if text.mean() > prior.mean() else prior), question)
        # On few rows F1 wins by luck; a leak is not more at a loss than the text.
        is_better = question.name == LABEL and share > max(text_share, 0.0)
        is_leak = (margin is not None and margin > 0) or (by_f1 and is_better)
        scores.append(
            Score(
                feature.name, feature.field, str(feature.role), question.name,
                nats, share, text_nats, text_share, f1, bench.text_f1, margin, is_leak,
            )
        )  # fmt: skip
    return scores


def _giveaways(bench: _Bench, columns: Sequence[Column], accused: set[str]) -> list[Giveaway]:
    """The value of each extra or image field that gives most rows away; fields already accused are passed over."""
    asked = []
    for question, text in zip(bench.questions, bench.text, strict=True):
        if len(question.rows) == len(bench.gold) and set(question.answer_of.tolist()) == {0, 1}:
            is_right = question.answer_of[bench.gold] == 1
            asked.append((question, is_right, np.where(is_right, np.exp(text), 1 - np.exp(text))))
    looked_at = [
        column for column in columns if column.role in (Role.EXTRA, Role.IMAGE) and column.field not in accused
    ]
    tests = max(1, 2 * len(asked) * sum(len(set(column.values)) for column in looked_at))
    best: dict[str, Giveaway] = {}
    for column in looked_at:
        for found in giveaways_of(column, bench.groups, asked, tests):
            best[found.field] = max(best.get(found.field, found), found, key=lambda one: one.rows)
    return sorted(best.values(), key=lambda one: -one.rows)


def _best_scores(bench: _Bench, features: Sequence[Column | Bag]) -> list[Score]:
    """The top score of each field, with the best F1 of any of its features; the worst field first."""
    best: dict[tuple[str, str], Score] = {}
    for feature in track(features, "label leaks"):
        top = max(_scores(bench, feature), key=_rank)
        known = best.get((top.role, top.field), top)
        chosen = max(known, top, key=_rank)
        best[top.role, top.field] = dataclasses.replace(chosen, f1=max(known.f1, top.f1))
    return sorted(best.values(), key=_rank, reverse=True)


def _rank(score: Score) -> tuple[bool, int, float]:
    """Leaks first, told by the broadest question that they answer: types tell which relation."""
    breadth = {LABEL: 2, RELATION_OR_NONE: 2, WHICH_RELATION: 0}.get(score.question, 1) if score.is_leak else 0
    return score.is_leak, breadth, score.share - max(score.text_share, 0.0)


def scan_leaks(rows: Sequence[Row], files: Mapping[str, ImageFile], seed: int = 0) -> LeakScan:
    """Measure every feature of the labelled rows against the text.

    Args:
        rows: the rows of all splits; those without a label are passed over.
        files: the image files by name, where there are some.
        seed: of folds, fits and bootstrap.

    Returns:
        The scan; `skipped` says why where the rows are too few or all alike.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    labelled = [row for row in rows if row.label is not None]
    if len(labelled) < MIN_ROWS or len({row.label for row in labelled}) < 2:
        reason = f"{len(labelled)} labelled rows with {len({row.label for row in labelled})} labels"
        return LeakScan(len(labelled), 0, skipped=f"{reason}; needs {MIN_ROWS} rows and 2 labels")
    groups = groups_of(labelled, {name: file.sha256 for name, file in files.items()})
    count = int(groups.max()) + 1
    if count < MIN_GROUPS:
        reason = f"{count} groups of rows that share no image or sentence; needs {MIN_GROUPS}"
        return LeakScan(len(labelled), count, skipped=reason)
    bench = _bench(labelled, groups, seed)
    columns = columns_of(labelled, files)
    features: list[Column | Bag] = [*columns, *bags_of(labelled)]
    scores = _best_scores(bench, features)
    return LeakScan(
        rows=len(labelled),
        groups=count,
        features=len(features),
        label_entropy_nats=bench.questions[0].entropy_nats,
        majority_accuracy=float(np.bincount(bench.gold).max() / len(bench.gold)),
        text_accuracy=float((bench.text_guess == bench.gold).mean()),
        text_f1=bench.text_f1,
        text_nats=float(bench.text[0].mean()) + bench.questions[0].entropy_nats,
        scores=tuple(scores),
        giveaways=tuple(_giveaways(bench, columns, {score.field for score in scores if score.is_leak})),
    )
