"""Lowered graphs answer as fp32 does, in ONNX Runtime where it can run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import TensorSpec
from mi2rage_export.bf16 import widen_bfloat16
from mi2rage_export.families import family_of
from mi2rage_export.finite import arguments_from, demand_finite
from mi2rage_export.graphs import NORMAL, Graph, Input, below, random_inputs
from mi2rage_export.precision import BF16_OPSET, lower, opset_for
from mi2rage_export.request import OPSET
from mi2rage_export.to_onnx import save_model, trace
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.pytorch_captioner import TorchCaptioner

WIDTH = 8


class Step(nn.Module):
    """A module with a time step, an integer buffer, and a block that can be kept in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("order", torch.arange(WIDTH).flip(0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert timestep.dtype == torch.float32
        wave = torch.sin(timestep * 0.37).to(sample.dtype)
        return self.last(torch.tanh(self.block(self.first(sample)[:, self.order]))) + wave


def step_graph() -> Graph:
    torch.manual_seed(0)
    module, shape = Step().eval(), ("batch", WIDTH)
    return Graph(
        name="test/step",
        module=module,
        inputs=(Input("sample", "float32", shape, NORMAL), Input("timestep", "float32", (), below(1000))),
        outputs=(TensorSpec(name="out", dtype="float32", shape=shape),),
        reference=lambda sample, timestep: (module(sample, timestep),),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 4}),
    )


def answers(graph: Graph) -> list[tuple[dict[str, np.ndarray], list[np.ndarray]]]:
    """The checked inputs and what the module, still in fp32, answers."""
    cases = []
    for seed, sizes in enumerate(graph.checked):
        arrays = random_inputs(graph, sizes, seed)
        with torch.no_grad():
            outputs = graph.module(*arguments_from(graph, arrays))
        cases.append((arrays, [item.numpy() for item in ((outputs,) if torch.is_tensor(outputs) else outputs)]))
    return cases


def exported(graph: Graph, precision: str, path: Path) -> Path:
    save_model(trace(graph, opset_for(precision)), path)
    return path


def worst(path: Path, cases) -> float:
    """Largest difference over the largest value of the output."""
    engine, differences = OrtEngine(path, providers=("CPUExecutionProvider",), threads=1), []
    for arrays, expected in cases:
        for found, truth in zip(engine.run(arrays).values(), expected, strict=True):
            assert np.isfinite(found).all()
            differences.append(np.abs(found.astype(np.float32) - truth).max() / max(1.0, np.abs(truth).max()))
    return float(max(differences))


def test_fp16_takes_and_gives_float16_but_for_the_time_step(tmp_path: Path) -> None:
    graph = step_graph()
    cases = answers(graph)
    lowered = lower(graph, "fp16", keep=("block",))
    assert [item.dtype for item in lowered.graph.inputs] == ["float16", "float32"]
    assert graph.module.order.dtype == torch.int64
    path = exported(lowered.graph, "fp16", tmp_path / "model.onnx")
    engine = OrtEngine(path)
    assert [item.dtype for item in engine.inputs] == ["float16", "float32"]
    assert [item.dtype for item in engine.outputs] == ["float16"]
    assert worst(path, cases) < 2e-3
    import onnx

    kinds = {item.name: item.data_type for item in onnx.load(path).graph.initializer}
    assert kinds["block.bias"] == onnx.TensorProto.FLOAT
    assert kinds["first.bias"] == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_part_that_is_not_there_is_refused(precision: str) -> None:
    with pytest.raises(InputError, match=r"has no submodule nonsense; it has .*block.*name one of its submodules"):
        lower(step_graph(), precision, keep=("nonsense",))


def test_bf16_takes_and_gives_float32_and_is_a_valid_graph(tmp_path: Path) -> None:
    import onnx

    graph = step_graph()
    cases = answers(graph)
    lowered = lower(graph, "bf16").graph
    assert {item.dtype for item in (*lowered.inputs, *lowered.outputs)} == {"float32"}
    assert graph.module.first.weight.dtype == torch.bfloat16
    with torch.no_grad():
        found = lowered.module(*arguments_from(lowered, cases[1][0]))
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - cases[1][1][0]).max() < 2e-2  # 8 bits of mantissa
    path = exported(lowered, "bf16", tmp_path / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    widen_bfloat16(path, tmp_path / "wide.onnx")
    assert worst(tmp_path / "wide.onnx", cases) < 2e-2


def test_opsets() -> None:
    assert opset_for("fp16") == opset_for("int8-qdq") == OPSET
    assert opset_for("fp16", 18) == 18
    assert opset_for("bf16") == BF16_OPSET
    assert opset_for("bf16", 23) == 23


@pytest.mark.parametrize("precision", ["fp32", "int8-weights", "int8-dynamic"])
def test_fp32_and_int8_leave_the_module_as_it_is(precision: str) -> None:
    graph = step_graph()
    lowered = lower(graph, precision)
    assert lowered.graph is graph
    assert {value.dtype for value in graph.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_tiny_captioners_decoder(tiny_captioner: Path, tmp_path: Path, precision: str) -> None:
    """Its mask is made of the smallest number of the states' dtype; past 0 is among the cases."""
    captioner = TorchCaptioner.from_folder(tiny_captioner, device="cpu")
    graph = next(item for item in family_of("captioner", captioner).graphs(captioner) if item.name.endswith("decoder"))
    cases = answers(graph)
    lowered = lower(graph, precision).graph
    demand_finite(lowered, [arrays for arrays, _ in cases])
    path = exported(lowered, precision, tmp_path / "model.onnx")
    if precision == "bf16":
        widen_bfloat16(path, tmp_path / "wide.onnx")
        path = tmp_path / "wide.onnx"
    assert worst(path, cases) < {"fp16": 4e-2, "bf16": 1.5e-1}[precision]


def test_bf16_classifier_is_read_and_built_by_tensorrt_rtx(tiny_classifier: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    classifier = load_classifier(tiny_classifier)
    graph = lower(family_of("classifier", classifier).graphs(classifier)[0], "bf16").graph
    path = exported(graph, "bf16", tmp_path / "model.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network()
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
