"""SDXL, LCM, tiny VAE and samplers: images of the exported graphs, run without PyTorch, against diffusers' pipelines.

Parts that are alike in all tiny pipelines (text encoder and VAE) are taken from the shared bundle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mi2rage_engines.engine import HostEngine
from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import GeneratorSpec, GraphSpec
from mi2rage_export.families import family_of
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.schedules import schedule_tables
from mi2rage_export.to_onnx import export_graph
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training.pytorch_models import TorchGenerator
from tests.models.tiny_generator import _scheduler, _vae, build_generator, build_lcm, build_xl

PROMPTS = ["a dog", "two men near a red car", "RT @user: caf\u00e9! #park", ""]
SEEDS = [1, 2, 3, 4]


class Watched(HostEngine):
    """An engine that keeps what it was given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(dict(inputs))
        return self.engine.run(inputs)


class Exported:
    """A generator whose graphs are exported as they are asked for, or taken from elsewhere."""

    def __init__(self, generator: TorchGenerator, folder: Path) -> None:
        self.generator = generator
        self.folder = folder
        self.family = family_of("generator", generator)
        self.graphs: dict[str, Graph] = {
            graph.name.rpartition("/")[2]: graph for graph in self.family.graphs(generator)
        }
        self.specs: dict[str, GraphSpec] = {}
        self.engines: dict[str, OrtEngine] = {}
        (folder / "generator").mkdir(parents=True)
        self.fields = self.family.write(folder / "generator", generator)

    def export(self, *names: str) -> None:
        for name in names:
            file = f"generator/{name}/model.onnx"
            self.specs[name] = export_graph(self.graphs[name], self.folder / file, file)
            self.engines[name] = OrtEngine(self.folder / file, threads=1)

    def take(self, specs: dict[Any, GraphSpec], folder: Path, *names: str) -> None:
        for name in names:
            self.specs[name] = specs[name]
            self.engines[name] = OrtEngine(folder / specs[name].file, threads=1)

    def spec(self, **changes: Any) -> GeneratorSpec:
        return GeneratorSpec(**{"graphs": self.specs, **self.fields, **changes})

    def runtime(self, **changes: Any) -> RuntimeGenerator:
        spec = self.spec(**changes)
        second = PlainTokenizer(spec.tokenizer_2, self.folder) if spec.tokenizer_2 else None
        tokenizer = PlainTokenizer(spec.tokenizer, self.folder)
        return RuntimeGenerator(spec, self.engines, tokenizer, tokenizer_2=second)


def _as_pipelines(found: np.ndarray, expected: np.ndarray) -> None:
    """Mean absolute difference at most 1/255; in fp32 hardly a pixel differs."""
    assert np.abs(found.astype(float) - expected).mean() <= 1.0
    assert expected.std() > 10


def _set(generator: TorchGenerator, **changes: Any) -> TorchGenerator:
    """The same pipeline with other settings."""
    settings = type(generator.settings)(**{**vars(generator.settings), **changes})
    return TorchGenerator(generator.name, generator.pipeline, settings)


@pytest.fixture(scope="module")
def shared(exported_bundle, manifest) -> tuple[dict[Any, GraphSpec], Path]:
    return manifest.generator.graphs, exported_bundle


@pytest.fixture(scope="module")
def xl(tmp_path_factory, shared, tiny_generator) -> Exported:
    folder = tmp_path_factory.mktemp("xl")
    generator = TorchGenerator.from_folder(build_xl(folder / "source"), device="cpu")
    generator.pipeline.vae = TorchGenerator.from_folder(tiny_generator, device="cpu").pipeline.vae
    exported = Exported(generator, folder / "bundle")
    exported.export("text_encoder", "text_encoder_2", "unet")
    exported.take(*shared, "vae_decoder")
    return exported


@pytest.fixture(scope="module")
def lcm(tmp_path_factory, shared, tiny_generator) -> Exported:
    folder = tmp_path_factory.mktemp("lcm")
    generator = TorchGenerator.from_folder(build_lcm(folder / "source"), device="cpu")
    plain = TorchGenerator.from_folder(tiny_generator, device="cpu").pipeline
    generator.pipeline.vae, generator.pipeline.text_encoder = plain.vae, plain.text_encoder
    exported = Exported(generator, folder / "bundle")
    exported.export("unet")
    exported.take(*shared, "text_encoder", "vae_decoder")
    return exported


@pytest.mark.parametrize("guidance", [3.0, 0.0])
@pytest.mark.parametrize("zero_negative", [True, False])
def test_sdxl_images_equal_the_pipelines(xl, guidance, zero_negative):
    assert xl.fields["zero_negative"] is True
    xl.generator.pipeline.register_to_config(force_zeros_for_empty_prompt=zero_negative)
    try:
        expected = _set(xl.generator, guidance_scale=guidance).generate(PROMPTS, SEEDS)
    finally:
        xl.generator.pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    runtime = xl.runtime(zero_negative=zero_negative, guidance_scale=guidance)
    _as_pipelines(runtime.generate(PROMPTS, SEEDS), expected)


def test_sdxl_is_told_the_size(xl):
    runtime = xl.runtime()
    runtime._unet = watched = Watched(runtime._unet)
    expected = _set(xl.generator, height=40, width=16).generate(PROMPTS[:2], SEEDS[:2])
    found = runtime.generate(PROMPTS[:2], SEEDS[:2], GenerateOptions(height=40, width=16))
    assert found.shape == (2, 40, 16, 3)
    _as_pipelines(found, expected)
    np.testing.assert_array_equal(watched.calls[0]["time_ids"], [[40, 16, 0, 0, 40, 16]] * 4)


def test_sdxl_turbo_makes_one_step_without_guidance(xl):
    turbo = _set(xl.generator, steps=1, guidance_scale=0.0)
    own = turbo.pipeline.scheduler
    turbo.pipeline.scheduler = _scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    try:
        tables = schedule_tables(turbo.pipeline.scheduler, [1])
        expected = turbo.generate(PROMPTS, SEEDS)
    finally:
        turbo.pipeline.scheduler = own
    runtime = xl.runtime(schedules=tables, steps=1, guidance_scale=0.0)
    _as_pipelines(runtime.generate(PROMPTS, SEEDS), expected)


def test_sdxl_has_optimums_tensors(xl):
    names = {name: [[t.name for t in side] for side in (spec.inputs, spec.outputs)] for name, spec in xl.specs.items()}
    layers = ["hidden_states.0", "hidden_states.1"]
    assert names["text_encoder"] == [["input_ids"], ["last_hidden_state", "pooler_output", *layers]]
    # optimum's pipeline takes the first output for the pooled text.
    assert names["text_encoder_2"] == [["input_ids"], ["text_embeds", "last_hidden_state", *layers]]
    unet = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert names["unet"] == [unet, ["out_sample"]]
    folder = xl.folder / "generator"
    for part in ("text_encoder", "text_encoder_2"):
        assert json.loads((folder / part / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 2
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert xl.fields["text_outputs"] == ("hidden_states.1", "hidden_states.1")
    assert xl.fields["tokenizer_2"].pad_id != xl.fields["tokenizer"].pad_id


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "unet"])
def test_sdxl_graphs_answer_as_the_unpatched_modules(xl, name):
    """At most 1e-4 of the largest value."""
    _answers_alike(xl, name)


def test_the_lcm_unet_answers_as_the_unpatched_module(lcm):
    """At most 1e-4 of the largest value."""
    assert [tensor.name for tensor in lcm.specs["unet"].inputs][3:] == ["timestep_cond"]
    _answers_alike(lcm, "unet")


def _answers_alike(exported: Exported, name: str) -> None:
    graph = exported.graphs[name]
    for sizes in graph.checked:
        arrays = random_inputs(graph, sizes, seed=5)
        found = exported.engines[name].run(arrays)
        with torch.inference_mode():
            expected = graph.reference(*(torch.from_numpy(arrays[item.name]) for item in graph.inputs))
        for output, tensor in zip(graph.outputs, expected, strict=True):
            assert found[output.name].shape == tuple(tensor.shape)
            np.testing.assert_allclose(
                found[output.name], tensor.numpy(), rtol=0, atol=1e-4 * max(1.0, float(tensor.abs().max()))
            )


@pytest.mark.parametrize(("steps", "guidance"), [(4, 8.5), (2, 1.0)])
def test_lcm_images_equal_the_pipelines(lcm, steps, guidance):
    expected = _set(lcm.generator, steps=steps, guidance_scale=guidance).generate(PROMPTS, SEEDS)
    found = lcm.runtime().generate(PROMPTS, SEEDS, GenerateOptions(steps=steps, guidance_scale=guidance))
    _as_pipelines(found, expected)


def test_an_lcm_is_told_its_guidance_and_not_guided_again(lcm):
    runtime = lcm.runtime()
    runtime._unet = watched = Watched(runtime._unet)
    runtime.generate(PROMPTS[:2], SEEDS[:2], GenerateOptions(guidance_scale=6.0))
    assert [len(inputs["sample"]) for inputs in watched.calls] == [2, 2, 2, 2]
    expected = lcm.generator.pipeline.get_guidance_scale_embedding(torch.tensor([5.0]), embedding_dim=16).numpy()
    # Angles go up to 5000: one unit in the last place of them is 5e-4.
    np.testing.assert_allclose(watched.calls[0]["timestep_cond"], np.repeat(expected, 2, 0), rtol=0, atol=1e-3)


SAMPLERS = [
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, 4, 2.0),  # Stable Diffusion 2.1
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 3, 2.0),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 1, 0.0),  # SD-Turbo
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 4, 1.0),
    ("LCMScheduler", {}, 4, 1.0),  # with LCM-LoRA
]


@pytest.mark.parametrize(("kind", "options", "steps", "guidance"), SAMPLERS)
def test_the_samplers_of_the_family(exported_bundle, manifest, tiny_generator, kind, options, steps, guidance):
    reference = TorchGenerator.from_folder(tiny_generator, device="cpu", steps=steps, guidance_scale=guidance)
    reference.pipeline.scheduler = _scheduler(kind, **options)
    changes = {"schedules": schedule_tables(reference.pipeline.scheduler, [steps]), "steps": steps}
    spec = manifest.generator.model_copy(update={**changes, "guidance_scale": guidance})
    engines = {name: OrtEngine(exported_bundle / graph.file, threads=1) for name, graph in spec.graphs.items()}
    runtime = RuntimeGenerator(spec, engines, PlainTokenizer(spec.tokenizer, exported_bundle))
    _as_pipelines(runtime.generate(PROMPTS, SEEDS), reference.generate(PROMPTS, SEEDS))


def test_a_tiny_vae(tmp_path, shared, tiny_generator):
    generator = TorchGenerator.from_folder(tiny_generator, device="cpu")
    torch.manual_seed(0)
    generator.pipeline.register_modules(vae=_vae("tiny"))
    exported = Exported(generator, tmp_path)
    exported.export("vae_decoder")
    exported.take(*shared, "text_encoder", "unet")
    assert exported.fields["latents"].scaling_factor == 1.0
    expected = generator.generate(PROMPTS, SEEDS)
    found = exported.runtime().generate(PROMPTS, SEEDS)
    assert np.abs(found.astype(float) - expected).mean() <= 1.0
    assert np.ptp(expected) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_embed_type": "timestep"}, r"class_embed_type='timestep', an input the runtime does not give"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, r"encoder_hid_dim_type='text_proj'"),
    ],
)
def test_unets_with_other_inputs_are_refused(tmp_path, options, message):
    generator = TorchGenerator.from_folder(build_generator(tmp_path / "g", unet_options=options), device="cpu")
    with pytest.raises(ModelFolderError, match=message):
        family_of("generator", generator).graphs(generator)


def test_what_graphs_cannot_make_is_refused_before_tracing(tiny_generator, tmp_path):
    generator = TorchGenerator.from_folder(build_generator(tmp_path / "g", text_width=16), device="cpu")
    family = family_of("generator", generator)
    with pytest.raises(ModelFolderError, match=r"image size 24 x 36; expected multiples of 8"):
        _set(generator, width=36)
    generator.pipeline.unet.register_to_config(block_out_channels=(16, 16, 32))
    with pytest.raises(ModelFolderError, match=r"image size 24 x 24; expected multiples of 16 .*choose such a size"):
        family.graphs(generator)
    generator.pipeline.unet.register_to_config(block_out_channels=(16, 32))
    generator.pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ModelFolderError, match="a mean and a deviation for each latent channel"):
        family.graphs(generator)
    with pytest.raises(ModelFolderError, match="cannot do the 60 steps"):
        lcm = TorchGenerator.from_folder(build_lcm(tmp_path / "lcm"), device="cpu", steps=60)
        (tmp_path / "out").mkdir()
        family_of("generator", lcm).write(tmp_path / "out", lcm)


def test_an_sdxl_without_one_of_its_encoders_is_refused(tmp_path):
    generator = TorchGenerator.from_folder(build_xl(tmp_path / "xl"), device="cpu")
    generator.pipeline.register_modules(text_encoder=None)
    with pytest.raises(ModelFolderError, match="lacks one of its two text encoders"):
        family_of("generator", generator).graphs(generator)
