"""The PyTorch side of the protocols: keyed noise, keyed sampling, prefixes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_rt import noise
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_training.pytorch_captioner import TorchCaptioner
from mi2rage_training.pytorch_models import TorchGenerator, resolve
from mi2rage_training.samplers import scheduler_noise
from tests.models.tiny_captioner import random_images
from tests.models.tiny_generator import build_generator, build_lcm, build_xl


@pytest.fixture(scope="module")
def generator(tiny_generator: Path) -> TorchGenerator:
    return TorchGenerator.from_folder(tiny_generator, device="cpu")


@pytest.fixture(scope="module")
def captioner(tiny_captioner: Path) -> TorchCaptioner:
    return TorchCaptioner.from_folder(tiny_captioner, device="cpu")


def test_they_fulfil_the_protocols(generator, captioner):
    assert isinstance(generator, TextToImage)
    assert isinstance(captioner, ImageToText)
    assert generator.name == "generator"


def test_an_image_depends_on_its_own_prompt_and_seed_alone(generator):
    together = generator.generate(["a dog", "a red car", "a dog"], [3, 4, 5])
    alone = np.concatenate([generator.generate(["a red car"], [4]), generator.generate(["a dog"], [5])])
    assert together.shape == (3, 24, 24, 3)
    # Batches of other sizes may be added up in another order: one level at most.
    assert np.abs(together[1:].astype(int) - alone.astype(int)).max() <= 1


def test_initial_latents_are_the_runtimes_noise(generator):
    seen = []
    hook = generator.pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        generator.generate(["a dog"], [7])
    finally:
        hook.remove()
    assert len(seen) == 4
    np.testing.assert_array_equal(seen[0][0].numpy(), noise.normal(7, (4, 6, 6), stream=0))


def test_no_prompts_make_no_images(generator):
    assert generator.generate([], []).shape == (0, 24, 24, 3)


def test_the_folders_settings_and_arguments(tiny_generator, tmp_path):
    given = TorchGenerator.from_folder(tiny_generator, device="cpu", steps=2, guidance_scale=1.0, scheduler="euler")
    assert (given.settings.steps, given.settings.guidance_scale, given.settings.height) == (2, 1.0, 24)
    assert type(given.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert given.generate(["a dog"], [1]).shape == (1, 24, 24, 3)

    folder = shutil.copytree(tiny_generator, tmp_path / "plain")
    (folder / "mi2rage.json").unlink()
    plain = TorchGenerator.from_folder(folder, device="cpu")
    assert (plain.settings.steps, plain.settings.guidance_scale, plain.settings.width) == (20, 7.5, 24)

    (folder / "mi2rage.json").write_text(json.dumps({"step": 3}), encoding="utf-8")
    with pytest.raises(ModelFolderError, match=r"unknown settings \['step'\]"):
        TorchGenerator.from_folder(folder, device="cpu")


@pytest.mark.parametrize("name", ["LCMScheduler", "EulerAncestralDiscreteScheduler"])
def test_stochastic_steps_draw_from_the_rows_seeds(tmp_path, name):
    generator = TorchGenerator.from_folder(build_generator(tmp_path / "g", scheduler=name), device="cpu")
    together, alone = generator.generate(["a dog", "a dog"], [1, 2]), generator.generate(["a dog"], [2])
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).mean() > 2


@pytest.mark.parametrize(
    ("build", "kind", "usual"),
    [(build_xl, "StableDiffusionXLPipeline", (20, 5.0)), (build_lcm, "LatentConsistencyModelPipeline", (4, 8.5))],
)
def test_sdxl_and_lcm(tmp_path, build, kind, usual):
    folder = build(tmp_path / "model")
    generator = TorchGenerator.from_folder(folder, device="cpu")
    assert type(generator.pipeline).__name__ == kind
    together, alone = generator.generate(["a dog", "a red car"], [1, 2]), generator.generate(["a red car"], [2])
    assert together.shape == (2, 24, 24, 3)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    (folder / "mi2rage.json").unlink()
    plain = TorchGenerator.from_folder(folder, device="cpu")
    assert (plain.settings.steps, plain.settings.guidance_scale, plain.settings.height) == (*usual, 24)


def test_a_turbo_model_is_known_by_its_name(tiny_generator, tmp_path):
    folder = shutil.copytree(tiny_generator, tmp_path / "SD-Turbo")
    (folder / "mi2rage.json").unlink()
    settings = TorchGenerator.from_folder(folder, device="cpu").settings
    assert (settings.steps, settings.guidance_scale) == (1, 0.0)
    assert TorchGenerator.from_folder(folder, device="cpu", steps=4).settings.steps == 4


def test_what_does_not_make_images_from_text_alone_is_refused(tmp_path):
    folder = build_generator(tmp_path / "inpainting", unet_options={"in_channels": 9})
    with pytest.raises(ModelFolderError, match="takes 9 channels and gives 4; expected a text-to-image UNet"):
        TorchGenerator.from_folder(folder, device="cpu")
    lcm = build_lcm(tmp_path / "lcm")
    with pytest.raises(ModelFolderError, match="with EulerDiscreteScheduler; expected LCMScheduler; leave --scheduler"):
        TorchGenerator.from_folder(lcm, device="cpu", scheduler="euler")
    assert TorchGenerator.from_folder(lcm, device="cpu", scheduler="lcm").settings.steps == 4


@pytest.mark.parametrize(
    "name", ["PixArtAlphaPipeline", "StableDiffusion3Pipeline", "StableDiffusionControlNetPipeline"]
)
def test_other_pipelines_are_refused_with_those_that_can_be_run(tiny_generator, tmp_path, name):
    folder = shutil.copytree(tiny_generator, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}), encoding="utf-8")
    with pytest.raises(ModelFolderError, match=f"its class is {name}; expected .*XLPipeline, LatentConsistency"):
        TorchGenerator.from_folder(folder, device="cpu")


def test_scheduler_noise_is_numbered_by_step_and_taken_back():
    from diffusers import DDPMScheduler, LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    original = scheduling_lcm.randn_tensor
    for scheduler in (LCMScheduler(), DDPMScheduler()):
        drawn = []

        def draw(shape, step, drawn=drawn):
            drawn.append(step)
            return np.zeros(shape, np.float32)

        scheduler.set_timesteps(4)
        sample = torch.ones(1, 1, 2, 2)
        with scheduler_noise(scheduler, draw):
            for timestep in scheduler.timesteps:
                sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
        assert drawn == [0, 1, 2]
    assert scheduling_lcm.randn_tensor is original


def test_greedy_captions_are_those_of_transformers(captioner):
    """Against `generate` called as BLIP's documentation does: without prompt, batch and processors of ours."""
    from mi2rage_rt.images import pixel_values

    images = list(random_images(4, seed=3))
    pixels = torch.from_numpy(pixel_values(images, captioner.preprocessing))
    with torch.inference_mode():
        expected = captioner.module.generate(pixels, num_beams=1, do_sample=False, max_new_tokens=12)
    for ids, row in zip(captioner.generate_ids(images, [captioner.prompt_ids("")] * 4), expected.tolist(), strict=True):
        assert row[: len(ids) + 1] == [captioner.bos_id, *ids]


def test_captions_begin_with_their_prefixes_whatever_their_lengths(captioner):
    images = list(random_images(3))
    captions = captioner.caption(images, ["a photo of", "", "a dog"])
    assert captions[0].startswith("a photo of")
    assert captions[2].startswith("a dog")
    assert captions[1] == captioner.caption(images[1:2])[0]


def test_a_sampled_caption_depends_on_its_image_and_seed_alone(captioner):
    images = list(random_images(4))
    together = captioner.caption(images, seeds=[1, 2, 3, 4])
    assert captioner.caption(images[2:], seeds=[3, 4]) == together[2:]
    assert len({captioner.caption(images[:1], seeds=[seed])[0] for seed in range(6)}) > 2


def test_lists_that_differ_in_length_are_refused(generator, captioner):
    with pytest.raises(DataError, match="2 prompts but 1 seeds"):
        generator.generate(["a", "b"], [1])
    with pytest.raises(DataError, match="1 images but 2 seeds"):
        captioner.caption(list(random_images(1)), seeds=[1, 2])
    with pytest.raises(DataError, match="leaves no room"):
        captioner.caption(list(random_images(1)), ["dog " * 40])


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(ModelFolderError, match="no such generator folder"):
        TorchGenerator.from_folder(tmp_path / "nothing")
    with pytest.raises(ModelFolderError, match="no such captioner folder"):
        TorchCaptioner.from_folder("./nothing")
    with pytest.raises(ModelFolderError, match="expected a Stable Diffusion pipeline"):
        TorchGenerator.from_folder(tmp_path)
    with pytest.raises(ModelFolderError, match="expected a BLIP captioner"):
        TorchCaptioner.from_folder(tmp_path)
    assert resolve("owner/name", "generator") == "owner/name"


def test_models_of_another_class_are_refused(tiny_generator, tiny_captioner, tmp_path):
    folder = shutil.copytree(tiny_generator, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}), encoding="utf-8")
    with pytest.raises(ModelFolderError, match="its class is FluxPipeline; expected a Stable Diffusion"):
        TorchGenerator.from_folder(folder)
    folder = shutil.copytree(tiny_captioner, tmp_path / "captioner")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}), encoding="utf-8")
    with pytest.raises(ModelFolderError, match="its class is BertModel; expected a BLIP"):
        TorchCaptioner.from_folder(folder)
    with pytest.raises(ModelFolderError, match="scheduler 'heun' is not known; expected one of ddim"):
        TorchGenerator.from_folder(tiny_generator, device="cpu", scheduler="heun")


def test_a_damaged_file_is_refused(tiny_captioner, tmp_path):
    folder = shutil.copytree(tiny_captioner, tmp_path / "captioner")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFolderError, match="cannot be loaded"):
        TorchCaptioner.from_folder(folder)
