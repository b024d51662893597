"""Which backend runs a graph, decided from what is here, and the sentence that says so."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path

from mi2rage_engines.errors import InputError
from mi2rage_engines.trt_api import Backend, Device

__all__ = ["BackendName", "Choice", "Findings", "FoundPlan", "backend_from_text", "choose", "refuse_what_cannot_run"]


class BackendName(enum.StrEnum):
    """What can be asked for. `ort-*` run the ONNX files, the others the bundle's plans."""

    AUTO = "auto"
    ORT_CPU = "ort-cpu"
    ORT_CUDA = "ort-cuda"
    ORT_TENSORRT = "ort-tensorrt"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


_PROVIDERS = {
    BackendName.ORT_CPU: ("CPUExecutionProvider",),
    BackendName.ORT_CUDA: ("CUDAExecutionProvider", "CPUExecutionProvider"),
    BackendName.ORT_TENSORRT: ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
_LIBRARIES = {BackendName.TENSORRT: Backend.TENSORRT, BackendName.TENSORRT_RTX: Backend.TENSORRT_RTX}
# Not `ort-tensorrt`: it builds plans while it runs, minutes for each range of shapes, which nobody asked for.
_BEST_FIRST = (BackendName.TENSORRT, BackendName.TENSORRT_RTX, BackendName.ORT_CUDA, BackendName.ORT_CPU)
_ADD = {
    BackendName.ORT_CPU: "pip install 'mi2rage-rt[cpu]'",
    BackendName.ORT_CUDA: "pip uninstall onnxruntime, then pip install 'mi2rage-rt[gpu]'",
    BackendName.ORT_TENSORRT: "pip uninstall onnxruntime, then pip install 'mi2rage-rt[gpu,tensorrt]'",
    BackendName.TENSORRT: "pip install 'mi2rage-rt[tensorrt]'",
    BackendName.TENSORRT_RTX: "pip install 'mi2rage-rt[tensorrt-rtx]'",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What is here.

    Attributes:
        providers: ONNX Runtime's; none where it is not installed.
        device: the GPU that CUDA would use.
        installed: TensorRT's libraries.
    """

    providers: tuple[str, ...]
    device: Device | None
    installed: tuple[Backend, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class FoundPlan:
    """A graph's plan for one library: where it lies, or None and why none can be used."""

    path: Path | None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A backend for a graph.

    Attributes:
        backend: never `auto`; None where providers were asked for instead.
        providers: ONNX Runtime's, in order; none for a plan.
        plan: what TensorRT loads.
        sentence: what was chosen and why, e.g. `ort-cpu, because no GPU is visible to the CUDA driver`.
    """

    backend: BackendName | None
    providers: tuple[str, ...]
    plan: Path | None
    sentence: str


def backend_from_text(text: str) -> BackendName:
    """What `--backend` names.

    Raises:
        InputError: there is none of that name.
    """
    try:
        return BackendName(text)
    except ValueError as error:
        raise InputError(
            f"backend {text!r}: there is none of that name; expected one of {', '.join(BackendName)}; name one of them"
        ) from error


def refuse_what_cannot_run(backend: BackendName, found: Findings) -> None:
    """Refuse a backend that was asked for and lacks a package or a GPU.

    Raises:
        InputError: the message says what is missing and how to add it.
    """
    if backend is not BackendName.AUTO and (missing := _missing(backend, found)):
        raise InputError(f"backend {backend}: {missing}; or give --backend auto, which takes what is here")


def choose(backend: BackendName, found: Findings, plans: Mapping[Backend, FoundPlan], name: str) -> Choice:
    """The backend for one graph: the one asked for, or the best that can run it.

    Best first: a plan for TensorRT, whose kernels were timed on such a GPU, or for TensorRT-RTX; ONNX Runtime on CUDA;
    ONNX Runtime on the CPU.

    Args:
        backend: what was asked for.
        found: what is here.
        plans: this graph's, for each library that is installed.
        name: what messages call the graph, e.g. `generator/unet`.

    Raises:
        InputError: what was asked for cannot run the graph, or nothing can; the message says what is missing.
    """
    if backend is not BackendName.AUTO:
        refuse_what_cannot_run(backend, found)
        if reason := _without_plan(backend, plans):
            raise InputError(
                f"{name}: cannot run on {backend}: {reason}; expected a plan for this GPU; "
                f"mi2rage-rt build BUNDLE --graph {name} --target this --backend {backend}, or give --backend auto"
            )
        return _chosen(backend, plans, "it was asked for")
    passed_over: list[str] = []
    for candidate in _BEST_FIRST:
        missing = _missing(candidate, found) or _without_plan(candidate, plans)
        if not missing:
            return _chosen(candidate, plans, _merit(candidate, found, plans, passed_over))
        passed_over.append(f"{candidate}: {missing}")
    raise InputError(f"{name}: no backend can run it: {'; '.join(passed_over)}")


def _missing(backend: BackendName, found: Findings) -> str:
    """What a backend lacks here, with what to do; empty where nothing is."""
    if backend in _LIBRARIES and _LIBRARIES[backend] not in found.installed:
        return f"{_LIBRARIES[backend]} is not installed; {_ADD[backend]}"
    if backend in _PROVIDERS and not found.providers:
        return f"onnxruntime is not installed; {_ADD[backend].removeprefix('pip uninstall onnxruntime, then ')}"
    if backend in _PROVIDERS and _PROVIDERS[backend][0] not in found.providers:
        return f"this onnxruntime has no {_PROVIDERS[backend][0]}; {_ADD[backend]}"
    if backend is not BackendName.ORT_CPU and found.device is None:
        return "no GPU is visible to the CUDA driver; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return ""


def _without_plan(backend: BackendName, plans: Mapping[Backend, FoundPlan]) -> str:
    """Why there is no plan to load; empty where there is one, or none is needed."""
    if backend not in _LIBRARIES:
        return ""
    plan = plans.get(_LIBRARIES[backend])
    return "its plans were not looked for" if plan is None else "" if plan.path is not None else plan.reason


def _chosen(backend: BackendName, plans: Mapping[Backend, FoundPlan], why: str) -> Choice:
    plan = plans[_LIBRARIES[backend]].path if backend in _LIBRARIES else None
    return Choice(backend, _PROVIDERS.get(backend, ()), plan, f"{backend}, because {why}")


def _merit(backend: BackendName, found: Findings, plans: Mapping[Backend, FoundPlan], passed_over: list[str]) -> str:
    if found.device is None:
        return "no GPU is visible to the CUDA driver"
    here = f"{found.device.name} ({found.device.capability})"
    plan = plans[_LIBRARIES[backend]].path if backend in _LIBRARIES else None
    if plan is not None:
        return f"the bundle has a plan ({plan.parent.name}) for the GPU here, {here}"
    return f"the GPU here, {here}, cannot be used better ({'; '.join(passed_over)})"
