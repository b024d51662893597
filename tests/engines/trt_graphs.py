"""Tiny ONNX graphs for TensorRT, and a stand-in for the `tensorrt` package, which cannot be installed everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mi2rage_engines.spec import AxisRange, GraphSpec, Precision, TensorSpec
from mi2rage_engines.trt_api import Backend, TrtApi

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
WIDTH = 16


def products(path: Path, dtypes: list[str], *, precision: Precision = "fp32", seed: int = 0) -> GraphSpec:
    """Write `x (batch, 16) -> y`: one matrix product after another, each in the dtype named, with casts between."""
    rng = np.random.default_rng(seed)
    nodes, weights, last, known = [], [], "x", dtypes[0]
    for index, dtype in enumerate(dtypes):
        if dtype != known:
            nodes.append(helper.make_node("Cast", [last], [f"c{index}"], to=KINDS[dtype]))
            last, known = f"c{index}", dtype
        weight = rng.standard_normal((WIDTH, WIDTH)) / 4
        weights.append(helper.make_tensor(f"w{index}", KINDS[dtype], weight.shape, weight.flatten().tolist()))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"h{index}"], name=f"product_{index}"))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
        last = f"r{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    return save(path, nodes, {"x": (dtypes[0], ["batch", WIDTH])}, {"y": (known, ["batch", WIDTH])}, weights, precision)


def quantised(path: Path) -> GraphSpec:
    """Write a product whose input and weight are quantised to int8 and back, and one that is not."""
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor("q", TensorProto.INT8, [WIDTH, WIDTH], rng.integers(-99, 99, WIDTH * WIDTH).tolist()),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.01]),
        helper.make_tensor("scales", TensorProto.FLOAT, [WIDTH], [0.01] * WIDTH),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        helper.make_tensor("w", TensorProto.FLOAT, [WIDTH, WIDTH], rng.standard_normal(WIDTH * WIDTH).tolist()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "scales"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    tensor = ("float32", ["batch", WIDTH])
    return save(path, nodes, {"x": tensor}, {"y": tensor}, weights, "int8-qdq")


def save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[str, list[Any]]],
    outputs: dict[str, tuple[str, list[Any]]],
    weights: list[Any] | None = None,
    precision: Precision = "fp32",
) -> GraphSpec:
    """Write an ONNX file of opset 20 and describe it."""

    def infos(tensors: dict[str, tuple[str, list[Any]]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, KINDS[kind], shape) for name, (kind, shape) in tensors.items()]

    def specs(tensors: dict[str, tuple[str, list[Any]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype=kind, shape=tuple(shape)) for name, (kind, shape) in tensors.items())

    made = helper.make_graph(nodes, "tiny", infos(inputs), infos(outputs), weights or [])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    axes = {"batch": AxisRange(min=1, opt=2, max=4)}
    return GraphSpec(
        file=path.name, inputs=specs(inputs), outputs=specs(outputs), opset=20, precision=precision, axes=axes
    )


def fake_api(version: str = "11.4.0", *, built: str = "Half", in_graph: str = "HALF", **extra: Any) -> TrtApi:
    """A `tensorrt` of one version, as its documentation describes it, that "builds" one matrix product.

    `calls` of its module notes what was asked of it.

    Args:
        version: 10.x has the STRONGLY_TYPED flag and the inspector's `Format/Datatype`, 11.x neither.
        built: what the inspector says the product computes in; empty for an engine that does not load here.
        in_graph: the dtype of the network's tensors.
        extra: attributes of the module in place of the usual.
    """
    module = ModuleType("fake_tensorrt")
    calls: list[tuple[str, Any]] = []
    is_10 = version.startswith("10.")
    dtype = SimpleNamespace(name=in_graph)
    tensor = SimpleNamespace(name="x", shape=(-1, WIDTH), dtype=dtype)
    layer = SimpleNamespace(
        name="product",
        type=SimpleNamespace(name="MATRIX_MULTIPLY"),
        num_inputs=1,
        num_outputs=1,
        get_input=lambda index: tensor,
        get_output=lambda index: tensor,
    )
    network = SimpleNamespace(num_layers=1, get_layer=lambda index: layer, num_inputs=1, get_input=lambda index: tensor)

    class ILogger:
        pass

    class IProgressMonitor:
        pass

    class Config:
        def clear_flag(self, flag: Any) -> None:
            calls.append(("clear_flag", flag))

        def add_optimization_profile(self, profile: Any) -> int:
            return 0

        def create_timing_cache(self, content: bytes) -> Any:
            calls.append(("create_timing_cache", bytes(content)))
            return SimpleNamespace(
                serialize=lambda: content + b"+measured",
                combine=lambda other, ignore: calls.append(("combine", ignore)),
            )

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            return True

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            calls.append(("workspace", size))

    class Builder:
        def __init__(self, logger: Any) -> None:
            logger.log(SimpleNamespace(name="INFO"), "hello")

        def create_network(self, flags: int) -> Any:
            calls.append(("create_network", flags))
            return network

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Any:
            return SimpleNamespace(set_shape=lambda *shapes: calls.append(("set_shape", shapes)))

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            calls.append(("level", getattr(config, "builder_optimization_level", None)))
            return b"a plan"

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None: ...

        def parse_from_file(self, path: str) -> bool:
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            key, word = ("Format/Datatype", f"Row major linear {built} format") if is_10 else ("Datatype", built)
            row = {"Name": "p", "LayerType": "gemm", "Inputs": [{key: word}], "Outputs": [{key: word}]}
            inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [row]}))
            return SimpleNamespace(create_engine_inspector=lambda: inspector) if built else None

    names = {
        "BuilderFlag": SimpleNamespace(TF32="TF32"),
        "ProfilingVerbosity": SimpleNamespace(DETAILED="DETAILED"),
        "MemoryPoolType": SimpleNamespace(WORKSPACE="WORKSPACE"),
        "LayerInformationFormat": SimpleNamespace(JSON="JSON"),
        **{kind.__name__: kind for kind in (ILogger, IProgressMonitor, Builder, OnnxParser, Runtime)},
        **({"NetworkDefinitionCreationFlag": SimpleNamespace(STRONGLY_TYPED=1)} if is_10 else {}),
        **extra,
    }
    for name, value in names.items():
        setattr(module, name, value)
    module.__dict__["calls"] = calls
    return TrtApi(Backend.TENSORRT, module, version, "12")
