from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from mi2rage_engines.engine import HostArray, HostEngine, check_names, checked_inputs
from mi2rage_engines.errors import EngineError, MissingExtraError
from mi2rage_engines.ort_engine import OrtEngine, _with_options
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


class Host(HostEngine):
    """The adder, known by `run` alone."""

    def __init__(self, engine: OrtEngine) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self.run = engine.run


@pytest.mark.parametrize("kind", [OrtEngine, Host])
def test_results_stay_on_the_device_and_go_on_from_there(adder: OrtEngine, kind: type) -> None:
    engine = adder if kind is OrtEngine else Host(adder)
    a = np.arange(6, dtype=np.float64).reshape(3, 2)
    put = engine.put(a, "a")
    assert (put.shape, put.dtype) == ((3, 2), np.dtype(np.float32))
    once = engine.call({"a": put, "b": a.astype(np.float32)})["c"]
    twice = engine.call({"a": once, "b": once})["c"]
    np.testing.assert_array_equal(once.numpy(), 2 * a)
    np.testing.assert_array_equal(twice.numpy(), 4 * a)
    del once
    for _ in range(20):
        engine.call({"a": put, "b": put})
    np.testing.assert_array_equal(twice.numpy(), 4 * a)


@pytest.mark.parametrize("kind", [OrtEngine, Host])
def test_a_call_writes_into_the_buffers_it_is_given(adder: OrtEngine, kind: type) -> None:
    engine = adder if kind is OrtEngine else Host(adder)
    ping, pong = (engine.put(np.full((2, 2), value, np.float32), "a") for value in (1, 0))
    for _ in range(3):
        assert engine.call({"a": ping, "b": ping}, {"c": pong})["c"].numpy() is not None
        ping, pong = pong, ping
    np.testing.assert_array_equal(ping.numpy(), np.full((2, 2), 8))


@pytest.mark.parametrize("kind", [OrtEngine, Host])
def test_buffers_and_device_arrays_that_do_not_fit_are_refused(adder: OrtEngine, kind: type) -> None:
    engine = adder if kind is OrtEngine else Host(adder)
    right = engine.put(np.zeros((2, 2)), "a")
    longer = engine.put(np.zeros((3, 2)), "a")
    for wrong in (longer, HostArray(np.zeros((2, 2)))):
        with pytest.raises(EngineError):
            engine.call({"a": right, "b": right}, {"c": wrong})
    with pytest.raises(EngineError):
        engine.call({"a": right, "b": longer})
    with pytest.raises(EngineError, match="has no input x"):
        engine.put(np.zeros((2, 2)), "x")


def test_providers_get_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MI2RAGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "g.onnx"
    path.write_bytes(b"graph")
    assert _with_options("CPUExecutionProvider", path, 100) == "CPUExecutionProvider"
    assert _with_options("CUDAExecutionProvider", path, None)[1] == {"use_tf32": "0"}
    limited = _with_options("CUDAExecutionProvider", path, 100)[1]
    assert limited["gpu_mem_limit"] == "100" and limited["arena_extend_strategy"] == "kSameAsRequested"
    first = _with_options("TensorrtExecutionProvider", path, None)[1]
    assert first["trt_fp16_enable"] == "0" and Path(first["trt_engine_cache_path"]).is_dir()
    assert first == _with_options("TensorrtExecutionProvider", path, None)[1]
    path.with_name("g.onnx_data").write_bytes(b"weights")  # the same graph with other weights has engines of its own
    second = _with_options("TensorrtExecutionProvider", path, None)[1]
    assert first["trt_engine_cache_path"] != second["trt_engine_cache_path"]
    assert first["trt_timing_cache_path"] == second["trt_timing_cache_path"]
