"""How much memory a call takes, of the process on the CPU or of the GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import InputError

__all__ = ["DeviceMemory", "Memory", "ProcessMemory", "memory_of"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


class Memory(Protocol):
    """Where the arrays of an engine lie."""

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most that is in use while `call` runs, weights and all."""
        ...

    def limit_bytes(self) -> int:
        """What there is in all for what is in use now and what may come."""
        ...


def memory_of(engine: Engine) -> Memory:
    """Where an engine's arrays lie."""
    return ProcessMemory() if getattr(engine, "device", "cpu") == "cpu" else DeviceMemory()


class ProcessMemory:
    """This process's resident memory, as Linux counts it.

    Raises (both methods):
        InputError: the system does not tell it.
    """

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The largest resident size while `call` runs."""
        try:
            _RESET.write_text("5")  # sets the largest size so far back to the size now
            call()
            return _kibibytes(_STATUS, "VmHWM")
        except OSError as error:
            raise _untold(error) from error

    def limit_bytes(self) -> int:
        """What is resident, and what the machine and this process's control group have left."""
        try:
            limit = _kibibytes(_STATUS, "VmRSS") + _kibibytes(Path("/proc/meminfo"), "MemAvailable")
        except OSError as error:
            raise _untold(error) from error
        group = _CGROUP / "memory.max"
        text = group.read_text().strip() if group.is_file() else "max"
        return limit if text == "max" else min(limit, int(text))


def _untold(error: OSError) -> InputError:
    return InputError(
        f"memory: this system does not tell a process's memory ({error}); expected Linux's /proc; "
        "give a number as the batch size, and no limit of memory"
    )


def _kibibytes(file: Path, field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{file} has no {field}")
    return 1024 * int(match[1])


class DeviceMemory:
    """The memory of the first GPU, all processes' together, as the CUDA driver counts it.

    What an arena has taken it keeps, so that what is in use after a call is the most that was.

    Raises (both methods):
        InputError: there is no driver, or it does not answer.
    """

    def __init__(self, driver: ctypes.CDLL | None = None) -> None:
        self._given = driver

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """What is in use after `call`."""
        call()
        free, total = self._free_and_total()
        return total - free

    def limit_bytes(self) -> int:
        """The device's memory."""
        return self._free_and_total()[1]

    def _free_and_total(self) -> tuple[int, int]:
        try:
            driver = self._given or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise InputError(f"memory: no CUDA driver ({error}); expected a GPU; use another backend") from error
        handle, context, old = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        # The primary context, which engines use too, must be current; afterwards all is as it was.
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), 0)
        failed = failed or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
        if not failed:
            failed = driver.cuCtxPushCurrent_v2(context)
            failed = failed or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            driver.cuCtxPopCurrent_v2(ctypes.byref(old))
            driver.cuDevicePrimaryCtxRelease_v2(handle)
        if failed:
            raise InputError(
                f"memory: the CUDA driver answers with error {failed}; expected the device's free memory; "
                "give a number as the batch size, and no limit of memory"
            )
        return free.value, total.value
