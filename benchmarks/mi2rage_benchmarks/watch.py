"""What else the machine did while a cell was timed: other processes, and a clock that was held back."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

__all__ = ["Conditions", "Watch", "clock_mhz", "machine_seconds"]

_STAT, _CPUINFO = Path("/proc/stat"), Path("/proc/cpuinfo")

_LEAST_SECONDS = 0.2
"""Between two looks: the kernel counts in hundredths of a second."""

_FOREIGN_CORES = 0.25
"""Others' cores, in a look, above which they disturb; a desktop at rest keeps a tenth of one busy."""

_DISTURBED_SHARE = 0.2
_SLOWED = 0.9
"""Of the best clock seen, and of the best rate of the same matrix product: below it the machine was held back."""


class Conditions(BaseModel):
    """Of one cell, from looks between its turns.

    Attributes:
        looks: how many there were.
        foreign_cores, foreign_cores_max: cores that other processes kept busy, median and most; None where the system
            does not say.
        mhz_low, mhz_high: of the cores' clocks, mean over cores; None where the system does not say.
        gemm_low: the slowest of the matrix products between turns over the fastest.
        notes: what disturbed the cell, in words; none where nothing did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    looks: int
    foreign_cores: float | None = None
    foreign_cores_max: float | None = None
    mhz_low: float | None = None
    mhz_high: float | None = None
    gemm_low: float | None = None
    notes: tuple[str, ...] = ()


class Watch:
    """Looks at the machine between turns; what this process itself takes is not foreign."""

    def __init__(self) -> None:
        self._foreign: list[float] = []
        self._mhz: list[float] = []
        self._last = _Reading.now()

    def look(self) -> None:
        """Take what happened since the last look that counted."""
        reading = _Reading.now()
        passed = reading.wall - self._last.wall
        if passed < _LEAST_SECONDS:
            return
        if reading.machine is not None and self._last.machine is not None:
            others = (reading.machine - self._last.machine) - (reading.own - self._last.own)
            self._foreign.append(max(0.0, others / passed))
        if (mhz := clock_mhz()) is not None:
            self._mhz.append(mhz)
        self._last = reading

    def conditions(self, gemm_gflops: list[float]) -> Conditions:
        """What was seen.

        Args:
            gemm_gflops: rates of the matrix products between the turns.
        """
        foreign = np.array(self._foreign)
        low = min(gemm_gflops) / max(gemm_gflops) if gemm_gflops else None
        return Conditions(
            looks=len(self._foreign),
            foreign_cores=float(np.median(foreign)) if foreign.size else None,
            foreign_cores_max=float(foreign.max()) if foreign.size else None,
            mhz_low=min(self._mhz, default=None),
            mhz_high=max(self._mhz, default=None),
            gemm_low=low,
            notes=tuple(self._notes(low)),
        )

    def _notes(self, gemm_low: float | None) -> list[str]:
        notes = []
        disturbed = [cores for cores in self._foreign if cores > _FOREIGN_CORES]
        if disturbed and len(disturbed) >= _DISTURBED_SHARE * len(self._foreign):
            notes.append(
                f"other processes kept {np.median(disturbed):.1f} cores busy in {len(disturbed)} of "
                f"{len(self._foreign)} looks"
            )
        if self._mhz and min(self._mhz) < _SLOWED * max(self._mhz):
            notes.append(f"the clock fell from {max(self._mhz):.0f} to {min(self._mhz):.0f} MHz")
        if gemm_low is not None and gemm_low < _SLOWED:
            notes.append(f"the same matrix product ran at {100 * gemm_low:.0f}% of its best rate at times")
        return notes


class _Reading:
    def __init__(self, wall: float, machine: float | None, own: float) -> None:
        self.wall = wall
        self.machine = machine
        self.own = own

    @classmethod
    def now(cls) -> _Reading:
        return cls(time.monotonic(), machine_seconds(), time.process_time())


def machine_seconds() -> float | None:
    """Seconds that all cores were busy since the start, those that a hypervisor took included; None if not on Linux."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # user, nice, system, idle, iowait, irq, softirq, steal; what guests took is in user and nice already.
        fields = [int(field) for field in _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return None


def clock_mhz() -> float | None:
    """The cores' clocks, their mean; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("cpu MHz"):
                found.append(float(line.partition(":")[2]))
    return float(np.mean(found)) if found else None
