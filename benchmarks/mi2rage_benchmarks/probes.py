"""Timers: several calls in turns, until what is asked for is known or the time for it is over."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.ratios import RESOLUTION, Ratio, ratio_from
from mi2rage_rt import progress

__all__ = ["Ended", "Pace", "Ratio", "Timing", "call_ms", "percentiles_ms", "ratio_of", "time_alternating"]

Ended = Literal["repeats", "settled", "budget"]
"""Why no more windows were timed: as many calls as were asked for, all known well enough, or no time left."""

_WINDOW = 5
"""Timed calls of one side in a row."""

_WINDOW_MS = 1000.0
"""What a window may take: slow calls have windows of fewer calls, so that the sides still take turns often."""

_WARMUP, _WARMUP_MS = 3, 2000.0
"""Calls a side before anything counts; no more of them once so much time has passed."""

_REST_SECONDS = 0.02
"""Pause before a window: ONNX Runtime's and OpenMP's idle threads spin for some milliseconds, on the other's cores."""

_LEAST_TURNS = 8
"""Windows a side where no number of calls is asked for, if the budget allows."""

_FEWEST_TURNS = 3
"""Windows a side whatever the budget: fewer say nothing of steadiness."""

_AGREEMENT = 0.03
"""How far the last three windows may lie apart in a steady state."""

_LEAST_SAMPLES = {50: 1, 90: 50, 95: 100, 99: 1000}
"""Samples without which a percentile would be one or two chance values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How long to go on timing.

    Attributes:
        repeats: timed calls a side, rounded up to whole windows; with a budget the least of them. None leaves it to the
            budget.
        budget_seconds: of a cell's turns. They end before it where the last three windows of every side agree within 3%
            and every side's ratio to the first is known to 2%; after it only for the calls in `repeats`, or for a third
            window. None times `repeats` calls and no more.
    """

    repeats: int | None = None
    budget_seconds: float | None = 20.0

    def turns(self, window: int) -> int:
        """Turns before anything may end, if the budget allows."""
        return _LEAST_TURNS if self.repeats is None else -(-self.repeats // window)

    def ended(self, samples: Sequence[Sequence[float]], window: int, seconds: float) -> Ended | None:
        """Whether to stop, after whole turns.

        Args:
            samples: of each side, the first the one that ratios are to.
            seconds: that the turns took.
        """
        done = len(samples[0]) // window
        least = self.turns(window)
        if self.budget_seconds is None:
            return "repeats" if done >= least else None
        if done >= max(least, _FEWEST_TURNS) and _is_known(samples, window):
            return "settled"
        if seconds >= self.budget_seconds and done >= (_FEWEST_TURNS if self.repeats is None else least):
            return "budget"
        return None


class Timing(BaseModel):
    """One side's calls in milliseconds, in the order they were made.

    Attributes:
        samples_ms: the timed calls. warmup_ms: the calls before them.
        window: how many of the samples were made in a row before the next side's turn.
        percentiles_ms: those of p50, p90, p95 and p99 that there are samples enough for: 1, 50, 100, 1,000.
        steady: whether the last three windows agree within 3%; None where there are fewer.
        ended: why there are no more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    window: int
    median_ms: float
    p25_ms: float
    p75_ms: float
    percentiles_ms: dict[str, float] = {}
    steady: bool | None = None
    ended: Ended | None = None

    @classmethod
    def from_samples(
        cls, samples_ms: list[float], warmup_ms: list[float], window: int, ended: Ended | None = None
    ) -> Timing:
        """The timing of raw samples."""
        p25, median, p75 = (float(value) for value in np.percentile(samples_ms, [25, 50, 75]))
        windows = _windows(samples_ms, window)
        return cls(
            samples_ms=tuple(samples_ms),
            warmup_ms=tuple(warmup_ms),
            window=window,
            median_ms=median,
            p25_ms=p25,
            p75_ms=p75,
            percentiles_ms=percentiles_ms(samples_ms),
            steady=_agree(windows) if len(windows) >= _FEWEST_TURNS else None,
            ended=ended,
        )

    @property
    def windows_ms(self) -> NDArray[np.float64]:
        """The median of each window."""
        return _windows(self.samples_ms, self.window)


def percentiles_ms(samples_ms: Sequence[float]) -> dict[str, float]:
    """Those of p50, p90, p95 and p99 that there are samples enough for."""
    found = {rank: least for rank, least in _LEAST_SAMPLES.items() if len(samples_ms) >= least}
    return {f"p{rank}": float(np.percentile(samples_ms, rank)) for rank in found}


def ratio_of(side: Timing, other: Timing) -> Ratio:
    """How many times as long `side` takes as `other`: above 1 the other is faster.

    Windows are compared, not calls: calls of one window share what the machine did meanwhile.
    """
    return ratio_from(side.windows_ms, other.windows_ms)


def call_ms(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def time_alternating(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int | None = None,
    pace: Pace | None = None,
    between: Callable[[], object] = lambda: None,
    label: str = "timing",
) -> list[Timing]:
    """Time calls in one run, in turns, so that what else the machine does falls on all of them.

    Turns are windows of a few calls. Their order changes each time, so that no side always begins or follows the same
    other one. Each window has a rest before it and, where it is of several calls, one untimed call.

    Args:
        calls: return when their work is done.
        repeats: timed calls a side; rounded up to whole windows. Stands for a pace without a budget.
        pace: when to stop.
        between: called once every turn, untimed.
        label: what the progress bar says.
    """
    pace = pace or Pace(repeats, None if repeats is not None else Pace().budget_seconds)
    warmups = [_warmed_up(call) for call in calls]
    slowest = max(min(taken) for taken in warmups)
    window = max(1, min(_WINDOW, pace.repeats or _WINDOW, int(_WINDOW_MS / max(slowest, 1e-6))))
    samples: list[list[float]] = [[] for _ in calls]
    start = time.monotonic()
    ended: Ended | None = None
    with progress.steps(label, pace.turns(window)) as bar:
        for turn in itertools.count():
            for side in _order(turn, len(calls)):
                time.sleep(_REST_SECONDS)
                if window > 1:
                    calls[side]()
                samples[side] += [call_ms(calls[side]) for _ in range(window)]
            between()
            bar.advance()
            ended = pace.ended(samples, window, time.monotonic() - start)
            if ended is not None:
                break
    return [Timing.from_samples(*both, window, ended) for both in zip(samples, warmups, strict=True)]


def _order(turn: int, sides: int) -> list[int]:
    """The sides in the order of a turn: each pair of turns there and back, the next pair from the next side on."""
    order = [(turn // 2 + place) % sides for place in range(sides)]
    return order[::-1] if turn % 2 else order


def _warmed_up(call: Callable[[], object]) -> list[float]:
    taken: list[float] = []
    while len(taken) < _WARMUP and sum(taken) < _WARMUP_MS:
        taken.append(call_ms(call))
    return taken


def _windows(samples_ms: Sequence[float], window: int) -> NDArray[np.float64]:
    return np.asarray(np.median(np.reshape(samples_ms, (-1, window)), axis=1))


def _agree(windows: NDArray[np.float64]) -> bool:
    last = windows[-_FEWEST_TURNS:]
    return bool(last.max() <= (1 + _AGREEMENT) * last.min())


def _is_known(samples: Sequence[Sequence[float]], window: int) -> bool:
    windows = [_windows(side, window) for side in samples]
    if not all(map(_agree, windows)):
        return False
    precisions = (ratio_from(windows[0], other).precision for other in windows[1:])
    return all(precision is not None and precision <= RESOLUTION for precision in precisions)
