"""What `inspect` says of a bundle."""

from __future__ import annotations

import json

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_engines.plan import PLAN_SCHEMA_VERSION, PlanRecord, PlanRequest
from mi2rage_engines.spec import AxisRange, TensorSpec
from mi2rage_engines.trt_attest import Attestation
from mi2rage_rt.bundle_page import page_from_manifest, size_text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (3_440_000_000, "3.4 GB")])
def test_sizes(count, text):
    assert size_text(count) == text


def test_the_page_has_components_graphs_axes_parity_and_plans(bundle_folder, tmp_path):
    manifest = open_manifest(bundle_folder)
    page = page_from_manifest(bundle_folder, manifest)
    for name, graph in manifest.graphs.items():
        line = next(line for line in page.splitlines() if line.strip().startswith(f"{name}  "))
        assert f"{graph.precision}, opset {graph.opset}" in line
    assert "in   input_ids int64[batch, sequence]" in page
    assert "plans: none; 'mi2rage-rt build' makes them" in page
    assert "classifier               max_abs             1e-06  (bound 0.0001)" in page
    (tmp_path / "plans" / "sm89").mkdir(parents=True)
    (tmp_path / "plans" / "sm89" / "generator-unet.plan").write_bytes(b"x" * 2_000)
    assert "plans/sm89/generator-unet.plan  2.0 kB, without a readable record" in page_from_manifest(tmp_path, manifest)
    (tmp_path / "plans" / "sm89" / "generator-unet.json").write_text(record_text("generator/unet"))
    page = page_from_manifest(tmp_path, manifest)
    assert "generator-unet.plan  2.0 kB, 75% fp16 (build log), tensorrt-rtx 1.4.0\n" in page
    assert page.endswith("    profiles batch=1:2:4; batch=8:8:8")


def record_text(name: str) -> str:
    axes = ({"batch": AxisRange(min=1, opt=2, max=4)}, {"batch": AxisRange(min=8, opt=8, max=8)})
    request = PlanRequest(
        graph_sha256="a" * 64,
        backend="tensorrt-rtx",
        version="1.4.0",
        cuda=None,
        capabilities=("sm89",),
        device=None,
        platform="Linux-x86_64",
        profiles=axes,
        precision="fp16",
        is_mixed=True,
        optimization_level=None,
        workspace_bytes=None,
        tf32=False,
    )
    counts = {"fp16": 3, "fp32": 1}
    return PlanRecord(
        schema_version=PLAN_SCHEMA_VERSION,
        graph=name,
        request=request,
        plan_sha256="b" * 64,
        plan_bytes=2000,
        attestation=Attestation(
            source="build log",
            asked="fp16",
            layers=counts,
            heavy_layers=counts,
            network_heavy_layers=counts,
            share=0.75,
        ),
        build_seconds=1.0,
        tool_versions={},
    ).model_dump_json()


def test_tensors_of_many_layers_are_folded(bundle_folder):
    manifest = open_manifest(bundle_folder)
    vision = manifest.captioner.graphs["vision"]
    cross = [
        TensorSpec(name=f"cross_{kind}_{layer}", dtype="float32", shape=("batch", 12, 577, 64))
        for kind in ("keys", "values")
        for layer in range(12)
    ]
    wide = vision.model_copy(update={"outputs": (*cross, TensorSpec(name="last", dtype="float32", shape=("batch",)))})
    graphs = {**manifest.captioner.graphs, "vision": wide}
    changed = manifest.model_copy(update={"captioner": manifest.captioner.model_copy(update={"graphs": graphs})})
    page = page_from_manifest(bundle_folder, changed)
    for kind in ("keys", "values"):
        assert f"cross_{kind}_0 .. cross_{kind}_11 float32[batch, 12, 577, 64]" in page
    assert "; last float32[batch]" in page or "\n         last float32[batch]" in page
    assert max(map(len, page.splitlines()[1:])) <= 120


def test_the_command_prints_the_page_or_the_manifest(bundle_folder, capsys):
    from mi2rage_rt.commands import inspect

    inspect(bundle_folder)
    assert str(bundle_folder) in capsys.readouterr().out
    inspect(bundle_folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["schema_version"] == 2
