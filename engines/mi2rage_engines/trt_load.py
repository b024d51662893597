"""A plan's file to an engine of the library, held against what the bundle says of the graph."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import GraphSpec
from mi2rage_engines.trt_api import TrtApi
from mi2rage_engines.trt_monitor import LogLine

__all__ = ["check_tensors", "errors_in", "load_plan"]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "INT8": "int8",
    "BOOL": "bool",
}


def load_plan(plan: Path, api: TrtApi, collector: Any, lines: Iterable[LogLine]) -> tuple[Any, Any]:
    """The library's runtime and its engine, weights on the device; the plan is mapped, not read into memory.

    Args:
        plan: a file that `check_plan` has let pass.
        api: the library.
        collector, lines: its logger and what it says, from `collected_log`.

    Raises:
        EngineError: the library does not load it.
    """
    runtime = api.module.Runtime(collector)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(
            f"{plan}: {api.label} cannot load it{errors_in(lines)}; expected a GPU that it was built for, with room "
            "for its weights; build it again with --force, or give another --backend"
        )
    return runtime, engine


def check_tensors(plan: Path, engine: Any, graph: GraphSpec, api: TrtApi, profiles: int) -> frozenset[str]:
    """The names of the engine's tensors; inputs that the builder found unused are not among them.

    Raises:
        EngineError: tensors or profiles are not those of the graph and its record, or lie on the host.
    """
    names = frozenset(str(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors))
    expected = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
    for name in sorted(names | {spec.name for spec in graph.outputs}):
        kind = engine.get_tensor_dtype(name).name if name in names else "missing"
        if _DTYPES.get(kind) != expected.get(name, "no such tensor"):
            raise EngineError(
                f"{plan}: its tensor {name} is {_DTYPES.get(kind, kind)}; expected "
                f"{expected.get(name, 'no such tensor')}, as the bundle describes it; build it again with --force"
            )
        if engine.get_tensor_location(name) != api.module.TensorLocation.DEVICE:
            raise EngineError(
                f"{plan}: reads the values of {name} on the host; expected tensors on the device; run this graph on "
                "ONNX Runtime (--backend ort-cuda)"
            )
    if engine.num_optimization_profiles != profiles:
        raise EngineError(
            f"{plan}: has {engine.num_optimization_profiles} profiles; expected {profiles}, as its record says; build "
            "it again with --force"
        )
    return names


def errors_in(lines: Iterable[LogLine]) -> str:
    """What the library complained of, in parentheses behind a space; empty where it did not."""
    errors = dict.fromkeys(line.text[:300] for line in lines if line.severity in ("ERROR", "INTERNAL_ERROR"))
    return f" ({'; '.join(errors)})" if errors else ""
