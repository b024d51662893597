from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_engines.errors import BundleError
from mi2rage_engines.plan import (
    PLAN_SCHEMA_VERSION,
    PlanRecord,
    PlanRequest,
    Present,
    check_plan,
    graph_sha256,
    graph_sha256_from_manifest,
    read_record,
    record_path,
    request_for,
)
from mi2rage_engines.profiles import default_profile, profile_from_text
from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec
from mi2rage_engines.trt_api import Device
from mi2rage_engines.trt_attest import Attestation
from mi2rage_engines.trt_build import BuildOptions
from tests.engines.trt_graphs import fake_api
from tests.runtime.tiny_bundle import build_bundle

GRAPH = GraphSpec(
    file="g.onnx",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(),
    opset=20,
    axes={"batch": AxisRange(min=1, opt=2, max=4)},
)
OPTIONS = BuildOptions((default_profile(GRAPH),), ("sm90",))
REQUEST = request_for(fake_api("11.4.0"), Device("NVIDIA H100", "sm90"), GRAPH, "a" * 64, OPTIONS)
HERE = Present("tensorrt", "11.4.0", "sm90", "a" * 64)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "plans" / "sm90" / "generator-unet.plan"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a plan")
    record = PlanRecord(
        schema_version=PLAN_SCHEMA_VERSION,
        graph="generator/unet",
        request=REQUEST,
        plan_sha256=hashlib.sha256(b"a plan").hexdigest(),
        plan_bytes=6,
        attestation=Attestation(
            source="network", asked="fp32", layers={"fp32": 1}, heavy_layers={}, network_heavy_layers={}, share=1.0
        ),
        build_seconds=1.5,
        tool_versions={},
    )
    record_path(path).write_text(record.model_dump_json(indent=2))
    return path


def test_a_plan_that_belongs_here(plan: Path) -> None:
    record = read_record(plan)
    assert record.request == REQUEST and record.request.device == "NVIDIA H100" and record.request.cuda == "12"
    check_plan(plan, record, HERE)
    check_plan(plan, record, HERE, inputs=GRAPH, shapes={"x": (4, 4)})


@pytest.mark.parametrize(
    ("present", "words"),
    [
        (Present("tensorrt-rtx", "11.4.0"), ["the library here is tensorrt-rtx", "expected tensorrt"]),
        (Present("tensorrt", "11.4.1"), ["tensorrt here is 11.4.1", "expected 11.4.0"]),
        (Present("tensorrt", "11.4.0", "sm89"), ["the GPU here is sm89", "expected sm90"]),
        (Present("tensorrt", "11.4.0", "sm90", "b" * 64), ["generator/unet is another one now", "bbbb", "aaaa"]),
    ],
)
def test_what_differs_is_named_with_the_command_that_helps(plan: Path, present: Present, words: list[str]) -> None:
    with pytest.raises(BundleError) as caught:
        check_plan(plan, read_record(plan), present)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert (
        f"mi2rage-rt build {plan.parents[2]} --graph generator/unet --target sm90 --backend tensorrt "
        "--profile batch=1:2:4 --force" in message
    )


def test_changed_or_missing_bytes(plan: Path) -> None:
    record = read_record(plan)
    for content, words in ((b"A plan", "its content is changed"), (b"a pla", "its size is 5 bytes; expected 6")):
        plan.write_bytes(content)
        with pytest.raises(BundleError, match=words):
            check_plan(plan, record, HERE)
    plan.unlink()
    with pytest.raises(BundleError, match="the plan is missing"):
        check_plan(plan, record, HERE)


def test_shapes_that_no_profile_holds(plan: Path) -> None:
    with pytest.raises(BundleError, match=r"axis batch of input x is 5, outside of 1 to 4; expected .*batch=1:2:4"):
        check_plan(plan, read_record(plan), HERE, inputs=GRAPH, shapes={"x": (5, 4)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"schema_version": 99}', "plan schema version 99; this release reads 1"),
        ('{"schema_version": 1}', "graph: Field required"),
    ],
)
def test_damaged_records(plan: Path, text: str, words: str) -> None:
    record_path(plan).write_text(text)
    with pytest.raises(BundleError, match=words) as caught:
        read_record(plan)
    assert "mi2rage-rt build" in str(caught.value)
    record_path(plan).unlink()
    with pytest.raises(BundleError, match=r"has no readable record generator-unet\.json"):
        read_record(plan)


def test_the_key_is_of_everything(plan: Path) -> None:
    again = PlanRequest.model_validate_json(REQUEST.model_dump_json())
    assert again.key == REQUEST.key and len(REQUEST.key) == 64 and REQUEST.differences(again) == ()
    changes = {
        "graph_sha256": "b" * 64,
        "version": "11.4.1",
        "backend": "tensorrt-rtx",
        "cuda": None,
        "capabilities": ("sm90", "sm89"),
        "device": "NVIDIA H200",
        "platform": "Windows-AMD64",
        "profiles": (dict(profile_from_text("batch=1:2:5").axes),),
        "precision": "fp16",
        "is_mixed": True,
        "optimization_level": 5,
        "workspace_bytes": 1,
        "tf32": True,
    }
    assert set(changes) == set(PlanRequest.model_fields)
    keys = {REQUEST.model_copy(update={field: value}).key for field, value in changes.items()}
    assert len(keys | {REQUEST.key}) == len(changes) + 1
    other = REQUEST.model_copy(update={"version": "11.4.1", "profiles": changes["profiles"]})
    assert REQUEST.differences(other) == (
        "version is 11.4.1, not 11.4.0",
        "profiles is batch=1:2:5, not batch=1:2:4",
    )


def test_the_hash_of_a_graph_is_of_its_weights_too(tmp_path: Path) -> None:
    folder = build_bundle(tmp_path / "b", parts=("classifier",))
    path = folder / "classifier" / "model.onnx"
    first = graph_sha256(path)
    assert first == graph_sha256_from_manifest(open_manifest(folder), "classifier/model.onnx")
    (folder / "classifier" / "model.onnx_data").write_bytes(b"weights")
    second = graph_sha256(path)
    (folder / "classifier" / "model.onnx_data").write_bytes(b"wEights")
    assert len({first, second, graph_sha256(path)}) == 3
    document = json.loads((folder / "bundle.json").read_text())
    data = folder / "classifier" / "model.onnx_data"
    document["files"]["classifier/model.onnx_data"] = {
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "bytes": 7,
    }
    (folder / "bundle.json").write_text(json.dumps(document))
    assert graph_sha256(path) == graph_sha256_from_manifest(open_manifest(folder), "classifier/model.onnx")


def test_weights_that_another_graph_brings_count_too(tmp_path: Path) -> None:
    step, weights = tmp_path / "denoise_step.onnx", tmp_path / "model.onnx_data"
    step.write_bytes(b"step")
    weights.write_bytes(b"weights")
    first = graph_sha256(step)
    weights.write_bytes(b"wEights")
    second = graph_sha256(step)
    (tmp_path / "model.onnx").write_bytes(b"another graph")
    (tmp_path / "decoder.onnx_data").write_bytes(b"weights of another graph")
    assert first != second == graph_sha256(step)
