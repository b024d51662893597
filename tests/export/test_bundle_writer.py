"""The bundle as a whole: what stands in it, that the runtime answers as PyTorch does, and what leaves no trace."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from mi2rage_engines.bundle import Manifest
from mi2rage_engines.errors import InputError, Mi2rageError, MissingExtraError, ModelFolderError, ParityError
from mi2rage_export import bundle_writer
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.request import ExportRequest, precisions_from_options
from mi2rage_export.schedules import schedule_tables
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import RuntimeGenerator
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training.pytorch_models import TorchGenerator
from tests.models.tiny_captioner import random_images
from tests.models.tiny_classifier import random_samples

SAMPLERS = [("lcm", 4, 1.0), ("euler-ancestral", 6, 3.0), ("euler", 5, 2.0)]
PROMPTS = ["a dog", "two men near a red car", "RT @user: caf\u00e9! #park", ""]


@pytest.fixture(scope="module")
def bundle(exported_bundle):
    return Bundle.open(exported_bundle)


def test_the_layout_is_optimums(exported_bundle):
    files = {path.relative_to(exported_bundle).as_posix() for path in exported_bundle.rglob("*") if path.is_file()}
    assert files == {
        "bundle.json",
        "parity/references.json",
        *(f"parity/generator-{part}.npz" for part in ("text_encoder", "unet", "denoise_step", "vae_decoder")),
        *(f"parity/{name}.npz" for name in ("generator", "captioner-vision", "captioner-decoder")),
        *(f"parity/{name}.npz" for name in ("classifier", "classifier-image", "classifier-classifier")),
        "generator/model_index.json",
        "generator/scheduler/scheduler_config.json",
        "generator/tokenizer/merges.txt",
        "generator/tokenizer/tokenizer.json",
        "generator/tokenizer/tokenizer_config.json",
        "generator/tokenizer/vocab.json",
        *(f"generator/{part}/config.json" for part in ("text_encoder", "unet", "vae_decoder")),
        *(f"generator/{part}/model.onnx" for part in ("text_encoder", "unet", "vae_decoder")),
        "generator/unet/denoise_step.onnx",
        "captioner/tokenizer.json",
        "captioner/vision.onnx",
        "captioner/decoder.onnx",
        "classifier/tokenizer.json",
        "classifier/image.onnx",
        "classifier/classifier.onnx",
    }


def test_graphs_have_the_tensors_of_the_manifest(exported_bundle, manifest):
    assert len(manifest.graphs) == 8
    for graph in manifest.graphs.values():
        model = onnx.load(exported_bundle / graph.file)
        onnx.checker.check_model(model)
        for values, specs in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            found = [
                (value.name, tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim))
                for value in values
            ]
            assert found == [(spec.name, spec.shape) for spec in specs]
        assert model.opset_import[0].version == graph.opset == 20


def test_the_manifest_says_what_was_made_of_what(manifest, tiny_generator):
    assert manifest.source["generator"] == str(tiny_generator)
    assert manifest.precision == "fp32"
    assert manifest.licences == dict.fromkeys(("generator", "captioner", "classifier"), "unknown")
    assert {"python", "torch", "onnx", "onnxruntime", "diffusers"} <= manifest.tool_versions.keys()
    assert {record.subject for record in manifest.parity} == {
        "generator/text_encoder",
        "generator/unet",
        "generator/denoise_step",
        "generator/vae_decoder",
        "captioner/vision",
        "captioner/decoder",
        "classifier/image",
        "classifier/classifier",
        "generator",
        "captioner",
        "classifier",
    }
    assert all(record.passed and record.cases >= 2 for record in manifest.parity)
    assert {record.measure for record in manifest.checks} >= {"max_abs_scaled", "cosine", "image_psnr_db"}
    assert manifest.generator.latents.multiple == 2
    assert manifest.generator.latents.downsampling == 4
    assert (manifest.generator.steps, manifest.generator.guidance_scale) == (4, 2.0)


def test_nothing_of_this_machine_stands_in_the_files(exported_bundle, tiny_generator):
    for path in exported_bundle.rglob("*"):
        if path.is_file() and path.name != "bundle.json":
            content = path.read_bytes()
            assert str(tiny_generator.parent).encode() not in content, path
            assert b"site-packages" not in content, path


def test_images_equal_the_pipelines(bundle, generator):
    """Mean absolute difference at most 1/255; in fp32 hardly a pixel differs."""
    found, expected = bundle.generator().generate(PROMPTS, [1, 2, 3, 4]), generator.generate(PROMPTS, [1, 2, 3, 4])
    assert np.abs(found.astype(float) - expected).mean() <= 1.0


@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance"), [("lcm", 4, 1.0), ("euler-ancestral", 6, 3.0), ("euler", 5, 2.0)]
)
def test_any_sampler_equals_the_pipelines_on_the_same_graphs(
    exported_bundle, manifest, tiny_generator, scheduler, steps, guidance
):
    reference = TorchGenerator.from_folder(
        tiny_generator, device="cpu", scheduler=scheduler, steps=steps, guidance_scale=guidance
    )
    tables = schedule_tables(reference.pipeline.scheduler, [steps])
    spec = manifest.generator.model_copy(update={"schedules": tables, "steps": steps, "guidance_scale": guidance})
    engines = Bundle(exported_bundle, manifest)._engines(spec.graphs)
    runtime = RuntimeGenerator(spec, engines, PlainTokenizer(spec.tokenizer, exported_bundle))
    found, expected = runtime.generate(PROMPTS, [1, 2, 3, 4]), reference.generate(PROMPTS, [1, 2, 3, 4])
    assert np.abs(found.astype(float) - expected).mean() <= 1.0


def test_other_sizes_than_the_traced_ones(bundle, tiny_generator):
    from mi2rage_rt.generator import GenerateOptions

    reference = TorchGenerator.from_folder(tiny_generator, device="cpu", height=40, width=16)
    found = bundle.generator().generate(PROMPTS[:3], [1, 2, 3], GenerateOptions(height=40, width=16))
    assert found.shape == (3, 40, 16, 3)
    assert np.abs(found.astype(float) - reference.generate(PROMPTS[:3], [1, 2, 3])).mean() <= 1.0


@pytest.mark.parametrize("seeds", [None, [5, 6, 7, 8, 9, 10]])
@pytest.mark.parametrize("prefixes", [None, ["a photo of", "", "a", "a dog", "", "the man"]])
def test_captions_equal_transformers(bundle, captioner, seeds, prefixes):
    images = list(random_images(6, seed=1))
    assert bundle.captioner().caption(images, prefixes, seeds) == captioner.caption(images, prefixes, seeds)


def test_logits_equal_pytorchs(bundle, classifier):
    samples, images = random_samples(9), [*random_images(8, pixels=30), None]
    found, expected = bundle.classifier().logits(samples, images), classifier.logits(samples, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_bundle_that_is_there_stays_without_force(exported_bundle, tiny_captioner, tmp_path, monkeypatch):
    folder = shutil.copytree(exported_bundle, tmp_path / "bundle")
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(InputError, match="--force to replace it"):
        export_bundle(folder, ExportRequest(captioner=tiny_captioner))
    monkeypatch.setattr(bundle_writer._Writer, "_export", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(folder, ExportRequest(captioner=tiny_captioner), force=True)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _never(*_: object) -> None:
    raise AssertionError("something was exported")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InputError, "no model was given"),
        ({"generator": "./missing"}, ModelFolderError, "no such generator folder"),
        ({"captioner": "./missing"}, ModelFolderError, "no such captioner folder"),
        ({"classifier": "./missing"}, ModelFolderError, "no such folder"),
    ],
)
def test_wrong_input_leaves_nothing(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.setattr(bundle_writer._Writer, "_export", _never)
    with pytest.raises(error, match=message) as caught:
        export_bundle(tmp_path / "bundle", ExportRequest(**arguments))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_are_refused_before_anything_is_traced(tiny_generator, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_writer._Writer, "_export", _never)

    def refused(message: str, file: str, **changes: object) -> None:
        folder = shutil.copytree(tiny_generator, tmp_path / "changed")
        config = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(config | changes), encoding="utf-8")
        with pytest.raises(ModelFolderError, match=message):
            export_bundle(tmp_path / "bundle", ExportRequest(generator=folder))
        shutil.rmtree(folder)
        assert list(tmp_path.iterdir()) == []

    refused("scheduler DDIMScheduler: its step is not affine", "scheduler/scheduler_config.json", thresholding=True)
    refused("its class is FluxPipeline; expected", "model_index.json", _class_name="FluxPipeline")


def test_a_multi_step_solver_is_refused_with_a_way_out(tiny_generator, tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr(bundle_writer._Writer, "_export", _never)
    folder = shutil.copytree(tiny_generator, tmp_path / "pndm")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    with pytest.raises(ModelFolderError, match=r"scheduler PNDMScheduler: calls the model .* --scheduler ddim"):
        export_bundle(tmp_path / "bundle", ExportRequest(generator=folder))
    with pytest.raises(AssertionError, match="something was exported"):
        export_bundle(tmp_path / "bundle", ExportRequest(generator=folder, scheduler="euler"))


def test_a_graph_that_differs_is_not_written(tiny_captioner, tmp_path, monkeypatch):
    import torch

    from mi2rage_export.families import blip

    whole = blip.BlipVision.forward

    def broken(self: object, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *states, last = whole(self, pixel_values)
        return *states, last * 1.01

    monkeypatch.setattr(blip.BlipVision, "forward", broken)
    with pytest.raises(ParityError, match=r"captioner/vision: max_abs_scaled is .*; the exported model answers diff"):
        export_bundle(tmp_path / "bundle", ExportRequest(captioner=tiny_captioner))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_export_prints_all_figures(tmp_path, monkeypatch, capsys):
    from mi2rage_export import commands, parity

    records = [
        parity.record("captioner/vision", "cosine", 0.9999989, 0.999999, 3, least=True),
        parity.record("captioner/vision", "max_abs", 0.5, None, 3),
    ]
    monkeypatch.setattr(bundle_writer, "export_bundle", lambda *_args, **_options: parity.demand(records))
    with pytest.raises(ParityError, match=r"cosine is 0\.9999989 over 3 inputs, the bound is 0\.999999;"):
        commands.export(tmp_path / "bundle", captioner="embedded")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split() for line in printed.err.splitlines()] == [
        ["captioner/vision", "cosine", "0.9999989", "(bound", "0.999999)", "FAILED"],
        ["captioner/vision", "max_abs", "0.5"],
    ]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mi2rage-rt\[export\]'"):
        export_bundle(tmp_path / "bundle", ExportRequest(classifier=tmp_path))


def test_the_command_prints_a_summary_or_the_manifest(exported_bundle, manifest, tmp_path, monkeypatch):
    import typer

    from mi2rage_export import commands

    monkeypatch.setattr(bundle_writer, "export_bundle", lambda out, request, **_: manifest)
    app = typer.Typer()
    app.command()(commands.export)
    run = CliRunner().invoke(app, ["--out", str(tmp_path / "b"), "--captioner", "x"])
    assert run.exit_code == 0, run.output
    assert "generator/unet" in run.output
    assert "captioner" in run.output
    run = CliRunner().invoke(app, ["--out", str(tmp_path / "b"), "--captioner", "x", "--json"])
    assert Manifest.model_validate_json(run.output) == manifest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opset": 26}, "opset 26: expected 18 to 25"),
        ({"precisions": {"": "int8-qdq"}}, "give samples with --calibration"),
        ({"precisions": {"unet": "fp16"}}, "precision of 'unet': no such graph here; expected one of captioner"),
        (
            {"precisions": {"": "fp16"}, "keep_fp32": {"captioner": ("vision_model",)}},
            "keep in fp32 of 'captioner': no such graph here; expected one of captioner/vision, captioner/decoder",
        ),
        (
            {"precisions": {"vision": "fp32", "": "fp16"}, "keep_fp32": {"vision": ("nonsense",)}},
            "keep in fp32 of captioner/vision: came with nonsense; expected a graph in a lower precision",
        ),
    ],
)
def test_requests_that_cannot_be_met(tiny_captioner, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        export_bundle(tmp_path / "bundle", ExportRequest(captioner=tiny_captioner, **fields))
    assert list(tmp_path.iterdir()) == []


def test_precisions_by_graph_component_or_for_all():
    request = ExportRequest(
        captioner="x", precisions=precisions_from_options(["fp16", "generator=fp32", "vae_decoder=bf16"])
    )
    names = ("generator/unet", "generator/vae_decoder", "captioner/vision")
    assert [request.precision_of(name) for name in names] == ["fp32", "bf16", "fp16"]
    for option in ("half", "unet=half", "=fp16"):
        with pytest.raises(InputError, match="expected one of fp32, fp16, bf16, int8-weights"):
            precisions_from_options([option])
    with pytest.raises(InputError, match="was given before"):
        precisions_from_options(["unet=fp16", "unet=fp32"])


def test_the_errors_are_of_the_one_tree():
    assert issubclass(ParityError, Mi2rageError)
