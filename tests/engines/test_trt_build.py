from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper

from mi2rage_engines import trt_api
from mi2rage_engines.errors import EngineError, InputError, MissingExtraError
from mi2rage_engines.profiles import default_profile, profile_from_text
from mi2rage_engines.trt_api import Backend, Device, TrtApi, find_device, installed_backends, open_api, target_from_text
from mi2rage_engines.trt_build import BuildOptions, build_plan
from tests.engines.trt_graphs import fake_api, products, save


@pytest.fixture(scope="module")
def rtx() -> TrtApi:
    pytest.importorskip("tensorrt_rtx")
    return open_api("tensorrt-rtx")


def options_for(graph: Any, *capabilities: str, **fields: Any) -> BuildOptions:
    return BuildOptions((default_profile(graph),), capabilities or ("sm89",), **fields)


# The door


def test_backends(rtx: TrtApi, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Backend.TENSORRT_RTX in installed_backends()
    assert rtx.label.startswith("tensorrt-rtx 1.") and rtx.cuda is not None
    assert rtx.builds_ahead and "sm89" in rtx.capabilities and "sm90" not in rtx.capabilities
    assert rtx.has_progress_monitor and not rtx.has_timing_cache
    with pytest.raises(InputError, match="backend trt: expected one of tensorrt, tensorrt-rtx"):
        open_api("trt")
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=rf"pip install 'mi2rage-rt\[{extra}\]'"):
            open_api(extra)
    assert installed_backends() == ()


def test_the_default_backend_depends_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__=f"1 of {name}"))
    for device, version in ((Device("L4", "sm89"), "1 of tensorrt"), (None, "1 of tensorrt_rtx")):
        monkeypatch.setattr(trt_api, "find_device", lambda device=device: device)
        assert open_api().version == version


def test_a_package_whose_libraries_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(package: str, extra: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(trt_api, "require", fail)
    with pytest.raises(EngineError, match=r"tensorrt: is installed but cannot be imported \(libnvinfer"):
        open_api("tensorrt")


class Driver:
    """libcuda with one GPU of capability 8.9, or failing with an error code."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.error

    def cuDeviceGet(self, handle: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:  # noqa: N802
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = {75: 8, 76: 9}[attribute]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA L4"
        return 0


@pytest.mark.parametrize(
    ("driver", "device"), [(Driver(), Device("NVIDIA L4", "sm89")), (Driver(error=100), None), (None, None)]
)
def test_the_device(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, device: Device | None) -> None:
    monkeypatch.setattr(trt_api, "_cuda_driver", lambda: driver)
    assert find_device() == device


def test_targets(rtx: TrtApi) -> None:
    assert target_from_text("SM80+sm89", rtx, None).name == "sm80+sm89"
    assert target_from_text("this", rtx, Device("L4", "sm89")).capabilities == ("sm89",)
    assert target_from_text("sm90", fake_api(), Device("H100", "sm90")).name == "sm90"


@pytest.mark.parametrize(
    ("text", "backend", "device", "words"),
    [
        ("sm90", "rtx", None, ["sm90", "sm75, sm80, sm86, sm89", "Hopper", "--backend tensorrt"]),
        ("sm99", "rtx", None, ["sm99", "sm80", "name one of them"]),
        ("this", "rtx", None, ["there is no GPU here", "sm89"]),
        ("this", "rtx", Device("H100", "sm90"), ["sm90", "Hopper"]),
        ("this", "fake", None, ["there is no GPU here"]),
        ("sm80", "fake", Device("L4", "sm89"), ["only for the GPU it runs on", "this is L4, sm89", "tensorrt-rtx"]),
        ("sm80", "fake", None, ["there is none"]),
    ],
)
def test_targets_that_cannot_be(rtx: TrtApi, text: str, backend: str, device: Device | None, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        target_from_text(text, rtx if backend == "rtx" else fake_api(), device)
    assert all(word in str(caught.value) for word in words), caught.value


# Builds on TensorRT-RTX


def test_a_plan_for_several_gpus(rtx: TrtApi, tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"] * 2)
    seen: list[float] = []
    options = options_for(graph, "sm80", "sm89", "sm120", workspace_bytes=1 << 28, optimization_level=2)
    built = build_plan(rtx, tmp_path / "g.onnx", graph, options, on_progress=lambda phase, share: seen.append(share))
    assert built.content.nbytes > 1000 and built.seconds > 0
    assert built.attestation.heavy_layers == {"fp32": 2}
    assert "INFO: " in built.log and "Layers:" in built.log
    assert seen == sorted(seen) and 0 <= seen[0] < 0.2 and 0.8 < seen[-1] <= 1


def test_two_profiles_and_a_graph_without_dynamic_axes(rtx: TrtApi, tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"])
    profiles = tuple(map(profile_from_text, ("batch=1", "batch=2:3:4")))
    log = build_plan(rtx, tmp_path / "g.onnx", graph, BuildOptions(profiles, ("sm89",))).log
    assert "MinShape: [1,16]" in log and "MaxShape: [4,16]" in log
    fixed = save(
        tmp_path / "f.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ("float32", [2])}, {"y": ("float32", [2])}
    )
    assert build_plan(rtx, tmp_path / "f.onnx", fixed, options_for(fixed)).content.nbytes > 0


def test_external_data_is_found(rtx: TrtApi, tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"])
    whole = build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph)).content.nbytes
    model = onnx.load(tmp_path / "g.onnx")
    for weight in model.graph.initializer:
        weight.raw_data = onnx.numpy_helper.to_array(weight).tobytes()
        weight.ClearField("float_data")
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.onnx_data", size_threshold=0)
    assert (tmp_path / "g.onnx_data").stat().st_size >= 16 * 16 * 4
    assert build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph)).content.nbytes == whole
    (tmp_path / "g.onnx_data").unlink()
    with pytest.raises(EngineError, match="cannot parse"):
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph))


def test_operators_that_the_parser_does_not_know_are_named(rtx: TrtApi, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Bogus", ["x"], ["h"], name="first", domain="nowhere"),
        helper.make_node("Bernoulli", ["h"], ["y"], name="second"),
    ]
    graph = save(tmp_path / "g.onnx", nodes, {"x": ("float32", ["batch", 2])}, {"y": ("float32", ["batch", 2])})
    with pytest.raises(EngineError) as caught:
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph), name="generator/unet")
    message = str(caught.value)
    assert message.startswith("generator/unet: tensorrt-rtx") and "node first (Bogus)" in message
    assert "node second (Bernoulli)" in message and "ONNX Runtime" in message


def test_files_that_are_no_graphs(rtx: TrtApi, tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"])
    with pytest.raises(EngineError, match="is no file"):
        build_plan(rtx, tmp_path / "none.onnx", graph, options_for(graph))
    (tmp_path / "g.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(EngineError, match=r"cannot parse .*Failed to parse the ONNX model"):
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph))


def test_builders_that_refuse(rtx: TrtApi, tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"])
    with pytest.raises(EngineError, match=r"FP32 GEMM is not supported.*export with --precision fp16"):
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph, "sm75"))
    with pytest.raises(InputError, match="has no axis 'batch' of input x"):
        build_plan(rtx, tmp_path / "g.onnx", graph, BuildOptions((profile_from_text("past=1"),), ("sm89",)))
    other = products(tmp_path / "h.onnx", ["float32"]).model_copy(update={"inputs": ()})
    with pytest.raises(EngineError, match="expected those that the bundle describes"):
        build_plan(rtx, tmp_path / "g.onnx", other, options_for(graph))


def test_an_input_that_the_graph_cannot_take_names_the_profile(rtx: TrtApi, tmp_path: Path) -> None:
    shape = helper.make_tensor("two", onnx.TensorProto.INT64, [2], [2, 8])
    nodes = [helper.make_node("Reshape", ["x", "two"], ["y"])]
    graph = save(tmp_path / "g.onnx", nodes, {"x": ("float32", ["batch", 16])}, {"y": ("float32", [2, 8])}, [shape])
    with pytest.raises(EngineError, match="cannot build it"):
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph))


# Stopping


def stop_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stop_by_error() -> None:
    raise ValueError("enough")


@pytest.mark.parametrize(("stop", "expected"), [(stop_by_signal, KeyboardInterrupt), (stop_by_error, ValueError)])
def test_a_build_stops_at_its_next_step(
    rtx: TrtApi,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    stop: Callable[[], None],
    expected: type[BaseException],
) -> None:
    graph = products(tmp_path / "g.onnx", ["float32"] * 4)
    calls: list[str] = []

    def on_progress(phase: str, share: float) -> None:
        calls.append(phase)
        if len(calls) == 3:
            stop()

    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(expected):
        build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph), on_progress=on_progress)
    assert len(calls) == 3 and signal.getsignal(signal.SIGINT) is usual
    assert "Exception caught" not in capfd.readouterr().err
    assert build_plan(rtx, tmp_path / "g.onnx", graph, options_for(graph)).content.nbytes > 0


def test_threads_build_one_after_another_and_keep_their_logs_apart(rtx: TrtApi, tmp_path: Path) -> None:
    graphs = {name: products(tmp_path / name, ["float32"] * count) for name, count in (("a", 1), ("b", 5))}
    found: dict[str, int] = {}

    def work(name: str) -> None:
        built = build_plan(rtx, tmp_path / name, graphs[name], options_for(graphs[name]))
        found[name] = built.attestation.heavy_layers["fp32"]

    threads = [threading.Thread(target=work, args=(name,)) for name in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": 1, "b": 5}


def test_importing_the_door_loads_no_library() -> None:
    code = "import sys, mi2rage_engines.plan; print([n for n in sys.modules if n.startswith('tensorrt')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Standard TensorRT, by a stand-in


@pytest.mark.parametrize(("version", "flags"), [("10.16.1", 2), ("11.4.0", 0)])
def test_one_path_serves_10_and_11(tmp_path: Path, version: str, flags: int) -> None:
    graph = products(tmp_path / "g.onnx", ["float16"], precision="fp16")
    api = fake_api(version)
    options = options_for(graph, "sm90", timing_cache=tmp_path / "t" / "x.cache", optimization_level=4)
    for _ in range(2):
        built = build_plan(api, tmp_path / "g.onnx", graph, options)
    assert bytes(built.content) == b"a plan" and built.log == "INFO: hello\n"
    assert built.attestation.source == "inspector" and built.attestation.heavy_layers == {"fp16": 1}
    assert ("create_network", flags) in api.module.calls and ("level", 4) in api.module.calls
    assert ("clear_flag", "TF32") in api.module.calls
    assert ("set_shape", ("x", (1, 16), (2, 16), (4, 16))) in api.module.calls
    # The second build starts from what the first has measured, and adds to it.
    assert ("create_timing_cache", b"+measured") in api.module.calls and ("combine", False) in api.module.calls
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["x.cache"]


def test_silent_fp32_after_an_upgrade_is_refused(tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float16"], precision="fp16")
    with pytest.raises(EngineError, match=r"built plan's layers are 1 in fp32 \(read off the inspector\)"):
        build_plan(fake_api(built="Float"), tmp_path / "g.onnx", graph, options_for(graph))
    with pytest.raises(EngineError, match="in the graph itself 1 in fp32"):
        build_plan(fake_api(built="Float", in_graph="FLOAT"), tmp_path / "g.onnx", graph, options_for(graph))


def test_an_engine_that_does_not_load_here_is_attested_by_its_network(tmp_path: Path) -> None:
    graph = products(tmp_path / "g.onnx", ["float16"], precision="fp16")
    attestation = build_plan(fake_api(built=""), tmp_path / "g.onnx", graph, options_for(graph)).attestation
    assert attestation.source == "network" and attestation.share == 1.0
