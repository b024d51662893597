"""A tiny member of every family: exported in fp16 as a bundle, checked, and built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.families import families
from mi2rage_export.request import ExportRequest
from tests.models.tiny_captioner import build_captioner
from tests.models.tiny_classifier import build_classifier
from tests.models.tiny_encoder_decoder import build_encoder_decoder
from tests.models.tiny_generator import build_generator, build_lcm, build_xl

MEMBERS = {
    "stable-diffusion": ("generator", functools.partial(build_generator, vae="tiny")),
    "stable-diffusion-xl": ("generator", build_xl),
    "latent-consistency": ("generator", build_lcm),
    "blip": ("captioner", build_captioner),
    "vision-encoder-decoder": ("captioner", build_encoder_decoder),
    "blip, preprocessing": ("captioner", build_captioner),
    "relation-classifier": ("classifier", build_classifier),
}
SAMPLER = {"latents", "coefficients", "guidance", "noise", "next_latents"}
"""What of the denoising steps is float32 in any precision: only the UNet in them has one."""
TARGETS = "sm80+sm86+sm89+sm120"


def test_every_family_is_here():
    assert {family.name for family in families()} == {name.partition(",")[0] for name in MEMBERS}


@pytest.fixture(scope="module", params=MEMBERS, ids=str)
def bundle(request, tmp_path_factory):
    role, make = MEMBERS[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(", ", "-"))
    prepares = request.param.endswith("preprocessing")
    make(folder / "model")
    request = ExportRequest(**{role: folder / "model"}, precisions={"": "fp16"}, feature_cache=role == "generator")
    request = dataclasses.replace(request, preprocess_in_graph=prepares)
    export_bundle(folder / "bundle", request)
    return folder / "bundle"


def test_fp16_holds_its_bounds(bundle):
    manifest = open_manifest(bundle)
    assert manifest.precision == "fp16"
    assert all(record.passed for record in manifest.parity)
    # Captions in a lower precision are judged by the decoder's logits.
    whole = {component.kind for component in manifest.components} - {"captioner"}
    assert {record.subject for record in manifest.checks} == {*manifest.graphs, *whole}
    for name, graph in manifest.graphs.items():
        floats = {tensor.name: tensor.dtype for tensor in (*graph.inputs, *graph.outputs) if "float" in tensor.dtype}
        in_fp32 = {"timestep"} | (SAMPLER if name.startswith("generator/denoise_step") else set())
        if "image" in {tensor.name for tensor in graph.inputs}:
            assert graph.kept_fp32 == ("preprocessing",)
            in_fp32 |= {"rows", "columns"}
        assert {dtype for tensor, dtype in floats.items() if tensor not in in_fp32} == {"float16"}


def test_tensorrt_builds_and_attests_it(bundle, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from mi2rage_rt.build import BuildSettings, build_bundle

    monkeypatch.setenv("MI2RAGE_CACHE", str(tmp_path))
    results = build_bundle(bundle, BuildSettings(backend="tensorrt-rtx", targets=(TARGETS,)))
    assert len(results) == len(open_manifest(bundle).graphs)
    for result in results:
        attested = result.record.attestation
        print(f"{result.path.stem}: {attested.share:.0%} of {sum(attested.layers.values())} layers in fp16")
        least = 0.5 if result.record.request.is_mixed else 0.9
        assert attested.share >= least


def test_tensorrt_builds_fp32(exported_bundle, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from mi2rage_rt.build import BuildSettings, build_bundle

    bundle = shutil.copytree(exported_bundle, tmp_path / "bundle")
    monkeypatch.setenv("MI2RAGE_CACHE", str(tmp_path / "cache"))
    results = build_bundle(bundle, BuildSettings(backend="tensorrt-rtx", targets=(TARGETS,)))
    assert len(results) == len(open_manifest(bundle).graphs)
    assert {(result.record.attestation.asked, result.record.attestation.share) for result in results} == {("fp32", 1.0)}
