"""The metric of the field: micro precision, recall and F1 over the non-None labels, and accuracy over all rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

__all__ = ["NONE_LABEL", "LabelScore", "RelationMetrics", "relation_metrics"]

NONE_LABEL = "None"
"""The label of a pair without a relation, as MNRE spells it."""


@dataclasses.dataclass(frozen=True, slots=True)
class LabelScore:
    """Precision, recall and F1 (0 to 1) of one label, and its number of gold rows."""

    precision: float
    recall: float
    f1: float
    gold: int


@dataclasses.dataclass(frozen=True, slots=True)
class RelationMetrics:
    """Micro precision, recall, F1 over the non-None labels; accuracy over all rows; all in 0 to 1."""

    precision: float
    recall: float
    f1: float
    accuracy: float
    rows: int
    by_label: dict[str, LabelScore]


def _scores(correct: int, predicted: int, gold: int) -> tuple[float, float, float]:
    precision = correct / predicted if predicted else 0.0
    recall = correct / gold if gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


def relation_metrics(gold: Sequence[str], predicted: Sequence[str], none_label: str = NONE_LABEL) -> RelationMetrics:
    """Score predictions as the MNRE literature does.

    P = correct non-None / predicted non-None, R = correct non-None / gold non-None, F1 their harmonic mean; a zero
    denominator gives 0. A wrong non-None label on a positive row costs both P and R.

    Args:
        gold, predicted: label names, one a row.
        none_label: the label that is no relation.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(gold) != len(predicted) or not gold:
        raise ValueError(f"{len(gold)} gold and {len(predicted)} predicted labels: expected equally many, at least one")
    gold_count, predicted_count = Counter(gold), Counter(predicted)
    hits = Counter(label for label, guess in zip(gold, predicted, strict=True) if label == guess)
    positive = [label for label in gold_count | predicted_count if label != none_label]
    precision, recall, f1 = _scores(
        sum(hits[label] for label in positive),
        sum(predicted_count[label] for label in positive),
        sum(gold_count[label] for label in positive),
    )
    by_label = {
        label: LabelScore(*_scores(hits[label], predicted_count[label], gold_count[label]), gold_count[label])
        for label in sorted(positive)
    }
    return RelationMetrics(precision, recall, f1, sum(hits.values()) / len(gold), len(gold), by_label)
