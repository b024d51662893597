from __future__ import annotations

import json
from pathlib import Path

import pytest

from mi2rage_engines.errors import EngineError, InputError
from mi2rage_engines.profiles import default_profile
from mi2rage_engines.trt_api import open_api
from mi2rage_engines.trt_attest import (
    Layer,
    attest,
    compute_dtype,
    demand,
    layers_from_json,
    layers_from_log,
    little_int8,
)
from mi2rage_engines.trt_build import BuildOptions, build_plan
from mi2rage_engines.trt_monitor import LogLine
from tests.engines.trt_graphs import products, quantised

LOG = """Layers:
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: (Unnamed Layer* 25) \
[Shuffle]_output, Dimensions: [1], Datatype: Int64, Format: x }], ParameterType: ShapeH2D, Metadata:
Name: a_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,-1], Datatype: Int64, Format: x }], Constants: [], \
Outputs: [ { Name: e, Dimensions: [-1,64], Strides: [64,1], Datatype: Half, Format: x }], Metadata: [ONNX Layer: n]
Name: b_1, LayerType: gemm, Inputs: [ { Name: e, Dimensions: [-1,64], Datatype: Int8, Format: x }], Constants: \
[ { Name: w, Dimensions: [64,64], Datatype: Int8, Format: x }, { Name: alpha, Datatype: Float, Format: x }], \
Outputs: [ { Name: y, Dimensions: [-1,64], Datatype: Half, Format: x }], TacticName: t, Metadata: [ONNX Layer: n]

Name: _gemm_mha_v2_myl0_4, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half, Format: x }], Constants: [], \
Outputs: [ { Name: o, Datatype: Half, Format: x }], TacticName: _gemm_mha_v2_0xd9b7, StreamId: 0, Metadata:

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,64]
"""


def heavy(dtype: str, count: int) -> list[Layer]:
    return [Layer("p", "gemm", (dtype,), (dtype,))] * count


def test_the_build_log_is_read() -> None:
    layers = layers_from_log([LogLine("INFO", "Layers are many"), LogLine("VERBOSE", LOG)])
    assert [(layer.kind, layer.is_heavy, layer.dtype) for layer in layers] == [
        ("ShapeHostToDevice", False, None),
        ("kgen", False, "fp16"),
        ("gemm t", True, "int8"),
        ("kgen _gemm_mha_v2_0xd9b7", True, "fp16"),
    ]
    found = attest("int8", "build log", layers, layers)
    assert found.layers == {"fp16": 2, "int8": 1} and found.heavy_layers == {"fp16": 1, "int8": 1}
    assert found.share == 0.5


@pytest.mark.parametrize(
    ("key", "word", "dtype"),
    [
        ("Format/Datatype", "Row major linear FP16 format", "fp16"),
        ("Format/Datatype", "Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Format/Datatype", "Half", "fp16"),
        ("Datatype", "BFloat16", "bf16"),
        ("Datatype", "Float", "fp32"),
        ("Datatype", "Int64", None),
    ],
)
def test_the_inspector_is_read(key: str, word: str, dtype: str | None) -> None:
    row = {"Name": "c", "LayerType": "CaskConvolution", "Inputs": [{key: word}], "Outputs": [{key: word}]}
    (layer,) = layers_from_json(json.dumps({"Layers": [row]}))
    assert layer.is_heavy and layer.dtype == dtype


def test_an_inspector_that_gives_names_only_or_nothing() -> None:
    assert layers_from_json(json.dumps({"Layers": ["conv1", "conv2"]})) == ()
    assert layers_from_json("no JSON") == ()


def test_what_is_asked_for() -> None:
    assert [compute_dtype(name, "g") for name in ("fp16", "int8-qdq", "int8-weights")] == ["fp16", "int8", "fp32"]
    with pytest.raises(InputError, match="c/d: its precision is int8-dynamic, which is for CPUs; TensorRT builds fp32"):
        compute_dtype("int8-dynamic", "c/d")


@pytest.mark.parametrize(
    ("network", "built", "is_mixed"),
    [
        (heavy("fp16", 10), heavy("fp16", 4), False),
        (heavy("fp16", 10), heavy("fp16", 19) + heavy("fp32", 1), False),
        (heavy("fp16", 10) + heavy("fp32", 5), heavy("fp16", 3) + heavy("fp32", 3), True),
        ([], [Layer("a", "kgen", (), ("fp16",))], False),
        ([], [], False),
    ],
)
def test_what_is_granted(network: list[Layer], built: list[Layer], is_mixed: bool) -> None:
    attestation = attest("fp16", "build log", built, network)
    assert demand(attestation, "g", is_mixed=is_mixed) is attestation


@pytest.mark.parametrize(
    ("network", "built", "is_mixed", "words"),
    [
        (heavy("fp32", 10), heavy("fp32", 10), False, "in the graph itself 10 in fp32 of its 10 matrix"),
        (heavy("fp32", 10), heavy("fp32", 10), True, "in the graph itself"),
        (heavy("fp16", 8) + heavy("fp32", 2), heavy("fp16", 8), False, "in the graph itself 8 in fp16, 2 in fp32"),
        (heavy("fp16", 10), heavy("fp32", 10), False, "built plan's layers are 10 in fp32"),
        (heavy("fp16", 10), heavy("fp16", 8) + heavy("fp32", 2), False, "built plan's layers are 8 in fp16, 2 in fp32"),
        (heavy("fp16", 9) + heavy("fp32", 1), heavy("fp16", 5) + heavy("fp32", 5), True, "at least 90% in fp16"),
        ([], [Layer("a", "kgen", (), ("fp32",))], False, "built plan's layers are 1 in fp32"),
    ],
)
def test_what_is_refused(network: list[Layer], built: list[Layer], is_mixed: bool, words: str) -> None:
    with pytest.raises(EngineError) as caught:
        demand(attest("fp16", "inspector", built, network), "g/h", is_mixed=is_mixed)
    assert words in str(caught.value) and "g/h: fp16 was asked for" in str(caught.value)


@pytest.mark.parametrize(
    ("int8", "fp32", "is_granted"),
    [(10, 4, True), (4, 4, True), (9, 5, True), (8, 6, False), (0, 4, False)],
)
def test_int8_is_held_to_what_the_graph_quantises(int8: int, fp32: int, is_granted: bool) -> None:
    network = heavy("int8", 13) + heavy("fp32", 4)
    attestation = attest("int8", "build log", heavy("int8", int8) + heavy("fp32", fp32), network)
    if is_granted:
        assert demand(attestation, "g", is_mixed=True) is attestation
    else:
        with pytest.raises(EngineError, match="expected at least 90% in int8"):
            demand(attestation, "g", is_mixed=True)


def test_a_layer_lost_by_a_graph_that_is_hardly_int8_counts() -> None:
    attestation = attest(
        "int8", "build log", heavy("int8", 1) + heavy("fp32", 25), heavy("int8", 2) + heavy("fp32", 24)
    )
    with pytest.raises(EngineError, match="25 in fp32"):
        demand(attestation, "g", is_mixed=True)


def test_a_graph_that_is_hardly_int8_is_said() -> None:
    def said(int8: int, fp32: int) -> str | None:
        layers = heavy("int8", int8) + heavy("fp32", fp32)
        return little_int8(attest("int8", "build log", layers, layers), "captioner/decoder")

    assert said(13, 13) is None
    assert "captioner/decoder: only 2 of its 26 matrix products and convolutions (8%) are in int8" in str(said(2, 24))


def test_tensorrt_rtx_tells_what_it_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    api = open_api("tensorrt-rtx")
    graph = products(tmp_path / "g.onnx", ["float16"] * 3 + ["float32"], precision="fp16")
    options = BuildOptions((default_profile(graph),), ("sm89",))
    mixed = graph.model_copy(update={"kept_fp32": ("product_3",)})
    attestation = build_plan(api, tmp_path / "g.onnx", mixed, options).attestation
    assert attestation.source == "build log"
    assert attestation.heavy_layers == attestation.network_heavy_layers == {"fp16": 3, "fp32": 1}
    assert attestation.share == 0.75
    with pytest.raises(EngineError, match=r"in the graph itself 3 in fp16, 1 in fp32 of its 4"):
        build_plan(api, tmp_path / "g.onnx", graph, options)


def test_tensorrt_rtx_tells_what_is_quantised(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = quantised(tmp_path / "g.onnx")
    options = BuildOptions((default_profile(graph),), ("sm89",))
    attestation = build_plan(open_api("tensorrt-rtx"), tmp_path / "g.onnx", graph, options).attestation
    assert attestation.asked == "int8"
    assert attestation.heavy_layers == attestation.network_heavy_layers == {"fp32": 1, "int8": 1}
