from __future__ import annotations

from pathlib import Path

import pytest

from mi2rage_engines.backend import (
    BackendName,
    Findings,
    FoundPlan,
    backend_from_text,
    choose,
    refuse_what_cannot_run,
)
from mi2rage_engines.errors import InputError
from mi2rage_engines.trt_api import Backend, Device

GPU = Device("NVIDIA L4", "sm89")
CPU_ONLY, WITH_CUDA = ("CPUExecutionProvider",), ("CUDAExecutionProvider", "CPUExecutionProvider")
WITH_ALL = ("TensorrtExecutionProvider", *WITH_CUDA)
BOTH = (Backend.TENSORRT, Backend.TENSORRT_RTX)
PLAN = FoundPlan(Path("b/plans/sm89/generator-unet.plan"))
NONE = FoundPlan(None, "the bundle has no plan of it")
OLD = FoundPlan(None, "sm89: tensorrt here is 11.4.0; expected 10.9.0, the one that built it")
FITS = {Backend.TENSORRT: PLAN, Backend.TENSORRT_RTX: PLAN}


@pytest.mark.parametrize(
    ("found", "plans", "backend", "words"),
    [
        (Findings(CPU_ONLY, None, ()), {}, "ort-cpu", ["because no GPU is visible"]),
        (Findings(WITH_ALL, None, BOTH), FITS, "ort-cpu", ["because no GPU is visible"]),
        (Findings(WITH_CUDA, GPU, BOTH), FITS, "tensorrt", ["a plan (sm89) for the GPU here, NVIDIA L4 (sm89)"]),
        (Findings(WITH_CUDA, GPU, BOTH[1:]), FITS, "tensorrt-rtx", ["because the bundle has a plan"]),
        (
            Findings(WITH_CUDA, GPU, BOTH),
            {Backend.TENSORRT: OLD, Backend.TENSORRT_RTX: PLAN},
            "tensorrt-rtx",
            ["because the bundle has a plan"],
        ),
        (
            Findings(WITH_ALL, GPU, BOTH[:1]),
            {Backend.TENSORRT: OLD},
            "ort-cuda",
            ["NVIDIA L4 (sm89)", "expected 10.9.0", "tensorrt-rtx is not installed; pip install"],
        ),
        (
            Findings(CPU_ONLY, GPU, BOTH),
            dict.fromkeys(BOTH, NONE),
            "ort-cpu",
            ["ort-cuda: this onnxruntime has no CUDA", "pip uninstall onnxruntime, then pip install 'mi2rage-rt[gpu]'"],
        ),
    ],
)
def test_auto_takes_the_best_and_says_why(
    found: Findings, plans: dict[Backend, FoundPlan], backend: str, words: list[str]
) -> None:
    choice = choose(BackendName.AUTO, found, plans, "generator/unet")
    assert choice.backend == backend and choice.sentence.startswith(f"{backend}, because ")
    assert all(word in choice.sentence for word in words), choice.sentence
    assert (choice.plan is not None) == backend.startswith("tensorrt") == (not choice.providers)


@pytest.mark.parametrize(
    ("backend", "providers"),
    [
        (BackendName.ORT_CPU, CPU_ONLY),
        (BackendName.ORT_CUDA, WITH_CUDA),
        (BackendName.ORT_TENSORRT, WITH_ALL),
        (BackendName.TENSORRT, ()),
        (BackendName.TENSORRT_RTX, ()),
    ],
)
def test_what_is_asked_for_is_taken(backend: BackendName, providers: tuple[str, ...]) -> None:
    choice = choose(backend, Findings(WITH_ALL, GPU, BOTH), FITS, "generator/unet")
    assert choice.sentence == f"{backend}, because it was asked for"
    assert (choice.backend, choice.providers) == (backend, providers)
    assert choice.plan == (None if providers else PLAN.path)


@pytest.mark.parametrize(
    ("backend", "found", "words"),
    [
        ("ort-cpu", Findings((), None, BOTH), ["onnxruntime is not installed", "pip install 'mi2rage-rt[cpu]'"]),
        ("ort-cuda", Findings((), GPU, ()), ["onnxruntime is not installed; pip install 'mi2rage-rt[gpu]'"]),
        ("ort-cuda", Findings(CPU_ONLY, GPU, ()), ["has no CUDAExecutionProvider; pip uninstall onnxruntime, then"]),
        ("ort-cuda", Findings(WITH_CUDA, None, ()), ["no GPU is visible to the CUDA driver", "CUDA_VISIBLE_DEVICES"]),
        ("ort-tensorrt", Findings(WITH_CUDA, GPU, ()), ["no TensorrtExecutionProvider", "mi2rage-rt[gpu,tensorrt]"]),
        ("tensorrt", Findings(WITH_ALL, GPU, BOTH[1:]), ["tensorrt is not installed", "'mi2rage-rt[tensorrt]'"]),
        ("tensorrt-rtx", Findings(WITH_ALL, GPU, BOTH[:1]), ["tensorrt-rtx is not", "'mi2rage-rt[tensorrt-rtx]'"]),
        ("tensorrt", Findings(WITH_ALL, None, BOTH), ["no GPU is visible"]),
    ],
)
def test_what_cannot_run_is_refused_with_what_is_missing(backend: str, found: Findings, words: list[str]) -> None:
    for refuse in (
        lambda: refuse_what_cannot_run(BackendName(backend), found),
        lambda: choose(BackendName(backend), found, FITS, "generator/unet"),
    ):
        with pytest.raises(InputError) as caught:
            refuse()
        message = str(caught.value)
        assert message.startswith(f"backend {backend}: ") and "--backend auto" in message
        assert all(word in message for word in words), message


def test_a_plan_that_is_missing_comes_with_the_command_that_builds_it() -> None:
    with pytest.raises(InputError) as caught:
        choose(BackendName.TENSORRT, Findings(WITH_ALL, GPU, BOTH), dict.fromkeys(BOTH, OLD), "generator/unet")
    message = str(caught.value)
    assert "generator/unet: cannot run on tensorrt: sm89: tensorrt here is 11.4.0" in message
    assert "mi2rage-rt build BUNDLE --graph generator/unet --target this --backend tensorrt" in message


def test_nothing_at_all() -> None:
    refuse_what_cannot_run(BackendName.AUTO, Findings((), None, ()))
    with pytest.raises(InputError, match=r"no backend can run it: tensorrt: .*ort-cpu: .*'mi2rage-rt\[cpu\]'"):
        choose(BackendName.AUTO, Findings((), None, ()), {}, "generator/unet")


def test_names() -> None:
    assert backend_from_text("ort-cuda") is BackendName.ORT_CUDA
    with pytest.raises(InputError, match=r"backend 'gpu'.*expected one of auto, ort-cpu, ort-cuda, ort-tensorrt, tens"):
        backend_from_text("gpu")
