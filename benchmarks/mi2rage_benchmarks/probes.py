"""Timers: several calls in turns, and what their ratio is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mi2rage_rt import progress

__all__ = ["Ratio", "Timing", "call_ms", "ratio_of", "time_alternating"]

_WINDOW = 5
"""Timed calls of one side in a row."""

_WINDOW_MS = 1000.0
"""What a window may take: slow calls have windows of fewer calls, so that the sides still take turns often."""

_WARMUP, _WARMUP_MS = 3, 2000.0
"""Calls a side before anything counts; no more of them once so much time has passed."""

_REST_SECONDS = 0.02
"""Pause before a window: ONNX Runtime's and OpenMP's idle threads spin for some milliseconds, on the other's cores."""

_LEAST_WINDOWS = 5
"""Windows below which an interval would say nothing."""

_RESAMPLES = 2000


class Timing(BaseModel):
    """One side's calls in milliseconds, in the order they were made.

    Attributes:
        samples_ms: the timed calls. warmup_ms: the calls before them.
        window: how many of the samples were made in a row before the next side's turn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    window: int
    median_ms: float
    p25_ms: float
    p75_ms: float

    @classmethod
    def from_samples(cls, samples_ms: list[float], warmup_ms: list[float], window: int) -> Timing:
        """The timing of raw samples."""
        p25, median, p75 = (float(value) for value in np.percentile(samples_ms, [25, 50, 75]))
        return cls(
            samples_ms=tuple(samples_ms),
            warmup_ms=tuple(warmup_ms),
            window=window,
            median_ms=median,
            p25_ms=p25,
            p75_ms=p75,
        )

    @property
    def windows_ms(self) -> NDArray[np.float64]:
        """The median of each window."""
        return np.asarray(np.median(np.reshape(self.samples_ms, (-1, self.window)), axis=1))


class Ratio(BaseModel):
    """One side's time over another's, from windows that were neighbours in time.

    Attributes:
        median: of the windows' ratios.
        low, high: bootstrap 95% interval of that median; None where there are too few windows for one.
        windows: how many there are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float | None
    high: float | None
    windows: int


def ratio_of(side: Timing, other: Timing) -> Ratio:
    """How many times as long `side` takes as `other`: above 1 the other is faster.

    The interval is a percentile bootstrap over windows, not over calls: calls of one window share what the machine
    did meanwhile.
    """
    ratios = side.windows_ms / other.windows_ms
    median, count = float(np.median(ratios)), len(ratios)
    if count < _LEAST_WINDOWS:
        return Ratio(median=median, low=None, high=None, windows=count)
    drawn = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    low, high = (float(value) for value in np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5]))
    return Ratio(median=median, low=low, high=high, windows=count)


def call_ms(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _warmed_up(call: Callable[[], object]) -> list[float]:
    taken: list[float] = []
    while len(taken) < _WARMUP and sum(taken) < _WARMUP_MS:
        taken.append(call_ms(call))
    return taken


def time_alternating(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int,
    between: Callable[[], object] = lambda: None,
    label: str = "timing",
) -> list[Timing]:
    """Time calls in one run, in turns, so that what else the machine does falls on all of them.

    Turns are windows of a few calls, the side that begins changes each time, and each window has a rest before it and,
    where it is of several calls, one untimed call.

    Args:
        calls: return when their work is done.
        repeats: timed calls a side; rounded up to whole windows.
        between: called once every turn, untimed.
        label: what the progress bar says.
    """
    warmups = [_warmed_up(call) for call in calls]
    slowest = max(min(taken) for taken in warmups)
    window = max(1, min(_WINDOW, repeats, int(_WINDOW_MS / max(slowest, 1e-6))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in progress.track(range(-(-repeats // window)), label):
        for place in range(len(calls)):
            side = (turn + place) % len(calls)
            time.sleep(_REST_SECONDS)
            if window > 1:
                calls[side]()
            samples[side] += [call_ms(calls[side]) for _ in range(window)]
        between()
    return [Timing.from_samples(*both, window) for both in zip(samples, warmups, strict=True)]
