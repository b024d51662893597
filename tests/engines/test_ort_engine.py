from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from mi2rage_engines.engine import check_names, checked_inputs
from mi2rage_engines.errors import EngineError, MissingExtraError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import TensorSpec
from tests.runtime.tiny_bundle import graph


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    path = tmp_path_factory.mktemp("graphs") / "add.onnx"
    tensor = (TensorProto.FLOAT, ["batch", 2])
    graph(path, [helper.make_node("Add", ["a", "b"], ["c"])], {"a": tensor, "b": tensor}, {"c": tensor})
    return OrtEngine(path, threads=1)


def test_runs_and_describes(adder: OrtEngine) -> None:
    a = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(adder.run({"b": a, "a": a})["c"], 2 * a)
    assert adder.inputs[0] == TensorSpec(name="a", dtype="float32", shape=("batch", 2))
    assert [tensor.name for tensor in adder.outputs] == ["c"]


def test_other_floats_are_cast_and_views_copied(adder: OrtEngine) -> None:
    a = np.ones((2, 3)).T[:, ::-1]
    assert adder.run({"a": a, "b": a})["c"].dtype == np.float32


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"a": np.zeros((1, 2), np.float32)}, ["got the inputs a", "expected a, b"]),
        ({"a": np.zeros((1, 2), np.int64), "b": np.zeros((1, 2), np.float32)}, ["dtype int64", "float32"]),
        ({"a": np.zeros((1, 3), np.float32), "b": np.zeros((1, 2), np.float32)}, ["(1, 3)", "(batch, 2)"]),
        ({"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), np.float32)}, ["(2,)", "(batch, 2)"]),
        ({"a": np.zeros((4, 2), np.float32), "b": np.zeros((1, 2), np.float32)}, ["axis batch is 1", "4 in a"]),
    ],
)
def test_wrong_inputs_are_named(adder: OrtEngine, inputs: dict[str, np.ndarray], words: list[str]) -> None:
    with pytest.raises(EngineError) as caught:
        adder.run(inputs)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unnamed_axes_are_not_compared() -> None:
    specs = [TensorSpec(name=name, dtype="float32", shape=("",)) for name in "ab"]
    assert set(checked_inputs("g", specs, {"a": np.zeros(1), "b": np.zeros(2)})) == {"a", "b"}


def test_missing_tensors_are_named(adder: OrtEngine) -> None:
    check_names(adder, ["a"], ["c"])
    with pytest.raises(EngineError, match="no output d; its outputs are c"):
        check_names(adder, ["a"], ["d"])


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        OrtEngine(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot load it"):
        OrtEngine(tmp_path / "bad.onnx")
    with pytest.raises(EngineError, match=r"provider NoSuchProvider is not in this build; it has .*CPU"):
        OrtEngine(tmp_path / "bad.onnx", providers=["NoSuchProvider"])


def test_failures_while_running_are_wrapped(tmp_path: Path) -> None:
    kind = (TensorProto.FLOAT, ["n"])
    node = helper.make_node("Reshape", ["a", "shape"], ["b"])
    graph(tmp_path / "g.onnx", [node], {"a": kind}, {"b": kind}, {"shape": np.array([2])})
    with pytest.raises(EngineError, match=r"onnxruntime failed .* on a \(3,\)"):
        OrtEngine(tmp_path / "g.onnx").run({"a": np.zeros(3, np.float32)})


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mi2rage-rt\[cpu\]'"):
        OrtEngine("any.onnx")
