"""What figures depend on: the machine, the versions, and what else runs."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import time
from pathlib import Path

__all__ = ["busy_cores", "environment"]

_PACKAGES = ("mi2rage-rt", "torch", "onnxruntime", "transformers", "diffusers", "numpy")


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


def environment(threads: int, device: str = "cpu") -> dict[str, str]:
    """What the figures depend on: processor, threads, what else runs, versions, and when.

    Args:
        device: PyTorch's; a GPU is named with its driver's CUDA.
    """
    from mi2rage_engines.ort_engine import usable_cores

    found = {
        "cpu": _cpu_name(),
        "cores": str(usable_cores()),
        "threads": str(threads),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device != "cpu":
        import torch

        found["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    busy = busy_cores()
    if busy is not None:
        found["cores busy at start"] = f"{busy:.2f}"
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found
