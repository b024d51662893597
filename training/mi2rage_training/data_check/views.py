"""What a prediction is measured by: the field's micro-F1, and nats on several questions about the label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.metrics import NONE_LABEL, relation_metrics
from mi2rage_training.teacher import label_entropy_nats

__all__ = [
    "LABEL",
    "RELATION_OR_NONE",
    "WHICH_RELATION",
    "Question",
    "guesses",
    "micro_f1",
    "question_log_likelihood",
    "questions_of",
]

LABEL = "label"
RELATION_OR_NONE = "relation or None"
WHICH_RELATION = "which relation"

QUESTION_ROWS = 100
"""A label is asked about alone from this many rows on; below, chance decides."""

NONE_WEIGHTS = (1.0, 0.7, 0.5, 0.35, 0.25)
"""None is 63% of MNRE, and the likeliest label is not the best guess for F1: each predictor takes the best of these."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One thing to know about the label.

    Attributes:
        name: e.g. `relation or None`.
        answer_of: the answer's number for each label, int64 (C,).
        rows: the rows that it is asked of, int64 (M,).
        entropy_nats: of the answer over these rows.
    """

    name: str
    answer_of: NDArray[np.int64]
    rows: NDArray[np.int64]
    entropy_nats: float


def _question(name: str, answer_of: NDArray[np.int64], rows: NDArray[np.int64], gold: NDArray[np.int64]) -> Question:
    return Question(name, answer_of, rows, label_entropy_nats([str(answer) for answer in answer_of[gold[rows]]]))


def questions_of(names: Sequence[str], gold: NDArray[np.int64]) -> list[Question]:
    """The questions that the labels allow.

    Which label; whether there is a relation at all (MNRE's third crops leak that, and little F1); which one, of the
    rows that have one; and, for each frequent label, whether it is this one.

    Args:
        names: the labels.
        gold: each row's label number, int64 (N,).
    """
    every = np.arange(len(gold))
    own = np.arange(len(names))
    questions = [_question(LABEL, own, every, gold)]
    if NONE_LABEL in names and len(names) > 2:
        none = list(names).index(NONE_LABEL)
        questions.append(_question(RELATION_OR_NONE, (own != none).astype(np.int64), every, gold))
        questions.append(_question(WHICH_RELATION, own, np.flatnonzero(gold != none), gold))
    if len(names) > 2:
        for label, rows in enumerate(np.bincount(gold, minlength=len(names))):
            if rows >= QUESTION_ROWS and names[label] != NONE_LABEL:
                questions.append(_question(f"is it {names[label]}", (own == label).astype(np.int64), every, gold))
    return [question for question in questions if question.entropy_nats > 0]


def question_log_likelihood(
    log_probabilities: NDArray[np.float64], gold: NDArray[np.int64], question: Question
) -> NDArray[np.float64]:
    """log q(right answer) of each row asked, float64 (M,).

    Args:
        log_probabilities: log q(label), float64 (N, C).
        gold: label numbers, int64 (N,).
        question: what is asked; only labels that occur among its rows are possible answers.
    """
    asked = np.exp(log_probabilities[question.rows])
    possible = np.zeros(asked.shape[1], dtype=bool)
    possible[np.unique(gold[question.rows])] = True
    asked[:, ~possible] = 0.0
    right = question.answer_of[gold[question.rows], None] == question.answer_of[None, :]
    result: NDArray[np.float64] = np.log((asked * right).sum(1) / asked.sum(1))
    return result


def guesses(names: Sequence[str], log_probabilities: NDArray[np.float64], gold: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label numbers guessed, int64 (N,), with the weight of None that is best for F1."""
    if NONE_LABEL not in names:
        likeliest: NDArray[np.int64] = log_probabilities.argmax(1)
        return likeliest
    candidates = []
    for weight in NONE_WEIGHTS:
        weighted = log_probabilities.copy()
        weighted[:, list(names).index(NONE_LABEL)] += np.log(weight)
        candidates.append(weighted.argmax(1))
    return max(candidates, key=lambda guess: micro_f1(names, gold, guess))


def micro_f1(names: Sequence[str], gold: NDArray[np.int64], guess: NDArray[np.int64]) -> float:
    """The field's F1, 0 to 1; over all labels where there is no None."""
    return relation_metrics([names[label] for label in gold], [names[label] for label in guess]).f1
