"""Single values that give a label away, in a field that leaks only of some rows and so loses to the text over all.

Such a value stands in many independent rows, nearly all of one answer, and the text model did not see it coming: had
its held-out probabilities been right, the chance of so pure a value is less than one in a million, all values counted.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.data_check.features import Column
from mi2rage_training.data_check.views import Question

__all__ = ["Giveaway", "giveaways_of"]

GIVEAWAY_GROUPS = 25
"""Independent groups that have the value: as few as can be improbable where the text is right half of the time."""

PURITY = 0.97
"""Share of its groups with the one answer; a slip of annotation must not hide a leak."""

SURPRISE_SHARE = 0.15
"""The text gives the answer this much less probability on average, however many rows there are."""

CHANCE = 1e-6

_TEXT_FLOOR = 0.05
"""No single group may count for more than 3 nats: the text model is no better calibrated than that."""


@dataclasses.dataclass(frozen=True, slots=True)
class Giveaway:
    """One value of one feature, and the answer that it gives away.

    Attributes:
        feature, field, role, value: what gives it away.
        question, is_yes: what is answered, and how.
        rows, groups: that have the value.
        share: of its groups, with this answer; 0 to 1.
        text_share: mean held-out probability that the text gives the answer there.
    """

    feature: str
    field: str
    role: str
    value: str
    question: str
    is_yes: bool
    rows: int
    groups: int
    share: float
    text_share: float


def giveaways_of(
    column: Column,
    groups: NDArray[np.int64],
    asked: list[tuple[Question, NDArray[np.bool_], NDArray[np.float64]]],
    tests: int,
) -> list[Giveaway]:
    """The values of one column that give an answer away.

    Args:
        column: the feature, N values.
        groups: group numbers, int64 (N,).
        asked: yes-or-no questions of all rows, with the right answer, bool (N,), and the text's held-out probability of
            yes, float64 (N,).
        tests: values times questions looked at in the whole scan, for Bonferroni's correction.
    """
    names, values = np.unique(np.array(column.values, dtype=object).astype(str), return_inverse=True)
    found = []
    for value in np.flatnonzero(np.bincount(values) >= GIVEAWAY_GROUPS):
        rows = np.flatnonzero(values == value)
        _, own = np.unique(groups[rows], return_inverse=True)
        sizes = np.bincount(own)
        if len(sizes) < GIVEAWAY_GROUPS or len(rows) == len(values):
            continue
        for question, is_right, text in asked:
            yes, text_yes = (np.bincount(own, weights=part[rows]) / sizes for part in (is_right, text))
            for is_yes, answer, text_answer in ((True, yes, text_yes), (False, 1 - yes, 1 - text_yes)):
                if _is_surprising(answer, text_answer, tests):
                    share, expected = float(answer.mean()), float(text_answer.mean())
                    found.append(
                        Giveaway(
                            column.name, column.field, str(column.role), str(names[value]), question.name, is_yes,
                            len(rows), len(sizes), share, expected,
                        )
                    )  # fmt: skip
    return found


def _is_surprising(answer: NDArray[np.float64], text: NDArray[np.float64], tests: int) -> bool:
    """Whether the answer, a share by group (G,), is purer than the text's probability of it, (G,), makes likely."""
    if answer.mean() < PURITY or answer.mean() - text.mean() < SURPRISE_SHARE:
        return False
    pure = answer > 0.999
    others = int((~pure).sum())
    surprise = float(-np.log(np.maximum(text[pure], _TEXT_FLOOR)).sum())
    return surprise - math.log(math.comb(len(answer), others)) > math.log(tests) - math.log(CHANCE)
