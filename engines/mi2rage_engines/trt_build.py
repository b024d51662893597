"""ONNX file to plan: parsed, profiled, built, attested; with progress, a log, and Ctrl-C that works."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import EngineError
from mi2rage_engines.profiles import ShapeProfile, shapes_of
from mi2rage_engines.spec import GraphSpec
from mi2rage_engines.trt_api import TrtApi
from mi2rage_engines.trt_attest import (
    Attestation,
    Layer,
    attest,
    compute_dtype,
    demand,
    layers_from_json,
    layers_from_log,
    layers_from_network,
)
from mi2rage_engines.trt_monitor import LogLine, OnProgress, collected_log, interruptible, new_monitor

logger = logging.getLogger(__name__)

__all__ = ["BuildOptions", "BuiltPlan", "build_plan"]


@dataclasses.dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a plan is built.

    Attributes:
        profiles: at least one; each names every dynamic axis of the graph.
        capabilities: compute capabilities (`sm89`) of an ahead-of-time build; empty builds for the GPU at hand.
        optimization_level: 0 (fast build) to 5 (fast plan); by default the library's own. TensorRT-RTX ignores it.
        workspace_bytes: a bound on the scratch memory that a kernel may ask for.
        tf32: let fp32 products round their inputs to TF32's 10 bits: faster, and outside of the parity of fp32.
        timing_cache: file of measured kernel times, read and added to where the backend has such a thing.
    """

    profiles: tuple[ShapeProfile, ...]
    capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan in memory.

    Attributes:
        content: the plan's bytes, owned by the library's buffer that this keeps alive.
        log: the builder's messages, one a line.
        attestation: what its layers compute in.
        seconds: what the build took.
    """

    content: memoryview
    log: str
    attestation: Attestation
    seconds: float


def build_plan(
    api: TrtApi,
    path: Path,
    graph: GraphSpec,
    options: BuildOptions,
    *,
    name: str | None = None,
    on_progress: OnProgress | None = None,
) -> BuiltPlan:
    """Build one ONNX file into a plan.

    Builds of one process run one after another, for the library has one logger. Ctrl-C stops a build at its next
    step; the compilation of all kernels is one step, and the longest (of 5.6 s of a small UNet it took 4.5).

    Args:
        api: the backend.
        path: the `.onnx` file; external data lies beside it.
        graph: its description: input axes, precision, parts kept in fp32.
        options: capabilities, profiles and limits.
        name: what messages call the graph; by default its path.
        on_progress: called between the steps of the build; what it raises stops the build and is raised again.

    Raises:
        InputError: the graph's precision cannot be built, or a profile lacks an axis.
        EngineError: the parser or the builder refused the graph, or the plan does not compute in its precision.
        KeyboardInterrupt: Ctrl-C; there is no plan then.
    """
    called = name or str(path)
    asked = compute_dtype(graph.precision, called)
    started = time.monotonic()
    with collected_log(api) as (collector, lines), interruptible() as stop:
        builder = api.module.Builder(collector)
        network = builder.create_network(api.network_flags)
        _parse(api, network, collector, path, called)
        network_layers = layers_from_network(network)
        config = _configure(api, builder, network, graph, options, called)
        monitor = new_monitor(api, on_progress, stop)
        if monitor is not None:
            config.progress_monitor = monitor
        cache = _load_timing_cache(api, config, options.timing_cache)
        content = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.failure is not None:
            raise monitor.failure
        if content is None:
            raise EngineError(_refusal(api, called, lines))
        _save_timing_cache(config, cache, options.timing_cache)
        attestation = _attested(api, asked, content, lines, network_layers, collector)
    demand(attestation, called, is_mixed=bool(graph.kept_fp32) or graph.precision == "int8-qdq")
    log = "\n".join(f"{line.severity}: {line.text}" for line in lines) + "\n"
    return BuiltPlan(memoryview(content), log, attestation, time.monotonic() - started)


def _parse(api: TrtApi, network: Any, collector: Any, path: Path, name: str) -> None:
    if not path.is_file():
        raise EngineError(f"{name}: {path} is no file; expected an ONNX graph; export the model again")
    parser = api.module.OnnxParser(network, collector)
    # From the file, not from bytes: external data is found beside it, and protobuf stops at 2 GB.
    if parser.parse_from_file(str(path)):
        return
    errors = [_error_text(parser.get_error(index)) for index in range(parser.num_errors)]
    reasons = "; ".join(dict.fromkeys(errors)) or "it gives no reason"
    raise EngineError(
        f"{name}: {api.label} cannot parse {path}: {reasons}; expected operators it knows; export the model again with "
        "another opset, or run this graph on ONNX Runtime"
    )


def _error_text(error: Any) -> str:
    operator, node = error.node_operator(), error.node_name()
    where = f"node {node or error.node()} ({operator}): " if operator else ""
    code = getattr(error.code(), "name", error.code())
    return f"{where}{code} ({str(error.desc()).strip()})"


def _configure(api: TrtApi, builder: Any, network: Any, graph: GraphSpec, options: BuildOptions, name: str) -> Any:
    trt = api.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if api.builds_ahead and options.capabilities:
        config.num_compute_capabilities = len(options.capabilities)
        for index, capability in enumerate(options.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), index)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    for profile in options.profiles:
        _add_profile(builder, config, network, graph, profile, name)
    return config


def _add_profile(builder: Any, config: Any, network: Any, graph: GraphSpec, profile: ShapeProfile, name: str) -> None:
    specs = {tensor.name: tensor for tensor in graph.inputs}
    made = builder.create_optimization_profile()
    is_needed = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in specs or len(specs[tensor.name].shape) != len(tuple(tensor.shape)):
            raise EngineError(
                f"{name}: the graph has the input {tensor.name} {tuple(tensor.shape)}; expected those that the bundle "
                f"describes, {', '.join(specs)}; export the model again"
            )
        if -1 in tuple(tensor.shape):
            made.set_shape(tensor.name, *shapes_of(profile, specs[tensor.name], name))
            is_needed = True
    if is_needed and config.add_optimization_profile(made) < 0:
        raise EngineError(
            f"{name}: the builder refused the profile {profile}; expected sizes that the graph can take; give another "
            "with --profile"
        )


_HINTS = {
    "FP32 GEMM is not supported": "this GPU takes no fp32 products here: export with --precision fp16",
    "HW-specific datatypes: b16": "this GPU has no bfloat16: export with --precision fp16, or name a later target",
    "out of memory": "give a smaller --profile or a larger --workspace, or build on a machine with more memory",
    "OutOfMemory": "give a smaller --profile or a larger --workspace, or build on a machine with more memory",
}


def _refusal(api: TrtApi, name: str, lines: Sequence[LogLine]) -> str:
    errors = [line.text for line in lines if line.severity in ("ERROR", "INTERNAL_ERROR")]
    # Without a GPU the library also complains of that, beside the real reason.
    reasons = [text for text in errors if "catchCudaError" not in text] or errors
    text = "; ".join(dict.fromkeys(reasons)) or "it gives no reason"
    hint = next((hint for words, hint in _HINTS.items() if words in text), "see whether another --profile builds")
    return f"{name}: {api.label} cannot build it: {text}; expected a graph that the target can run; {hint}"


def _attested(
    api: TrtApi, asked: str, content: Any, lines: Sequence[LogLine], network: Sequence[Layer], collector: Any
) -> Attestation:
    built = layers_from_log(lines)
    if built:
        return attest(asked, "build log", built, network)
    built = _inspected_layers(api, content, collector)
    if built:
        return attest(asked, "inspector", built, network)
    return attest(asked, "network", network, network)


def _inspected_layers(api: TrtApi, content: Any, collector: Any) -> tuple[Layer, ...]:
    """From a loaded engine; none where it does not load here, as without the GPU it was built for."""
    engine = api.module.Runtime(collector).deserialize_cuda_engine(content)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    return layers_from_json(inspector.get_engine_information(api.module.LayerInformationFormat.JSON))


def _load_timing_cache(api: TrtApi, config: Any, path: Path | None) -> Any | None:
    if path is None or not api.has_timing_cache:
        return None
    cache = config.create_timing_cache(_content_of(path))
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("%s: is damaged, or was measured on another GPU or version; not used, and written anew", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        logger.warning("%s: cannot be read (%s); kernels are measured again", path, error.strerror)
        return b""


def _save_timing_cache(config: Any, cache: Any | None, path: Path | None) -> None:
    if cache is None or path is None:
        return
    content = _content_of(path)
    others = config.create_timing_cache(content) if content else None
    if others is not None:  # another process may have added to it meanwhile
        cache.combine(others, False)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(cache.serialize())
        draft.replace(path)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next build measures its kernels again", path, error.strerror)
    finally:
        with contextlib.suppress(OSError):  # where the folder itself is none, or takes no changes
            draft.unlink(missing_ok=True)
