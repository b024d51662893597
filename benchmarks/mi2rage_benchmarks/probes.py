"""Timers and the environment: how a call is measured, and on what."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mi2rage_rt import progress

__all__ = ["Spread", "Timing", "busy_cores", "environment", "time_alternating"]

_PACKAGES = ("mi2rage-rt", "torch", "onnxruntime", "transformers", "diffusers", "numpy")
_WINDOW = 5
"""Timed calls of one side in a row."""

_REST_SECONDS = 0.02
"""Pause before a window: ONNX Runtime's and OpenMP's idle threads spin for some milliseconds, on the other's cores."""


class Spread(BaseModel):
    """Median and quartiles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    p25: float
    p75: float


class Timing(BaseModel):
    """One side's calls in milliseconds, in the order they were made.

    Attributes:
        samples_ms: the timed calls. warmup_ms: the calls before them, the first one included.
        window: how many of the samples were made in a row before the other side's turn.
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

    def ratio_to(self, other: Timing) -> Spread:
        """This side's time over the other's: median and quartiles of the ratios of neighbouring windows' medians."""
        mine, theirs = (np.median(np.reshape(side.samples_ms, (-1, side.window)), axis=1) for side in (self, other))
        p25, median, p75 = (float(value) for value in np.percentile(mine / theirs, [25, 50, 75]))
        return Spread(median=median, p25=p25, p75=p75)


def _call_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def time_alternating(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int, warmup: int = 3, label: str = "timing"
) -> tuple[Timing, Timing]:
    """Time two calls in one run, in turns, so that what else the machine does falls on both.

    Turns are windows of a few calls, the side that begins changes each time, and each window has a rest and one
    untimed call before it.

    Args:
        first, second: calls that return when their work is done.
        repeats: timed calls a side; rounded up to whole windows.
        warmup: calls a side before anything counts; kept apart.
        label: what the progress bar says.
    """
    calls = (first, second)
    window = min(_WINDOW, repeats)
    turns = -(-repeats // window)
    warmups = [[_call_ms(call) for _ in range(warmup)] for call in calls]
    samples: list[list[float]] = [[], []]
    for turn in progress.track(range(turns), label):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            time.sleep(_REST_SECONDS)
            calls[side]()
            samples[side] += [_call_ms(calls[side]) for _ in range(window)]
    return Timing.from_samples(samples[0], warmups[0], window), Timing.from_samples(samples[1], warmups[1], window)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def busy_cores(seconds: float = 0.3) -> float | None:
    """How many cores of the machine others keep busy, measured while this process sleeps; None where Linux is not.

    Not the load average: that still counts what this process itself did in the minute before.
    """

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    passed = total_after - total
    return (os.cpu_count() or 1) * (1 - (idle_after - idle) / passed) if passed else 0.0


def environment(threads: int) -> dict[str, str]:
    """What the figures depend on: processor, threads, what else runs, versions, and when."""
    from mi2rage_engines.ort_engine import usable_cores

    found = {
        "cpu": _cpu_name(),
        "cores": str(usable_cores()),
        "threads": str(threads),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    busy = busy_cores()
    if busy is not None:
        found["cores busy at start"] = f"{busy:.2f}"
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found
