from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import DataError, EngineError, InputError
from mi2rage_engines.spec import TensorSpec
from mi2rage_rt import noise
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.protocols import TextToImage


class Watched:
    """An engine that keeps what it was given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(dict(inputs))
        return dict(self.engine.run(inputs))


@pytest.fixture(scope="module")
def parts(bundle_folder: Path) -> RuntimeGenerator:
    return Bundle.open(bundle_folder, threads=1).generator()


@pytest.fixture
def generator(parts: RuntimeGenerator) -> RuntimeGenerator:
    engines = {
        "text_encoder": Watched(parts._text_encoder),
        "unet": Watched(parts._unet),
        "vae_decoder": Watched(parts._vae_decoder),
    }
    return RuntimeGenerator(parts.spec, engines, parts._tokenizer)


def by_hand(generator: RuntimeGenerator, prompt: str, seed: int, steps: int, guidance: float) -> np.ndarray:
    """The tiny bundle's formula, row by row."""
    table = next(table for table in generator.spec.schedules if table.steps == steps)
    states = {
        text: generator._text_encoder.run({"input_ids": generator._tokenizer.encode([text])}) for text in (prompt, "")
    }
    towards, without = (states[text]["last_hidden_state"].mean() for text in (prompt, ""))
    context = without + guidance * (towards - without)
    latents = noise.normal(seed, (12, 2, 2))
    for step in range(steps):
        output = 0.1 * latents + context + table.timesteps[step] / 1000
        drawn = noise.normal(seed, (12, 2, 2), stream=1 + step)
        latents = 0.5 * latents + 0.25 * output + table.noise_coefficient[step] * drawn
    cells = (latents / 2.0).reshape(2, 2, 3, 2, 2).transpose(2, 3, 0, 4, 1).reshape(3, 4, 4)
    return np.round(np.clip(cells / 2 + 0.5, 0, 1) * 255).transpose(1, 2, 0)


@pytest.mark.parametrize(("steps", "guidance"), [(3, 3.0), (3, 1.0), (5, 2.0)])
def test_equals_the_formula(generator: RuntimeGenerator, steps: int, guidance: float) -> None:
    prompts = ["a red car", "the seaside"]
    images = generator.generate(prompts, [5, 6], GenerateOptions(steps=steps, guidance_scale=guidance))
    assert isinstance(generator, TextToImage) and images.dtype == np.uint8
    for image, prompt, seed in zip(images, prompts, [5, 6], strict=True):
        expected = by_hand(generator, prompt, seed, steps, guidance)
        assert np.abs(image - expected).max() <= 1  # float32 against float64 at a rounding edge
        assert np.ptp(image) > 20


def test_guidance_is_one_call_a_step_and_left_out_at_one(generator: RuntimeGenerator) -> None:
    generator.generate(["a"], [0])
    assert [call["sample"].shape[0] for call in generator._unet.calls] == [2, 2, 2]
    states = generator._unet.calls[0]["encoder_hidden_states"]
    empty = generator._text_encoder.run({"input_ids": generator._tokenizer.encode([""])})["last_hidden_state"]
    np.testing.assert_array_equal(states[0], empty[0])
    generator._unet.calls.clear()
    generator.generate(["a"], [0], GenerateOptions(guidance_scale=1.0))
    assert [call["sample"].shape[0] for call in generator._unet.calls] == [1, 1, 1]


def test_equal_prompts_are_encoded_once_and_batches_are_bounded(generator: RuntimeGenerator) -> None:
    images = generator.generate(["a", "dog"] * 5, range(10), GenerateOptions(batch_size=4, guidance_scale=1.0))
    assert [len(call["input_ids"]) for call in generator._text_encoder.calls] == [2]
    assert [len(call["latent_sample"]) for call in generator._vae_decoder.calls] == [4, 4, 2]
    alone = generator.generate(["dog"], [7], GenerateOptions(guidance_scale=1.0))
    np.testing.assert_array_equal(images[7], alone[0])


def test_sizes(generator: RuntimeGenerator) -> None:
    assert generator.generate(["a"], [0], GenerateOptions(height=8, width=12)).shape == (1, 8, 12, 3)
    assert generator.generate([], []).shape == (0, 4, 4, 3)
    with pytest.raises(InputError, match="height 6: expected a positive multiple of 4"):
        generator.generate(["a"], [0], GenerateOptions(height=6))


def test_unusable_arguments(generator: RuntimeGenerator) -> None:
    with pytest.raises(InputError, match=r"steps 4: .* expected one of 3, 5"):
        generator.generate(["a"], [0], GenerateOptions(steps=4))
    with pytest.raises(DataError, match="1 prompts but 2 seeds"):
        generator.generate(["a"], [0, 1])
    with pytest.raises(DataError, match="seed -1"):
        generator.generate(["a"], [-1])
    with pytest.raises(InputError, match="batch size 0"):
        generator.generate(["a"], [0], GenerateOptions(batch_size=0))


@pytest.mark.parametrize(("dtype", "shape"), [("int64", (1,)), ("int64", ()), ("float32", (1,))])
def test_the_timestep_is_as_the_graph_wants_it(generator: RuntimeGenerator, dtype: str, shape: tuple[int, ...]) -> None:
    generator._timestep = TensorSpec(name="timestep", dtype=dtype, shape=shape)
    seen: list[np.ndarray] = []
    run = generator._unet.run

    def unet(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["timestep"])
        return run({**inputs, "timestep": np.float32(inputs["timestep"].reshape(()))})

    generator._unet.run = unet  # type: ignore[method-assign]
    generator.generate(["a"], [0])
    assert [time.reshape(-1)[0] for time in seen] == [1000, 900, 800]
    assert all(time.dtype == dtype and time.shape == shape for time in seen)


def test_nan_is_no_image(generator: RuntimeGenerator) -> None:
    generator._unet.run = lambda inputs: {"out_sample": np.full_like(inputs["sample"], np.nan)}  # type: ignore
    with pytest.raises(EngineError, match="NaN"):
        generator.generate(["a"], [0])


def test_a_generator_on_pixels_needs_no_vae(parts: RuntimeGenerator) -> None:
    latents = parts.spec.latents.model_copy(update={"channels": 12, "downsampling": 2})
    spec = parts.spec.model_copy(update={"latents": latents})
    engines = {"text_encoder": parts._text_encoder, "unet": parts._unet}
    pixels = RuntimeGenerator(spec, engines, parts._tokenizer)._decode(np.zeros((1, 3, 4, 4), np.float32))
    assert (pixels == 128).all()
