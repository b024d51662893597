"""The one door to TensorRT: `tensorrt` (10 and 11) and `tensorrt_rtx`, what they can do, and the GPU that is here.

Nothing else imports them. What differs between them is asked here, by name, and never guessed from a version number
further in.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import importlib.metadata
import importlib.util
import re
import sys
from typing import Any

from mi2rage_engines.errors import EngineError, InputError, MissingExtraError, require

__all__ = [
    "Backend",
    "Device",
    "Target",
    "TrtApi",
    "find_device",
    "installed_backends",
    "open_api",
    "target_from_text",
]


class Backend(enum.StrEnum):
    """The two libraries: one build tool for the GPU at hand, one that builds ahead of time for GPUs that are not."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


_IMPORTS = {Backend.TENSORRT: "tensorrt", Backend.TENSORRT_RTX: "tensorrt_rtx"}


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """The first GPU that CUDA sees: e.g. `NVIDIA L4`, `sm89`."""

    name: str
    capability: str


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a plan is built for: compute capabilities (`sm89`), all of them in one plan."""

    capabilities: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name, e.g. `sm89` or `sm80+sm89`."""
        return "+".join(self.capabilities)


@dataclasses.dataclass(frozen=True)
class TrtApi:
    """An imported library.

    Attributes:
        backend: which of the two.
        module: the imported module; documented names only.
        version: exact, as the library gives it; a plan loads in no other.
        cuda: the CUDA major version it was built against, e.g. `13`, where its packages tell.
    """

    backend: Backend
    module: Any
    version: str
    cuda: str | None = None

    @property
    def label(self) -> str:
        """What messages call it, e.g. `tensorrt-rtx 1.7.1.116`."""
        return f"{self.backend} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for named compute capabilities, with or without a GPU.

        TensorRT's own headers declare the same calls and refuse them: only TensorRT-RTX implements them.
        """
        return self.backend is Backend.TENSORRT_RTX

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that can be named, e.g. `sm89`; none where only the GPU at hand is built for."""
        if not self.builds_ahead:
            return ()
        names = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in names if name.startswith("SM"))

    @property
    def network_flags(self) -> int:
        """What `create_network` needs for a strongly typed network: a flag on 10, nothing where it is always so."""
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        flag = getattr(flags, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    @property
    def has_timing_cache(self) -> bool:
        """Whether measured kernel times can be kept between builds (TensorRT-RTX measures none)."""
        return self.backend is Backend.TENSORRT

    @property
    def has_progress_monitor(self) -> bool:
        """Whether a build reports its progress and can be stopped."""
        return hasattr(self.module, "IProgressMonitor")


def installed_backends() -> tuple[Backend, ...]:
    """The backends whose packages are installed; none of them is imported."""
    return tuple(backend for backend, name in _IMPORTS.items() if _is_there(name))


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def open_api(backend: str | None = None) -> TrtApi:
    """Import a backend.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`; by default TensorRT where it is installed and a GPU is here, else
            TensorRT-RTX, which needs none.

    Raises:
        InputError: there is no backend of that name.
        MissingExtraError: its package is not installed.
        EngineError: the package is installed, but its libraries do not load.
    """
    chosen = _default_backend() if backend is None else _known_backend(backend)
    extra = str(chosen)
    try:
        module = require(_IMPORTS[chosen], extra)
    except MissingExtraError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"{chosen}: is installed but cannot be imported ({error}); expected its libraries to load; "
            f"pip install --force-reinstall 'mi2rage-rt[{extra}]'"
        ) from error
    return TrtApi(chosen, module, str(module.__version__), _cuda_of(chosen))


def _known_backend(name: str) -> Backend:
    try:
        return Backend(name)
    except ValueError as error:
        raise InputError(f"backend {name}: expected one of {', '.join(Backend)}; name one of them") from error


def _default_backend() -> Backend:
    if Backend.TENSORRT in installed_backends() and find_device() is not None:
        return Backend.TENSORRT
    return Backend.TENSORRT_RTX


@functools.cache
def _cuda_of(backend: Backend) -> str | None:
    # The packages on PyPI are names that require the one for a CUDA version: tensorrt-rtx-cu13, tensorrt_cu12.
    try:
        requirements = importlib.metadata.requires(str(backend)) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.search(r"[_-]cu(\d+)", " ".join(requirements))
    return found.group(1) if found else None


def _cuda_driver() -> Any | None:
    """The driver's library, or None where there is no driver."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def find_device() -> Device | None:
    """The GPU that CUDA would use, asked of the driver; None where there is none.

    The driver counts devices as CUDA does (CUDA_VISIBLE_DEVICES, fastest first); nvidia-smi counts them otherwise.
    """
    driver = _cuda_driver()
    if driver is None:
        return None
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), 0):
        return None
    failed = [
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
        driver.cuDeviceGetName(name, len(name), handle),
    ]
    if any(failed):
        return None
    return Device(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def target_from_text(text: str, api: TrtApi, device: Device | None) -> Target:
    """What `--target` names.

    Args:
        text: `this` for the GPU that is here, a capability (`sm89`), or several for one plan (`sm80+sm89`).
        api: the backend that is to build.
        device: the GPU that is here, from `find_device`.

    Raises:
        InputError: the backend cannot build for that; the message says for what it can, and who can build for that.
    """
    if text.strip().lower() == "this":
        if device is None:
            known = f"; name a capability instead: {', '.join(api.capabilities)}" if api.builds_ahead else ""
            raise InputError(f"target this: there is no GPU here (asked of the CUDA driver); expected one{known}")
        names: tuple[str, ...] = (device.capability,)
    else:
        names = tuple(dict.fromkeys(name.strip().lower() for name in text.split("+")))
    if api.builds_ahead:
        _check_named(names, api)
    else:
        _check_is_here(names, api, device)
    return Target(names)


def _check_named(names: tuple[str, ...], api: TrtApi) -> None:
    unknown = [name or repr(name) for name in names if name not in api.capabilities]
    if unknown:
        datacentre = [name for name in unknown if name in ("sm90", "sm100", "sm103")]
        hint = (
            "Hopper and data-centre Blackwell are for standard TensorRT: build on that GPU with "
            "--target this --backend tensorrt"
            if datacentre
            else "name one of them, several joined by +, or 'this' for the GPU that is here"
        )
        raise InputError(
            f"target {', '.join(unknown)}: {api.label} does not build for it; expected {', '.join(api.capabilities)}; "
            f"{hint}"
        )


def _check_is_here(names: tuple[str, ...], api: TrtApi, device: Device | None) -> None:
    if device is None or names != (device.capability,):
        here = "there is none" if device is None else f"this is {device.name}, {device.capability}"
        raise InputError(
            f"target {'+'.join(names)}: {api.label} builds only for the GPU it runs on, and {here}; build on such a "
            "GPU, or ahead of time with --backend tensorrt-rtx"
        )
