from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt import memory_use
from mi2rage_rt.memory_use import DeviceMemory, ProcessMemory

MEGABYTE = 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_call_is_its_own() -> None:
    # In a process of its own: what the tests before have left to the allocator would count.
    code = """
import numpy as np
from mi2rage_rt.memory_use import ProcessMemory
memory = ProcessMemory()
idle = memory.peak_bytes(lambda: None)
peaks = [memory.peak_bytes(lambda: np.ones(size, np.uint8)) for size in (10**7, 2 * 10**8)]
print(idle, *peaks, memory.peak_bytes(lambda: None), memory.limit_bytes())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    idle, small, large, again, limit = map(int, run.stdout.split())
    # What is freed at once is in the peak all the same; 40 MB for what other threads and the allocator do meanwhile.
    assert 2 * 10**8 - 40 * MEGABYTE < large - idle < 2 * 10**8 + 40 * MEGABYTE
    assert small < large - 10**8
    assert again < large - 10**8
    assert limit > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_control_groups_limit_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_use, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("12345678\n")
    assert ProcessMemory().limit_bytes() == 12345678
    (tmp_path / "memory.max").write_text("max\n")
    assert ProcessMemory().limit_bytes() > 12345678


def test_a_system_without_proc_says_what_to_do(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_use, "_RESET", tmp_path / "missing" / "clear_refs")
    with pytest.raises(InputError, match="give a number as the batch size"):
        ProcessMemory().peak_bytes(lambda: None)
    monkeypatch.setattr(memory_use, "_STATUS", tmp_path / "status")
    with pytest.raises(InputError, match="expected Linux's /proc"):
        ProcessMemory().limit_bytes()


class Driver:
    """The calls of libcuda that are used; 1000 bytes, of which `free` are."""

    def __init__(self, error: int = 0) -> None:
        self.free, self.error, self.held = 1000, error, 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.held += 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.held += 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = self.free, 1000
        return self.error

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.held -= 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        self.held -= 1
        return 0


def test_a_devices_memory_is_what_its_driver_counts() -> None:
    driver = Driver()
    memory = DeviceMemory(driver)  # type: ignore[arg-type]
    assert memory.limit_bytes() == 1000
    assert memory.peak_bytes(lambda: setattr(driver, "free", 400)) == 600
    assert driver.held == 0
    with pytest.raises(InputError, match="driver answers with error 2"):
        DeviceMemory(Driver(error=2)).limit_bytes()  # type: ignore[arg-type]


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(InputError, match="no CUDA driver"):
        DeviceMemory().limit_bytes()
