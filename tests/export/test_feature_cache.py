"""`export --feature-cache`: two more graphs of a step, and images as PyTorch makes them with a kept feature.

PyTorch's side is the unpatched UNet with a hook on its last deep layer: at full steps it keeps that layer's answer, at
the others it puts the kept one in its place, and what the deep layers computed is lost.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.errors import InputError, ModelFolderError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_export.bf16 import widen_bfloat16
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.denoise_steps import denoise_step_graphs, write_denoise_steps
from mi2rage_export.families import family_of
from mi2rage_export.feature_cache import refuse_uncuttable, replaced_feature, with_feature
from mi2rage_export.graphs import random_inputs
from mi2rage_export.in_precision import export_in_precision
from mi2rage_export.request import ExportRequest
from mi2rage_export.verify import check_bundle
from mi2rage_rt import cli
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.samples import write_samples
from mi2rage_training.pytorch_models import TorchGenerator
from mi2rage_training.store import read_manifest
from tests.models.tiny_generator import build_generator
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import samples

STEPS = {"generator/denoise_step", "generator/denoise_step_full", "generator/denoise_step_shallow"}
PROMPTS, SEEDS = ["a dog", "two men near a red car", "a dog"], [1, 2, 3]


@pytest.fixture(scope="module")
def manifest(cached_bundle: Path) -> Manifest:
    return open_manifest(cached_bundle)


def images_by_pytorch(generator: TorchGenerator, interval: int, **settings: Any) -> np.ndarray:
    """The pipeline's images with the feature kept for `interval` steps."""
    calls, kept = [0], {}

    def replace(feature: torch.Tensor) -> torch.Tensor:
        if calls[0] % interval == 0:
            kept["feature"] = feature
        calls[0] += 1
        return kept["feature"]

    changed = TorchGenerator(generator.name, generator.pipeline, dataclasses.replace(generator.settings, **settings))
    with replaced_feature(generator.pipeline.unet, replace):
        return changed.generate(PROMPTS, SEEDS)


def test_the_bundle_holds_two_graphs_more_and_they_were_checked(cached_bundle: Path, manifest: Manifest) -> None:
    assert STEPS | {"generator/unet"} <= manifest.graphs.keys()
    names = {name: [[t.name for t in side] for side in (g.inputs, g.outputs)] for name, g in manifest.graphs.items()}
    plain = names["generator/denoise_step"]
    assert names["generator/denoise_step_full"] == [plain[0], ["next_latents", "feature"]]
    assert names["generator/denoise_step_shallow"] == [[*plain[0], "feature"], ["next_latents"]]
    assert names["generator/unet"][1] == ["out_sample"]  # as optimum has it
    for name in (*STEPS, "generator/unet"):
        graph = manifest.graphs[name]
        onnx.checker.check_model(onnx.load(cached_bundle / graph.file), full_check=True)
        engine = OrtEngine(cached_bundle / graph.file, threads=1)
        assert (engine.inputs, engine.outputs) == (graph.inputs, graph.outputs)
    shapes = {t.name: t.shape for t in manifest.graphs["generator/denoise_step_shallow"].inputs}
    assert shapes["feature"] == ("groups", "batch", 32, "height", "width")
    assert {record.subject for record in manifest.checks} == {*manifest.graphs, "generator"}
    again = check_bundle(cached_bundle, threads=1).records
    assert all(record.passed for record in again)


def test_without_the_option_nothing_differs(exported_bundle: Path, cached_bundle: Path) -> None:
    usual, cached = open_manifest(exported_bundle), open_manifest(cached_bundle)
    for name in ("unet", "denoise_step"):
        assert usual.generator and cached.generator
        assert usual.generator.graphs[name] == cached.generator.graphs[name]
    inputs = random_of(cached.graphs["generator/unet"].inputs)
    found, expected = (
        OrtEngine(folder / "generator/unet/model.onnx", threads=1).run(inputs)["out_sample"]
        for folder in (cached_bundle, exported_bundle)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def random_of(specs: Any) -> dict[str, np.ndarray]:
    sizes = {"batch": 2, "groups": 2, "height": 4, "width": 6}
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.standard_normal([axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]).astype(
            spec.dtype
        )
        for spec in specs
    }


@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        (2, {"steps": 5}),
        (3, {"steps": 10, "guidance_scale": 4.0}),
        (4, {"steps": 4, "guidance_scale": 1.0}),
        (2, {"steps": 4, "height": 40, "width": 16}),
    ],
)
def test_images_are_pytorchs_with_the_feature_kept(
    cached_bundle: Path, generator: TorchGenerator, interval: int, settings: dict[str, Any]
) -> None:
    """At most a level of 255 apart, and further from those without caching."""
    runtime = Bundle.open(cached_bundle, threads=1).generator(GenerateOptions(feature_cache=interval))
    found = runtime.generate(PROMPTS, SEEDS, GenerateOptions(feature_cache=interval, **settings))
    expected = images_by_pytorch(generator, interval, **settings)
    assert np.abs(found.astype(int) - expected).max() <= 1
    uncached = runtime.generate(PROMPTS, SEEDS, GenerateOptions(**settings))
    assert np.abs(uncached.astype(int) - images_by_pytorch(generator, 1, **settings)).max() <= 1
    plain = Bundle.open(cached_bundle, threads=1).generator().generate(PROMPTS, SEEDS, GenerateOptions(**settings))
    assert np.abs(uncached.astype(int) - plain).max() <= 1
    assert np.abs(found.astype(int) - uncached).max() > 3


def test_guidance_that_ends_has_a_full_step_of_its_own(cached_bundle: Path) -> None:
    options = GenerateOptions(steps=5, guidance_interval=(0.0, 0.5), feature_cache=2)
    runtime = Bundle.open(cached_bundle, threads=1).generator(options)
    found = runtime.generate(PROMPTS, SEEDS)
    whole = runtime.generate(PROMPTS, SEEDS, dataclasses.replace(options, feature_cache=1))
    assert found.shape == whole.shape
    assert 0 < np.abs(found.astype(int) - whole).mean() < np.abs(found[:2].astype(int) - whole[1:]).mean()


OUTSIDE = {
    *("conv_in", "conv_out", "time_embedding"),
    *(f"down_blocks.0.{part}.0" for part in ("resnets", "attentions")),
    *(f"up_blocks.1.{part}.{layer}" for part in ("resnets", "attentions") for layer in (1, 2)),
}


def test_a_unet_of_two_layers_a_block_is_cut_inside_the_block(tmp_path: Path) -> None:
    """As Stable Diffusion 1 is; in bf16, whose feature is cast at the border. At most 0.1 of the largest value."""
    attention = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2}
    attention |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    folder = build_generator(tmp_path / "model", unet_options=attention)
    generator = TorchGenerator.from_folder(folder, device="cpu")
    unet = family_of("generator", generator).graphs(generator)[1]
    references = denoise_step_graphs(unet, with_feature_cache=True)
    sizes = {"batch": 1, "groups": 2, "height": 4, "width": 6}
    cases = [(graph, random_inputs(graph, sizes, seed=number)) for number, graph in enumerate(references)]
    with torch.inference_mode():
        answers = [graph.reference(*map(torch.from_numpy, arrays.values())) for graph, arrays in cases]
    file = "generator/unet/model.onnx"
    (tmp_path / file).parent.mkdir(parents=True)
    request = ExportRequest(generator=folder, precisions={"unet": "bf16"}, feature_cache=True)
    spec = export_in_precision(with_feature(unet), tmp_path / file, file, request)
    written = write_denoise_steps(tmp_path, spec)
    for (graph, arrays), expected in zip(cases, answers, strict=True):
        step = written[graph.name.rpartition("/")[2]]
        widen_bfloat16(tmp_path / step.file, tmp_path / "wide.onnx")  # as ONNX Runtime has none on CPUs
        found = OrtEngine(tmp_path / "wide.onnx", threads=1).run(arrays)
        assert list(found) == [tensor.name for tensor in step.outputs] == [output.name for output in graph.outputs]
        for output, tensor in zip(graph.outputs, expected, strict=True):
            assert found[output.name].shape == tuple(tensor.shape)
            assert np.abs(found[output.name] - tensor.numpy()).max() < 0.1 * float(tensor.abs().max())
    shallow = onnx.load(tmp_path / written["denoise_step_shallow"].file)
    # But for norms, whose weights are all alike before training, and kept once for all.
    names = [part.name for part in shallow.graph.initializer if part.name.startswith("unet.")]
    parts = {name for name in names if "norm" not in name}
    layers = {next((layer for layer in OUTSIDE if name.startswith(f"unet.{layer}.")), name) for name in parts}
    assert layers == OUTSIDE
    assert len(shallow.graph.node) < len(onnx.load(tmp_path / written["denoise_step"].file).graph.node) / 2


def test_what_cannot_be_cut_is_refused(tiny_generator: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"feature cache: came with classifier alone; expected a generator"):
        export_bundle(tmp_path / "bundle", ExportRequest(classifier=tiny_classifier, feature_cache=True))
    generator = TorchGenerator.from_folder(tiny_generator, device="cpu")
    generator.pipeline.unet.up_blocks[-1] = torch.nn.Identity()
    with pytest.raises(ModelFolderError, match=r"outermost up block of its UNet is a Identity; expected one of Cross"):
        refuse_uncuttable(generator)
    assert not (tmp_path / "bundle").exists()


def test_the_command(cached_bundle: Path, exported_bundle: Path, tmp_path: Path) -> None:
    def run(bundle: Path, out: str, *options: str) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main(["generate", str(bundle), "a dog", "--out", str(tmp_path / out), "--steps", "5", *options])
        return int(caught.value.code or 0)

    assert run(cached_bundle, "2", "--feature-cache", "2") == 0
    assert run(cached_bundle, "1", "--feature-cache", "1") == 0
    assert run(cached_bundle, "0") == 0
    rows = [json.loads((tmp_path / name / "manifest.jsonl").read_text(encoding="utf-8")) for name in "012"]
    assert [row.get("feature_cache") for row in rows] == [None, None, 2]
    assert rows[0]["sha256"] == rows[1]["sha256"] != rows[2]["sha256"]
    for bundle, interval in ((exported_bundle, "2"), (cached_bundle, "0")):
        assert run(bundle, "none", "--feature-cache", interval) == 2
        assert not (tmp_path / "none").exists()


def test_a_store_names_it_and_goes_on_with_no_other(
    cached_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Bundle.open(build_bundle(tmp_path / "words", parts=("captioner",)), threads=1).captioner
    monkeypatch.setattr(Bundle, "captioner", lambda _, options: words(options))
    write_samples(tmp_path / "rows.jsonl", samples(3))
    store = tmp_path / "store"

    def run(*options: str) -> int:
        given = [str(tmp_path / "rows.jsonl"), str(store), "--bundle", str(cached_bundle), "--links", "1", *options]
        with pytest.raises(SystemExit) as caught:
            cli.main(["synthesize", *given])
        return int(caught.value.code or 0)

    assert run("--feature-cache", "3") == 0, capsys.readouterr().err
    assert read_manifest(store).settings["models"]["feature_cache"] == 3
    assert run("--feature-cache", "3") == 0
    capsys.readouterr()
    for options in ((), ("--feature-cache", "2")):
        assert run(*options) == 2
        assert "other settings" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(store)
    assert run() == 0
    assert "feature_cache" not in read_manifest(store).settings["models"]
