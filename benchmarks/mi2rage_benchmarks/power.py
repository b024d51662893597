"""Joules of a block of work: from the GPU's driver by `nvidia-smi`, from the CPU's counters by RAPL, where they are."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mi2rage_benchmarks.cost import Energy

__all__ = ["EnergyMeter", "integral_j"]

_POWERCAP = Path("/sys/class/powercap")
_EVERY_MS = 200
_COUNTER_EVERY_S = 1.0
"""Counters wrap, after a minute at the earliest."""


class EnergyMeter:
    """Measures the joules of a `with` block; `energy` is there at its end.

    A GPU is read by its power, five times a second, which the driver averages over up to a second: blocks of a few
    seconds and more. RAPL is a counter of each CPU package, of all that runs on it.

    Args:
        powercap: the folder of RAPL's counters.
        command: the program that reads the GPU.
    """

    def __init__(self, powercap: Path = _POWERCAP, command: str = "nvidia-smi") -> None:
        self.energy = Energy(missing="not measured yet")
        self._counters, self._unreadable = _rapl_counters(powercap)
        self._gpu = _GpuReader.started(command)
        self._command, self._powercap = command, powercap
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._count, name="energy", daemon=True)

    def __enter__(self) -> EnergyMeter:
        for counter in self._counters:
            counter.update()
        if self._gpu is not None:
            self._gpu.begin()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        joules = {counter.name: counter.joules for counter in self._counters}
        if self._gpu is not None:
            joules |= self._gpu.ended()
        self.energy = Energy(joules=joules, missing=None if joules else self._why_not())

    def _count(self) -> None:
        while not self._end.wait(_COUNTER_EVERY_S):
            for counter in self._counters:
                counter.update()
        for counter in self._counters:
            counter.update()

    def _why_not(self) -> str:
        rapl = "may not be read by this user" if self._unreadable else "is not there"
        gpu = "tells no power" if shutil.which(self._command) else "is not there"
        return f"{self._command} {gpu}, and RAPL ({self._powercap}) {rapl}"


class _Counter:
    """One RAPL counter, in microjoules, which begins at zero again after `wrap`."""

    def __init__(self, file: Path, name: str, wrap: int) -> None:
        self.name = name
        self.joules = 0.0
        self._file = file
        self._wrap = wrap
        self._last: int | None = None

    def update(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            now = int(self._file.read_text(encoding="ascii"))
            if self._last is not None:
                passed = now - self._last
                self.joules += (passed if passed >= 0 else passed + self._wrap) / 1e6
            self._last = now


def _rapl_counters(folder: Path) -> tuple[list[_Counter], bool]:
    """The counters of whole packages, and whether one is there that may not be read; parts of a package are in it."""
    counters, unreadable = [], False
    for home in sorted(folder.glob("intel-rapl:*")):
        if home.name.count(":") > 1:
            continue
        try:
            name = (home / "name").read_text(encoding="ascii").strip()
            wrap = int((home / "max_energy_range_uj").read_text(encoding="ascii"))
            int((home / "energy_uj").read_text(encoding="ascii"))
        except PermissionError:
            unreadable = True
        except (OSError, ValueError):
            continue
        else:
            counters.append(_Counter(home / "energy_uj", f"CPU {name} (RAPL)", wrap))
    return counters, unreadable


class _GpuReader:
    """Reads one GPU's power, in watts, from a program that goes on printing it."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.name = name
        self._process = process
        self._readings: list[tuple[float, float]] = []
        self._begun_s = 0.0
        self._thread = threading.Thread(target=self._read, name="gpu-power", daemon=True)
        self._first = threading.Event()
        self._thread.start()

    @classmethod
    def started(cls, command: str) -> _GpuReader | None:
        """The reader of the GPU that CUDA uses first; None where there is no such program, or it tells no power."""
        if shutil.which(command) is None:
            return None
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
        query = [command, "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--id={gpu}"]
        process = subprocess.Popen(
            [*query, f"--loop-ms={_EVERY_MS}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        reader = cls(process, f"GPU {gpu} ({Path(command).name})")
        if not reader._first.wait(10) or not reader._readings:
            reader.ended()
            return None
        return reader

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A card that tells no power prints `[N/A]`.
            with contextlib.suppress(ValueError):
                self._readings.append((time.perf_counter(), float(line)))
            self._first.set()
        self._first.set()

    def begin(self) -> None:
        """From now on."""
        self._begun_s = time.perf_counter()

    def ended(self) -> dict[str, float]:
        """Joules since `begin`, under the GPU's name; the program is ended."""
        now_s = time.perf_counter()
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        return {self.name: integral_j(self._readings, self._begun_s, now_s)} if self._readings else {}


def integral_j(readings: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Watts over time by the trapezoidal rule, the nearest reading taken where there is none on one side.

    Args:
        readings: (seconds, watts) in order, one or more.
        start_s, end_s: what is integrated over.
    """

    def at(moment: float) -> float:
        before = [reading for reading in readings if reading[0] <= moment][-1:]
        after = [reading for reading in readings if reading[0] > moment][:1]
        if not before or not after:
            return (before or after)[0][1]
        (left_s, left_w), (right_s, right_w) = before[0], after[0]
        return left_w + (right_w - left_w) * (moment - left_s) / (right_s - left_s)

    inside = [reading for reading in readings if start_s < reading[0] < end_s]
    points = [(start_s, at(start_s)), *inside, (end_s, at(end_s))]
    pairs = itertools.pairwise(points)
    return sum((right_s - left_s) * (left_w + right_w) / 2 for (left_s, left_w), (right_s, right_w) in pairs)
