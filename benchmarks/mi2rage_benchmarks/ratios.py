"""Ratios of times, how well they are known, and what may be said of them.

Two sides that are timed in turns give a ratio for each pair of neighbouring windows. Its logarithm has the median as
its estimate and this interval:

- a percentile bootstrap over windows, expanded for few of them: the level a' / 2 = Phi(-sqrt(n / (n - 1)) t(n - 1)) in
  place of 2.5% (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 3.3);
- stretched by sqrt((1 + r) / (1 - r)), r the windows' rank autocorrelation at lag 1 plus its bias 1 / n, not below 0:
  where one window is like the last, there are fewer independent ones than were counted.

A difference is said only where the interval leaves 1 out and the median is off it by `RESOLUTION`: two sessions of the
very same graph in one process may lie a per cent or two apart for as long as they live, for where their memory lies,
and no number of windows would tell that from a difference in the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from mi2rage_training.statistics import t_quantile

__all__ = ["LEAST_WINDOWS", "RESOLUTION", "Ratio", "Verdict", "ratio_between", "ratio_from"]

Verdict = Literal["faster", "slower", "no difference", "not known"]
"""Of a side against another in the same run; `not known` where there were too few windows for an interval."""

RESOLUTION = 0.02
"""The smallest difference that is called one."""

LEAST_WINDOWS = 5
"""Windows below which an interval would say nothing."""

_RESAMPLES = 1000
_MOST_AUTOCORRELATION = 0.8


class Ratio(BaseModel):
    """One side's time over another's.

    Attributes:
        median: of the windows' ratios; above 1 the other side is faster.
        low, high: its 95% interval; None where there are too few windows for one.
        windows: how many there are.
        verdict: on the other side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float | None
    high: float | None
    windows: int
    verdict: Verdict

    @model_validator(mode="before")
    @classmethod
    def _judged(cls, fields: Any) -> Any:
        # Reports of schema version 1 have no verdicts.
        if not isinstance(fields, Mapping) or "verdict" in fields:
            return fields
        return {**fields, "verdict": _verdict(fields.get("median"), fields.get("low"), fields.get("high"))}

    @property
    def precision(self) -> float | None:
        """How far the interval reaches from the median, as a share of it: 0.01 is plus or minus one per cent."""
        if self.low is None or self.high is None:
            return None
        return math.exp(max(math.log(self.high / self.median), math.log(self.median / self.low))) - 1


def _verdict(median: Any, low: Any, high: Any, resolution: float = RESOLUTION) -> Verdict:
    if not all(isinstance(value, int | float) and value > 0 for value in (median, low, high)):
        return "not known"
    if low <= 1 <= high or abs(math.log(median)) < math.log1p(resolution):
        return "no difference"
    return "faster" if median > 1 else "slower"


def ratio_from(windows: NDArray[np.float64], others: NDArray[np.float64]) -> Ratio:
    """How many times as long a side takes as another: above 1 the other is faster.

    Args:
        windows, others: medians of the two sides' windows, float64 (N,); equal places are neighbours in time.
    """
    logs = np.log(windows / others)
    count, median = len(logs), float(np.median(logs))
    if count < LEAST_WINDOWS:
        return Ratio.model_validate({"median": math.exp(median), "low": None, "high": None, "windows": count})
    low, high = _interval(logs)
    return Ratio.model_validate(
        {"median": math.exp(median), "low": math.exp(low), "high": math.exp(high), "windows": count}
    )


def ratio_between(new: Ratio, old: Ratio, *, resolution: float = RESOLUTION) -> Ratio:
    """The quotient of two ratios that were measured apart from each other, e.g. in two runs.

    Its interval is made of theirs (MOVER; Zou and Donner, "Construction of confidence limits about effect measures",
    2008): the distances to the limits add up as squares.

    Args:
        resolution: the smallest difference that is called one.
    """
    median = new.median / old.median
    found: dict[str, Any] = {"median": median, "low": None, "high": None, "windows": min(new.windows, old.windows)}
    if new.low is not None and new.high is not None and old.low is not None and old.high is not None:
        down = math.hypot(math.log(new.median / new.low), math.log(old.high / old.median))
        up = math.hypot(math.log(new.high / new.median), math.log(old.median / old.low))
        found |= {"low": median * math.exp(-down), "high": median * math.exp(up)}
    return Ratio.model_validate(found | {"verdict": _verdict(median, found["low"], found["high"], resolution)})


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% interval of the median of neighbouring windows' values."""
    count = len(values)
    drawn = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    tail = 100 * NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(count - 1))
    low, high = np.percentile(np.median(values[drawn], axis=1), [tail, 100 - tail])
    median, stretch = np.median(values), _stretch(values)
    return float(median - stretch * (median - low)), float(median + stretch * (high - median))


def _stretch(values: NDArray[np.float64]) -> float:
    """By what neighbouring windows being alike widens an interval; ranks, so that one outlier does not decide."""
    ranks = np.argsort(np.argsort(values)) - (len(values) - 1) / 2
    found = float(ranks[1:] @ ranks[:-1] / (ranks @ ranks)) + 1 / len(values)
    lag = min(max(found, 0.0), _MOST_AUTOCORRELATION)
    return math.sqrt((1 + lag) / (1 - lag))
