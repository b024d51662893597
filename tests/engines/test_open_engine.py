from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines import open_engine
from mi2rage_engines.backend import Findings
from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.cuda import Cuda
from mi2rage_engines.errors import EngineError, InputError
from mi2rage_engines.open_engine import EngineOpener, look_around
from mi2rage_engines.trt_api import Backend, Device, find_device
from mi2rage_rt.build import BuildSettings
from mi2rage_rt.build import build_bundle as build_plans
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.doctor import examine, examine_bundle, text_from_findings
from tests.engines.fake_gpu import Driver
from tests.runtime.tiny_bundle import build_bundle

GPU = Device("NVIDIA L4", "sm89")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundles") / "b", parts=("classifier",))


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return open_manifest(folder)


def here(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    monkeypatch.setattr(open_engine, "look_around", lambda: Findings(*found))


def test_what_is_here_is_found() -> None:
    found = look_around()
    assert "CPUExecutionProvider" in found.providers
    assert (found.device is None) or found.device.capability.startswith("sm")


def test_a_bundle_says_what_runs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here(monkeypatch, ("CPUExecutionProvider",), None, ())
    with caplog.at_level(logging.INFO, "mi2rage_engines"):
        Bundle.open(folder, threads=1).classifier()
    assert "classifier/classifier: ort-cpu, because no GPU is visible to the CUDA driver" in caplog.messages


def test_backends_and_providers_are_refused_together_and_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, ("CPUExecutionProvider",), None, ())
    with pytest.raises(InputError, match="backend ort-cpu: came with the providers CPUExecutionProvider"):
        Bundle.open(folder, "ort-cpu", providers=["CPUExecutionProvider"])
    with pytest.raises(InputError, match=r"backend tensorrt: tensorrt is not installed; pip install 'mi2rage-rt\[te"):
        Bundle.open(folder, "tensorrt")
    with pytest.raises(InputError, match="backend 'cuda': there is none of that name"):
        Bundle.open(folder, "cuda")
    assert Bundle.open(folder, providers=["CPUExecutionProvider"]).classifier()


def test_a_provider_that_was_asked_for_and_does_not_start_is_an_error(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fallen:
        providers = ("CPUExecutionProvider",)

        def __init__(self, path: Path, **options: Any) -> None:
            self.options = options

    monkeypatch.setattr(open_engine, "OrtEngine", Fallen)
    here(monkeypatch, ("CUDAExecutionProvider", "CPUExecutionProvider"), GPU, ())
    file = folder / "classifier" / "model.onnx"
    with pytest.raises(EngineError, match="CUDAExecutionProvider could not start, and onnxruntime went to CPU"):
        EngineOpener(folder, manifest, "ort-cuda")(file)
    engine: Any = EngineOpener(folder, manifest, device_memory_limit_bytes=5)(file)
    assert engine.options["device_memory_limit_bytes"] == 5
    assert engine.options["providers"] == ("CUDAExecutionProvider", "CPUExecutionProvider")


def test_plans_of_the_bundle_are_found_by_what_they_were_built_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("MI2RAGE_CACHE", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(folder, tmp_path / "b"))
    manifest, file = open_manifest(bundle), bundle / "classifier" / "model.onnx"
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")

    def choice(device: Device) -> Any:
        here(monkeypatch, providers, device, (Backend.TENSORRT_RTX,))
        return EngineOpener(bundle, manifest).choice("classifier/classifier")

    assert choice(GPU).backend == "ort-cuda" and "the bundle has no plans" in choice(GPU).sentence
    build_plans(bundle, BuildSettings(targets=("sm80", "sm89+sm120"), backend="tensorrt-rtx"))
    assert choice(GPU).plan == bundle / "plans" / "sm89+sm120" / "classifier-classifier.plan"
    assert choice(Device("NVIDIA A100", "sm80")).plan == bundle / "plans" / "sm80" / "classifier-classifier.plan"
    other = choice(Device("NVIDIA H100", "sm90"))
    assert other.backend == "ort-cuda" and "the GPU here is sm90; expected sm80" in other.sentence
    here(monkeypatch, providers, GPU, (Backend.TENSORRT_RTX,))
    if find_device() is None:  # the plan is found to fit, and there is no driver to run it with
        with pytest.raises(EngineError, match="CUDA: no driver"):
            EngineOpener(bundle, manifest, "tensorrt-rtx")(file)
        monkeypatch.setattr(open_engine, "default_cuda", lambda: Cuda(Driver()))
        with pytest.raises(EngineError, match=r"tensorrt-rtx [\d.]+ cannot load it \(.*expected a GPU"):
            EngineOpener(bundle, manifest, "tensorrt-rtx")(file)


def test_the_doctor_says_what_would_run_a_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, ("CPUExecutionProvider",), None, ())
    findings = {**examine(), "bundle": examine_bundle(folder)}
    assert "backend   classifier/classifier: ort-cpu, because no GPU is" in text_from_findings(findings)
    here(monkeypatch, (), None, ())
    assert "no backend can run it" in examine_bundle(folder)["backends"]["classifier/classifier"]


def test_answers_are_those_of_the_provider(folder: Path, manifest: Manifest) -> None:
    file = folder / "classifier" / "model.onnx"
    given = {
        "input_ids": np.array([[2, 5, 6, 3]]),
        "attention_mask": np.ones((1, 4), np.int64),
        "head_index": np.array([0]),
        "tail_index": np.array([1]),
        "pixel_values": np.ones((1, 3, 6, 6), np.float32),
        "image_mask": np.ones(1, np.float32),
    }
    openers = [EngineOpener(folder, manifest, "ort-cpu", threads=1)]
    openers.append(EngineOpener(folder, manifest, providers=["CPUExecutionProvider"], threads=1))
    first, second = (opener(file).run(given)["logits"] for opener in openers)
    np.testing.assert_array_equal(first, second)


def test_an_unknown_provider_is_the_users_mistake(folder: Path, manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"provider Foo: is not in this onnxruntime; expected some of .*CPU"):
        EngineOpener(folder, manifest, providers=["Foo"])
