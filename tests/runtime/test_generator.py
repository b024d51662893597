from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.engine import HostEngine
from mi2rage_engines.errors import BundleError, DataError, EngineError, InputError
from mi2rage_engines.spec import TensorSpec
from mi2rage_rt import noise
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator, graphs_to_load
from mi2rage_rt.protocols import TextToImage


class Watched(HostEngine):
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
        "text_encoder": Watched(parts._text_encoders[0]),
        "unet": Watched(parts._unet),
        "vae_decoder": Watched(parts._vae_decoder),
    }
    return RuntimeGenerator(parts.spec, engines, parts._tokenizers[0])


def by_hand(generator: RuntimeGenerator, prompt: str, seed: int, steps: int, guidance: float) -> np.ndarray:
    """The tiny bundle's formula, row by row."""
    table = next(table for table in generator.spec.schedules if table.steps == steps)
    states = {
        text: generator._text_encoders[0].run({"input_ids": generator._tokenizers[0].encode([text])})
        for text in (prompt, "")
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
    empty = generator._text_encoders[0].run({"input_ids": generator._tokenizers[0].encode([""])})["last_hidden_state"]
    np.testing.assert_array_equal(states[0], empty[0])
    generator._unet.calls.clear()
    generator.generate(["a"], [0], GenerateOptions(guidance_scale=1.0))
    assert [call["sample"].shape[0] for call in generator._unet.calls] == [1, 1, 1]


@pytest.mark.parametrize(
    ("interval", "rows"), [((0.0, 0.5), [2, 2, 1]), ((0.5, 1.0), [1, 1, 2]), ((0.0, 0.0), [1] * 3)]
)
def test_guidance_on_part_of_the_steps(
    generator: RuntimeGenerator, interval: tuple[float, float], rows: list[int]
) -> None:
    options = GenerateOptions(guidance_interval=interval, guidance_scale=3.0)
    (image,) = generator.generate(["a red car"], [5], options)
    calls = generator._unet.calls
    assert [len(call["sample"]) for call in calls] == rows
    prompted = generator._text_encoders[0].run({"input_ids": generator._tokenizers[0].encode(["a red car"])})
    for call in calls:
        np.testing.assert_array_equal(call["encoder_hidden_states"][-1], prompted["last_hidden_state"][0])
    whole = generator.generate(["a red car"], [5], GenerateOptions(guidance_scale=3.0))[0]
    without = generator.generate(["a red car"], [5], GenerateOptions(guidance_scale=1.0))[0]
    assert np.abs(image.astype(int) - whole).max() > 1
    assert np.array_equal(image, without) == (interval == (0.0, 0.0))


def test_equal_prompts_are_encoded_once_and_batches_are_bounded(generator: RuntimeGenerator) -> None:
    images = generator.generate(["a", "dog"] * 5, range(10), GenerateOptions(batch_size=4, guidance_scale=1.0))
    assert [len(call["input_ids"]) for call in generator._text_encoders[0].calls] == [2]
    assert [len(call["latent_sample"]) for call in generator._vae_decoder.calls] == [4, 4, 2]
    alone = generator.generate(["dog"], [7], GenerateOptions(guidance_scale=1.0))
    np.testing.assert_array_equal(images[7], alone[0])


def test_sizes(generator: RuntimeGenerator) -> None:
    assert generator.generate(["a"], [0], GenerateOptions(height=8, width=12)).shape == (1, 8, 12, 3)
    assert generator.generate([], []).shape == (0, 4, 4, 3)
    with pytest.raises(InputError, match="height 6: expected a positive multiple of 4"):
        generator.generate(["a"], [0], GenerateOptions(height=6))
    with pytest.raises(InputError, match="height 0"):
        generator.generate(["a"], [0], GenerateOptions(height=0))


def test_unusable_arguments(generator: RuntimeGenerator) -> None:
    with pytest.raises(InputError, match=r"steps 4: .* expected one of 3, 5"):
        generator.generate(["a"], [0], GenerateOptions(steps=4))
    with pytest.raises(DataError, match="1 prompts but 2 seeds"):
        generator.generate(["a"], [0, 1])
    with pytest.raises(DataError, match="seed -1"):
        generator.generate(["a"], [-1])
    with pytest.raises(InputError, match="batch size 0"):
        generator.generate(["a"], [0], GenerateOptions(batch_size=0))
    with pytest.raises(InputError, match=r"guidance interval 0\.5:0\.2"):
        generator.generate(["a"], [0], GenerateOptions(guidance_interval=(0.5, 0.2)))


@pytest.mark.parametrize(("dtype", "shape"), [("int64", (1,)), ("int64", ()), ("float32", (1,))])
def test_the_timestep_is_as_the_graph_wants_it(generator: RuntimeGenerator, dtype: str, shape: tuple[int, ...]) -> None:
    wanted = TensorSpec(name="timestep", dtype=dtype, shape=shape)
    unet = generator._unet
    unet.inputs = tuple(wanted if tensor.name == "timestep" else tensor for tensor in unet.inputs)
    seen: list[np.ndarray] = []
    run = unet.run

    def as_the_graph_is(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["timestep"])
        return run({**inputs, "timestep": np.float32(inputs["timestep"].reshape(()))})

    unet.run = as_the_graph_is
    generator.generate(["a"], [0])
    assert [time.reshape(-1)[0] for time in seen] == [1000, 900, 800]
    assert all(time.dtype == dtype and time.shape == shape for time in seen)


def test_nan_is_no_image(generator: RuntimeGenerator) -> None:
    generator._unet.run = lambda inputs: {"out_sample": np.full_like(inputs["sample"], np.nan)}
    with pytest.raises(EngineError, match="NaN"):
        generator.generate(["a"], [0])


def test_a_generator_on_pixels_needs_no_vae(parts: RuntimeGenerator) -> None:
    latents = parts.spec.latents.model_copy(update={"channels": 12, "downsampling": 2})
    spec = parts.spec.model_copy(update={"latents": latents})
    engines = {"text_encoder": parts._text_encoders[0], "unet": parts._unet}
    levels = np.zeros((1, 4, 4, 3), np.uint8)
    pixels = np.linspace(-1.5, 1.5, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    RuntimeGenerator(spec, engines, parts._tokenizers[0])._decode_into(levels, pixels)
    expected = np.round(np.clip(pixels / 2 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(levels[0], expected[0].transpose(1, 2, 0))
    with pytest.raises(EngineError, match="the decoded image holds NaN or infinity"):
        RuntimeGenerator(spec, engines, parts._tokenizers[0])._decode_into(levels, pixels * np.inf)


class Made(HostEngine):
    """An engine of Python functions: named arrays in, named arrays out."""

    def __init__(self, inputs: dict[str, tuple[Any, ...]], outputs: dict[str, Any]) -> None:
        self.name = "made"
        kinds = {"input_ids": "int64"}
        self.inputs = tuple(TensorSpec(name=n, dtype=kinds.get(n, "float32"), shape=s) for n, s in inputs.items())
        self.outputs = tuple(TensorSpec(name=n, dtype="float32", shape=("batch",)) for n in outputs)
        self._functions = outputs
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(dict(inputs))
        return {name: function(inputs) for name, function in self._functions.items()}


def _states(width: int, factor: float) -> Any:
    return lambda inputs: np.repeat(inputs["input_ids"][:, :, None].astype(np.float32), width, axis=2) * factor


def _unet(**further: tuple[Any, ...]) -> Made:
    shapes: dict[str, tuple[Any, ...]] = {
        "sample": ("batch", 12, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "sequence", 4),
    }
    return Made(shapes | further, {"out_sample": lambda inputs: inputs["sample"] * 0.5})


def _two_encoders() -> dict[str, Made]:
    ids: dict[str, tuple[Any, ...]] = {"input_ids": ("batch", "sequence")}
    pooled = lambda inputs: np.stack([inputs["input_ids"].sum(1)] * 5, 1).astype(np.float32)  # noqa: E731
    return {
        "text_encoder": Made(ids, {"last_hidden_state": _states(3, 9.0), "hidden_states.1": _states(3, 1.0)}),
        "text_encoder_2": Made(ids, {"text_embeds": pooled, "hidden_states.2": _states(2, 10.0)}),
        "unet": _unet(text_embeds=("batch", 5), time_ids=("batch", 6)),
    }


def _xl(parts: RuntimeGenerator, engines: dict[str, Made], **changes: Any) -> RuntimeGenerator:
    names = {"text_outputs": ("hidden_states.1", "hidden_states.2"), "guidance_scale": 2.0}
    second = copy.copy(parts._tokenizers[0])
    second.pad_id = 7
    spec = parts.spec.model_copy(update={**names, **changes})
    return RuntimeGenerator(
        spec, {**engines, "vae_decoder": parts._vae_decoder}, parts._tokenizers[0], tokenizer_2=second
    )


@pytest.mark.parametrize("zero_negative", [True, False])
def test_two_text_encoders_are_joined_and_their_pooled_text_goes_to_the_unet(
    parts: RuntimeGenerator, zero_negative: bool
) -> None:
    engines = _two_encoders()
    _xl(parts, engines, zero_negative=zero_negative).generate(["dog", "red"], [1, 2])
    given = engines["unet"].calls[0]
    ids = [parts._tokenizers[0].encode([text]) for text in ("", "dog", "red")]
    padded = [np.where(np.arange(row.shape[1]) < (row != 0).sum(), row, 7) for row in ids]
    for row, (first, second) in enumerate([(0, 0), (0, 0), (1, 1), (2, 2)]):
        states = np.concatenate([np.tile(ids[first].T, 3), np.tile(padded[second].T * 10, 2)], 1)
        pooled = np.full(5, padded[second].sum())
        if row < 2 and zero_negative:
            states, pooled = states * 0, pooled * 0
        np.testing.assert_array_equal(given["encoder_hidden_states"][row], states)
        np.testing.assert_array_equal(given["text_embeds"][row], pooled)
    np.testing.assert_array_equal(given["time_ids"], [[4, 4, 0, 0, 4, 4]] * 4)
    assert len(engines["unet"].calls) == 3


def test_a_unet_that_is_told_the_guidance_is_not_guided(parts: RuntimeGenerator) -> None:
    unet = _unet(timestep_cond=("batch", 9))
    engines = {"text_encoder": parts._text_encoders[0], "unet": unet, "vae_decoder": parts._vae_decoder}
    runtime = RuntimeGenerator(parts.spec, engines, parts._tokenizers[0])
    runtime.generate(["a", "dog"], [1, 2], GenerateOptions(guidance_scale=1.5))
    angles = 500.0 * np.exp(-np.log(10000.0) / 3 * np.arange(4))
    expected = np.concatenate([np.sin(angles), np.cos(angles), [0]])
    assert [len(call["sample"]) for call in unet.calls] == [2, 2, 2]
    # float32: angles of 500 are known to 3e-5.
    np.testing.assert_allclose(unet.calls[0]["timestep_cond"], [expected] * 2, atol=1e-4)


def test_graphs_that_do_not_fit_are_refused(parts: RuntimeGenerator) -> None:
    engines = _two_encoders()
    with pytest.raises(BundleError, match="1 text_outputs, 2 text encoders and 2 tokenizers"):
        _xl(parts, engines, text_outputs=("last_hidden_state",))
    with pytest.raises(EngineError, match=r"has no output hidden_states\.9; its outputs are"):
        _xl(parts, engines, text_outputs=("hidden_states.9", "hidden_states.2"))
    with pytest.raises(EngineError, match="takes image_embeds, which this release does not give"):
        _xl(parts, {**engines, "unet": _unet(image_embeds=("batch", 2))})
    bare = {**engines, "text_encoder_2": engines["text_encoder"]}
    with pytest.raises(EngineError, match="has no output text_embeds"):
        _xl(parts, bare, text_outputs=("hidden_states.1", "hidden_states.1"))


class Clock:
    """Moves on by what engines are made to take: `fixed` seconds a call and `each` a row."""

    def __init__(self, generator: RuntimeGenerator, fixed: float, each: float) -> None:
        self.now = 0.0
        self.fixed, self.each = fixed, each
        for engine, name in ((generator._unet, "sample"), (generator._vae_decoder, "latent_sample")):
            self._slow(engine, name)
        generator._clock = lambda: self.now

    def _slow(self, engine: Any, name: str) -> None:
        run = engine.run

        def slow(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.now += self.fixed + self.each * len(inputs[name])
            return run(inputs)

        engine.run = slow


class Bytes:
    """Memory of which the weights take 1000 and each row of the last decoding 100."""

    def __init__(self, generator: RuntimeGenerator) -> None:
        self.generator = generator

    def peak_bytes(self, call: Any) -> int:
        call()
        return 1000 + 100 * len(self.generator._vae_decoder.calls[-1]["latent_sample"])

    def limit_bytes(self) -> int:
        return 10**9


def _batches(generator: RuntimeGenerator, count: int, options: GenerateOptions) -> list[int]:
    generator.generate(["a"] * count, range(count), options)  # measures where it has to
    generator._vae_decoder.calls.clear()
    generator.generate(["a"] * count, range(count), options)
    return [len(call["latent_sample"]) for call in generator._vae_decoder.calls]


def test_the_batch_is_searched_by_the_time_of_the_whole(generator: RuntimeGenerator) -> None:
    generator._memory = Bytes(generator)  # type: ignore[assignment]
    clock = Clock(generator, fixed=0.0, each=1.0)
    assert _batches(generator, 6, GenerateOptions(batch_size="auto")) == [1] * 6
    # 3 steps of f + 2 n with guidance and a decoding of f + n, all for n images: 4 f + 7 n seconds.
    plan = generator._plan(GenerateOptions())
    clock.fixed = 2.0
    assert generator._trial(plan, 4) == pytest.approx(4 * 2.0 + 7 * 4)
    # With guidance on the first two steps of three it is 4 f + 6 n.
    assert generator._trial(generator._plan(GenerateOptions(guidance_interval=(0, 0.5))), 4) == pytest.approx(8 + 24)
    # 8 / n + 6 seconds an image: 6.5 at 16, 6.25 at 32 (4% less), 6.125 at 64 (2% less).
    fresh = GenerateOptions(batch_size="auto", guidance_interval=(0, 0.5))
    assert generator.batch_size(100, fresh) == 32
    assert generator.batch_size(5, fresh) == 4


def test_the_batch_is_kept_within_memory(generator: RuntimeGenerator) -> None:
    generator._memory = Bytes(generator)  # type: ignore[assignment]
    # A row takes its 4 x 4 pixels and 12 x 2 x 2 latents twice in float32, 768 bytes: more than the 100 that are seen.
    options = GenerateOptions(memory_bytes=1100 + 2 * 768)
    assert _batches(generator, 7, options) == [3, 3, 1]
    assert generator.batch_size(7, GenerateOptions(memory_bytes=10**6)) == 7
    assert generator.batch_size(7, GenerateOptions(memory_bytes=10**6, batch_size=2)) == 2
    for rows in (1, 2):  # a single image is refused too
        with pytest.raises(InputError, match=r"memory limit .* one row takes"):
            generator.generate(["a"] * rows, range(rows), GenerateOptions(memory_bytes=1000))


def test_images_do_not_depend_on_the_batch(generator: RuntimeGenerator) -> None:
    prompts, seeds = ["a", "dog", "red", "car", "sea"], [3, 1, 4, 1, 5]
    alone = generator.generate(prompts, seeds, GenerateOptions(batch_size=1, steps=5))
    for batch_size in (2, 5, 8):
        together = generator.generate(prompts, seeds, GenerateOptions(batch_size=batch_size, steps=5))
        assert np.abs(together.astype(int) - alone).max() <= 1  # rounding


def _steps_with_cache(generator: RuntimeGenerator) -> dict[str, Made]:
    """The two graphs for feature caching: the next latents are halves of the old ones."""
    shapes: dict[str, tuple[Any, ...]] = {
        "latents": ("batch", 12, "height", "width"),
        "timestep": (),
        "coefficients": (4,),
        "guidance": ("groups",),
        "noise": ("batch", 12, "height", "width"),
        "encoder_hidden_states": ("groups", "batch", "sequence", 4),
    }
    feature: dict[str, tuple[Any, ...]] = {"feature": ("groups", "batch", 5, "height", "width")}
    halves = {"next_latents": lambda inputs: inputs["latents"] / 2}
    kept = {"feature": lambda inputs: np.zeros((len(inputs["guidance"]), len(inputs["latents"]), 5, 2, 2), np.float32)}
    return {"denoise_step_full": Made(shapes, halves | kept), "denoise_step_shallow": Made(shapes | feature, halves)}


def _cached(parts: RuntimeGenerator, steps: Mapping[str, Any]) -> RuntimeGenerator:
    engines = {"text_encoder": parts._text_encoders[0], "vae_decoder": Watched(parts._vae_decoder), **steps}
    graph = parts.spec.graphs["unet"]
    graphs = {**parts.spec.graphs, "denoise_step": graph, "denoise_step_full": graph, "denoise_step_shallow": graph}
    return RuntimeGenerator(parts.spec.model_copy(update={"graphs": graphs}), engines, parts._tokenizers[0])


def test_every_so_many_steps_one_runs_the_whole_unet(parts: RuntimeGenerator) -> None:
    steps = _steps_with_cache(parts)
    generator = _cached(parts, steps)
    full, shallow = (steps[name].calls for name in ("denoise_step_full", "denoise_step_shallow"))
    for interval, expected in ((1, (5, 0)), (2, (3, 2)), (4, (2, 3)), (5, (1, 4)), (99, (1, 4))):
        generator.generate(["a", "dog"], [1, 2], GenerateOptions(steps=5, feature_cache=interval))
        assert (len(full), len(shallow)) == expected
        full.clear()
        shallow.clear()
    with pytest.raises(InputError, match="feature cache 0: expected a whole number"):
        generator.generate(["a"], [0], GenerateOptions(feature_cache=0))


def test_graphs_for_caching_are_loaded_where_they_are_asked_for(parts: RuntimeGenerator) -> None:
    plain, spec = parts.spec, _cached(parts, _steps_with_cache(parts)).spec
    assert set(graphs_to_load(spec)) == {"text_encoder", "denoise_step", "vae_decoder"}
    assert set(graphs_to_load(spec, GenerateOptions(feature_cache=1))) == set(graphs_to_load(spec))
    asked = set(graphs_to_load(spec, GenerateOptions(feature_cache=3)))
    assert asked == {"text_encoder", "denoise_step_full", "denoise_step_shallow", "vae_decoder"}
    assert set(graphs_to_load(plain)) == {"text_encoder", "unet", "vae_decoder"}
    with pytest.raises(InputError, match=r"feature cache 3: .* has no graphs for it; .* exported with --feature-cache"):
        graphs_to_load(plain, GenerateOptions(feature_cache=3))
    with pytest.raises(InputError, match=r"feature cache 3: .* has no graphs for it"):
        parts.generate(["a"], [0], GenerateOptions(feature_cache=3))
    opened_without = _cached(parts, {"unet": parts._unet})
    with pytest.raises(InputError, match=r"feature cache 2: .* was opened without the graphs for it"):
        opened_without.generate(["a"], [0], GenerateOptions(feature_cache=2))


def test_graphs_for_caching_that_do_not_fit_are_refused(parts: RuntimeGenerator) -> None:
    steps = _steps_with_cache(parts)
    with pytest.raises(InputError, match="does not run on the backend of made"):
        _cached(parts, {**steps, "denoise_step_shallow": Watched(steps["denoise_step_shallow"])})
    with pytest.raises(EngineError, match="has no input feature"):
        _cached(parts, {**steps, "denoise_step_shallow": steps["denoise_step_full"]})
    with pytest.raises(EngineError, match="has no output feature"):
        _cached(parts, {**steps, "denoise_step_full": steps["denoise_step_shallow"]})


def test_the_time_of_a_batch_knows_steps_of_both_kinds(parts: RuntimeGenerator) -> None:
    steps = _steps_with_cache(parts)
    generator = _cached(parts, steps)
    now = [0.0]
    generator._clock = lambda: now[0]
    for name, seconds in (("denoise_step_full", 10.0), ("denoise_step_shallow", 3.0)):
        _delay(steps[name], now, seconds)
    _delay(generator._vae_decoder, now, 1.0)
    for interval, expected in ((1, 5 * 10), (2, 3 * 10 + 2 * 3), (9, 10 + 4 * 3)):
        plan = generator._plan(GenerateOptions(steps=5, feature_cache=interval))
        assert generator._trial(plan, 2) == pytest.approx(expected + 1)
    # Guidance on the first half of five steps, which are 0, 1 and 2: full are 0 and 2 with it, 3 and 4 without.
    half = GenerateOptions(steps=5, feature_cache=2, guidance_interval=(0.0, 0.5))
    assert generator._trial(generator._plan(half), 2) == pytest.approx(4 * 10 + 1 * 3 + 1)


def _delay(engine: Any, now: list[float], seconds: float) -> None:
    run = engine.run

    def slow(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        now[0] += seconds
        return run(inputs)

    engine.run = slow
