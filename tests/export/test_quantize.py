"""int8 graphs stay near fp32, keep what the bound asks for, and are the same bytes every time."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mi2rage_engines.errors import InputError, ParityError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import TensorSpec
from mi2rage_export.activation_ranges import largest_values
from mi2rage_export.graphs import NORMAL, Graph, Input, random_inputs
from mi2rage_export.quantize import Quantization, quantize
from mi2rage_export.quantized_layers import layers_of
from mi2rage_export.to_onnx import export_graph, save_model

onnx = pytest.importorskip("onnx")
PRECISIONS = ("int8-weights", "int8-dynamic", "int8-qdq")
SIZE = 8


class Network(nn.Module):
    """A convolution, products with and without bias, weights used twice, one transposed, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.table = nn.Parameter(torch.randn(12, 16))
        self.outlier = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12)
        with torch.no_grad():
            # One channel's weights in one column are a hundred times the others': what is left of the rest is coarse.
            self.outlier.weight[:, 0] = 8.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        states = torch.relu(self.conv(image)).flatten(2).transpose(1, 2)
        states = torch.softmax(self.query(states) @ states.transpose(1, 2) / 4, -1) @ self.value(states)
        pooled = states.mean(1)
        return self.head(pooled + 0.1 * self.outlier(pooled)) + (pooled + self.query(pooled)) @ self.table.T


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    module = Network().eval()
    return Graph(
        name="test/network",
        module=module,
        inputs=(Input("image", "float32", ("batch", 3, SIZE, SIZE), NORMAL),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 12)),),
        reference=lambda image: (module(image),),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 4}),
    )


@pytest.fixture(scope="module")
def source(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_graph(graph, path, "model.onnx")
    return path


@pytest.fixture(scope="module")
def samples(graph: Graph) -> list[dict[str, np.ndarray]]:
    return [random_inputs(graph, sizes, seed) for seed, sizes in enumerate(graph.checked * 2)]


def kinds(path: Path) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in onnx.load(path).graph.node))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_stay_near_fp32_and_bytes_are_the_same(source: Path, samples, tmp_path: Path, precision: str) -> None:
    made = quantize(source, tmp_path / "a.onnx", Quantization(precision, samples))
    quantize(source, tmp_path / "b.onnx", Quantization(precision, samples))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    assert made.error is not None
    assert 1e-5 < made.error < 3e-2  # of the answer's norm; 8 bits a value
    fp32, int8 = (OrtEngine(path, threads=1) for path in (source, tmp_path / "a.onnx"))
    for sample in samples:
        expected, found = fp32.run(sample)["logits"], int8.run(sample)["logits"]
        assert np.abs(found - expected).max() < 5e-2 * np.abs(expected).max()
    assert [spec.name for spec in int8.outputs] == ["logits"]


def test_what_is_quantised_and_what_is_not(source: Path, samples, tmp_path: Path) -> None:
    import onnx_ir as ir

    made = {item: quantize(source, tmp_path / item, Quantization(item, samples)) for item in PRECISIONS}
    assert made["int8-weights"].layers[0] == "conv"
    assert {"conv", "query", "outlier", "head"} <= set(made["int8-qdq"].layers)
    assert made["int8-dynamic"].layers == made["int8-weights"].layers[1:]  # no convolution
    number = len(made["int8-weights"].layers)
    before, weights = kinds(source), kinds(tmp_path / "int8-weights")
    assert weights["DequantizeLinear"] == number
    assert {name: before[name] for name in ("MatMul", "Gemm", "Conv", "Softmax")} == {
        name: weights[name] for name in ("MatMul", "Gemm", "Conv", "Softmax")
    }
    qdq = kinds(tmp_path / "int8-qdq")
    inputs = {layer.input_name for layer in layers_of(ir.load(source), "int8-qdq")}
    assert qdq["QuantizeLinear"] == len(inputs) < number  # layers with one input share its pair
    assert qdq["DequantizeLinear"] == number + qdq["QuantizeLinear"]
    dynamic = kinds(tmp_path / "int8-dynamic")
    assert dynamic["DynamicQuantizeLinear"] == len(inputs) - 1
    assert dynamic["MatMulInteger"] == number - 1
    assert dynamic["MatMul"] == 2  # attention's two products
    assert dynamic["Conv"] == 1


def test_weights_become_a_quarter(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "model.onnx", Quantization("int8-weights"))
    held = {item.name: item for item in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not any(item.data_type == onnx.TensorProto.FLOAT and len(item.dims) > 1 for item in held.values())
    whole = [item for name, item in held.items() if "_int8_" in name]
    query = [item for item in whole if list(item.dims) == [16, 16]]
    assert len(query) <= 4  # `query` is used twice, its weights stand there once in each layout


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bound_keeps_the_most_sensitive_layers(source: Path, samples, tmp_path: Path, precision: str) -> None:
    free = quantize(source, tmp_path / "free.onnx", Quantization(precision, samples))
    assert free.error is not None
    bound = free.error * 0.6
    made = quantize(source, tmp_path / "model.onnx", Quantization(precision, samples, max_error=bound))
    assert made.error is not None
    assert made.error <= bound
    assert made.kept
    assert made.layers
    assert set(made.kept) | set(made.layers) == set(free.layers)
    again = quantize(source, tmp_path / "again.onnx", Quantization(precision, samples, keep=made.kept))
    assert again.layers == made.layers
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_a_bound_that_cannot_hold_is_an_error(source: Path, samples, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"still above the bound of 1e-12; raise the bound"):
        quantize(source, tmp_path / "model.onnx", Quantization("int8-weights", samples, max_error=1e-12))


def test_the_two_ways_to_take_a_range(graph: Graph, source: Path, tmp_path: Path, samples) -> None:
    spiked = [random_inputs(graph, {"batch": 700}, 0)]  # 134,400 values, of which 99.99% leave 13 out
    spiked[0]["image"][0, 0, 0, 0] = 1000.0
    ranges = {
        method: largest_values(source, ["image"], spiked, method, tmp_path)["image"]
        for method in ("minmax", "percentile")
    }
    assert ranges["minmax"] == 1000.0
    assert 3.0 < ranges["percentile"] < 10.0
    with pytest.raises(InputError, match="'mean': expected one of minmax, percentile"):
        largest_values(source, ["image"], samples, "mean", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the activation image is nan on a calibration sample"):
        largest_values(
            source, ["image"], [{"image": np.full((1, 3, SIZE, SIZE), np.nan, np.float32)}], "minmax", tmp_path
        )


def test_settings_that_do_not_fit_are_refused(source: Path, samples, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="expected one of int8-weights, int8-dynamic, int8-qdq"):
        quantize(source, target, Quantization("fp16"))
    with pytest.raises(InputError, match="int8-qdq takes its scales from samples"):
        quantize(source, target, Quantization("int8-qdq"))
    with pytest.raises(InputError, match="max_error is measured on samples"):
        quantize(source, target, Quantization("int8-weights", max_error=0.1))
    with pytest.raises(InputError, match=r"has no layer lost to keep; its products .* are conv, "):
        quantize(source, target, Quantization("int8-weights", keep=("lost",)))
    with pytest.raises(InputError, match="onto itself"):
        quantize(source, source, Quantization("int8-weights"))
    assert not target.exists()


def test_a_selected_position_is_left_out_of_qdq_alone(tmp_path: Path) -> None:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["row"], axis=1),
        helper.make_node("MatMul", ["row", "pooler.weight"], ["y"], name="product"),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array(0), "first"),
        onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "pooler.weight"),
    ]
    inputs = [helper.make_tensor_value_info("x", floats, ["batch", 3, 4])]
    outputs = [helper.make_tensor_value_info("y", floats, ["batch", 4])]
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    samples = [{"x": np.ones((2, 3, 4), np.float32)}]
    layers = {
        item: quantize(tmp_path / "a.onnx", tmp_path / f"{item}.onnx", Quantization(item, samples)).layers
        for item in PRECISIONS
    }
    assert layers == {"int8-weights": ("pooler",), "int8-dynamic": ("pooler",), "int8-qdq": ()}


def test_a_graph_without_layers_stays_fp32(tmp_path: Path, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    helper = onnx.helper
    shape = ["batch", 4]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    result = quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", Quantization("int8-dynamic"))
    assert (result.precision, result.layers, result.error) == ("fp32", (), None)
    assert "stays in fp32" in caplog.text
    assert kinds(tmp_path / "b.onnx") == {"Relu": 1}


def test_weights_in_a_file_of_their_own(source: Path, samples, tmp_path: Path) -> None:
    """As with models above 2 GB."""
    import onnx_ir as ir

    (tmp_path / "large").mkdir()
    large = tmp_path / "large" / "model.onnx"
    save_model(ir.load(source), large, embed_up_to_bytes=0)
    assert (tmp_path / "large" / "model.onnx_data").stat().st_size > 4000
    for precision in PRECISIONS:
        quantize(source, tmp_path / "a.onnx", Quantization(precision, samples))
        quantize(large, tmp_path / "b.onnx", Quantization(precision, samples))
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_tensorrt_rtx_reads_weights_and_qdq(source: Path, samples, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for precision in ("int8-weights", "int8-qdq"):
        path = tmp_path / f"{precision}.onnx"
        quantize(source, path, Quantization(precision, samples))
        assert trt.OnnxParser(builder.create_network(), logger).parse_from_file(str(path))


def test_a_tied_vocabulary_head_is_quantised_and_its_table_stays(tmp_path: Path) -> None:
    """One table is looked up and, transposed, multiplied with, as in BLIP's decoder."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Gather", ["words.weight", "ids"], ["states"]),
        helper.make_node("Transpose", ["words.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("Tanh", ["states"], ["changed"]),
        helper.make_node("MatMul", ["changed", "turned"], ["logits"], name="product"),
    ]
    table = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    inputs = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence", 9])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(table, "words.weight")])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    samples = [{"ids": np.arange(8).reshape(2, 4)}]
    for precision in PRECISIONS:
        path = tmp_path / f"{precision}.onnx"
        result = quantize(tmp_path / "a.onnx", path, Quantization(precision, samples))
        assert result.layers == ("words",)
        assert result.error is not None
        assert 1e-5 < result.error < 2e-2
        held = {item.name: list(item.dims) for item in onnx.load(path).graph.initializer}
        assert held["words.weight"] == [9, 16]
        assert held["words.weight_int8_transposed_by_1"] == [16, 9]
        assert "Transpose" not in kinds(path)


def test_layers_of_the_tiny_classifier_carry_pytorchs_names(exported_bundle: Path, tmp_path: Path) -> None:
    source = exported_bundle / "classifier" / "classifier.onnx"
    made = quantize(source, tmp_path / "classifier.onnx", Quantization("int8-weights"))
    assert {"pair", "head.0", "head.3"} <= set(made.layers)
    assert not any("LayerNorm" in name for name in made.layers)  # the zero biases of many layers are one constant
