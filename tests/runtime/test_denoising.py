"""The loop around one graph a step against the loop around the UNet: the same graph once as NumPy, once as the step.

Tolerance: 1e-5 of latents of about 3, as the groups are weighted in another order.

With feature caching the made-up UNet has a deep part, `_deep`, and an outer one that adds to what it gives: the loop of
two graphs against a loop that keeps the deep part's answer by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.engine import NOTHING, DeviceArray, HostArray, HostEngine
from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import TensorSpec
from mi2rage_rt import noise
from mi2rage_rt.denoising import Denoising, denoise_with_step, denoise_with_unet
from mi2rage_rt.schedule import Schedule, full_steps, guided_steps
from tests.runtime.tiny_bundle import schedule

SHAPE = (2, 3, 4)
SEEDS = [5, 6, 7]


def _unet(sample: Any, time: Any, states: Any, embeds: Any) -> Any:
    moved = states.mean((1, 2)) + embeds.mean(1) + float(np.reshape(time, ())) / 1000
    return np.tanh(sample + moved[:, None, None, None]).astype(np.float32)


def _specs(**shapes: tuple[Any, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


class Unet(HostEngine):
    """Keeps how many rows it was given."""

    name = "unet"
    inputs = _specs(
        sample=("batch", *SHAPE), timestep=(), encoder_hidden_states=("batch", 5, 3), text_embeds=("batch", 4)
    )
    outputs = _specs(out_sample=("batch", *SHAPE))

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.rows.append(len(inputs["sample"]))
        names = ("sample", "timestep", "encoder_hidden_states", "text_embeds")
        return {"out_sample": _unet(*(inputs[name] for name in names))}


class Step(HostEngine):
    """The formula of `GeneratorSpec`, on arrays that only `put` makes; keeps what it was given and what is done."""

    name = "step"
    inputs = _specs(
        latents=("batch", *SHAPE),
        timestep=(1,),
        coefficients=(4,),
        guidance=("groups",),
        noise=("batch", *SHAPE),
        encoder_hidden_states=("groups", "batch", 5, 3),
        text_embeds=("groups", "batch", 4),
    )
    outputs = _specs(next_latents=("batch", *SHAPE))

    def __init__(self) -> None:
        self.puts: list[str] = []
        self.given: list[dict[str, DeviceArray]] = []
        self.buffers: list[DeviceArray] = []

    def put(self, array: Any, name: str) -> DeviceArray:
        self.puts.append(name)
        return HostArray(np.array(super().put(array, name).numpy()))

    def call(self, inputs: Mapping[str, Any], into: Mapping[str, DeviceArray] = NOTHING) -> dict[str, DeviceArray]:
        assert all(isinstance(value, HostArray) for value in inputs.values())
        assert into["next_latents"] not in inputs.values()
        self.given.append(dict(inputs))
        self.buffers.append(into["next_latents"])
        return super().call(inputs, into)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        latents, factors, weights = inputs["latents"], inputs["coefficients"], inputs["guidance"]
        answers = [
            _unet(factors[0] * latents, inputs["timestep"], states, embeds)
            for states, embeds in zip(inputs["encoder_hidden_states"], inputs["text_embeds"], strict=True)
        ]
        guided = sum(weight * answer for weight, answer in zip(weights, answers, strict=True))
        return {"next_latents": factors[1] * latents + factors[2] * guided + factors[3] * inputs["noise"]}


def _how(steps: int, interval: tuple[float, float], sigma: float = 0.0, cache: int = 1) -> Denoising:
    changes = {"init_noise_sigma": 2.0, "input_scale": tuple(0.3 + 0.2 * step for step in range(steps))}
    sampler = Schedule(schedule(steps, noise=sigma).model_copy(update=changes))
    guided = guided_steps(steps, interval)
    return Denoising(sampler, 4.0, guided, full_steps(guided, cache), SHAPE)


def _conditions(how: Denoising) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = len(SEEDS) * (2 if any(how.guided) else 1)
    return {
        "encoder_hidden_states": rng.standard_normal((rows, 5, 3)).astype(np.float32),
        "text_embeds": rng.standard_normal((rows, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.0), (0.0, 0.5), (0.3, 0.7)])
def test_a_graph_a_step_gives_the_latents_of_the_loop(interval: tuple[float, float], sigma: float) -> None:
    how, unet, step = _how(5, interval, sigma), Unet(), Step()
    expected = denoise_with_unet(unet, _conditions(how), SEEDS, how)
    found = denoise_with_step(step, _conditions(how), SEEDS, how)
    assert found.dtype == expected.dtype == np.float32
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    groups = [len(given["guidance"].numpy()) for given in step.given]
    assert unet.rows == [3 * count for count in groups] == [6 if guided else 3 for guided in how.guided]


def test_latents_stay_in_two_buffers_and_conditions_are_put_once() -> None:
    how, step = _how(4, (0.0, 1.0)), Step()
    denoise_with_step(step, _conditions(how), SEEDS, how)
    assert step.puts.count("latents") == 2
    assert step.puts.count("noise") == 0  # no step adds any
    assert [step.puts.count(name) for name in ("encoder_hidden_states", "text_embeds", "guidance")] == [1, 1, 1]
    first, second = step.given[0]["latents"], step.buffers[0]
    assert [given["latents"] for given in step.given] == [first, second, first, second]
    assert step.buffers == [second, first, second, first]


def test_conditions_are_put_again_where_guidance_begins_or_ends() -> None:
    how, step = _how(5, (0.3, 0.7), sigma=0.5), Step()
    denoise_with_step(step, _conditions(how), SEEDS, how)
    assert how.guided == (False, False, True, True, False)
    assert step.puts.count("guidance") == 3
    assert step.puts.count("noise") == 4  # the last step adds none
    np.testing.assert_array_equal(step.given[2]["guidance"].numpy(), [-3.0, 4.0])


@pytest.mark.parametrize(("denoise", "engine"), [(denoise_with_unet, Unet), (denoise_with_step, Step)])
def test_latents_that_are_no_numbers_are_refused(denoise: Any, engine: Any) -> None:
    how = _how(2, (0.0, 1.0))
    conditions = _conditions(how)
    conditions["text_embeds"][-1, 0] = np.nan
    with pytest.raises(EngineError, match="the latents became NaN or infinite"):
        denoise(engine(), conditions, SEEDS, how)


def _deep(sample: Any, time: Any, states: Any) -> Any:
    moved = states.mean((1, 2)) + float(np.reshape(time, ())) / 500
    return np.cos(sample * 2 + moved[:, None, None, None]).astype(np.float32)


def _outer(sample: Any, time: Any, embeds: Any, feature: Any) -> Any:
    moved = embeds.mean(1) + float(np.reshape(time, ())) / 1000
    return np.tanh(sample + feature + moved[:, None, None, None]).astype(np.float32)


class Cached(Step):
    """The step in two parts: `denoise_step_full` with a feature to give, `denoise_step_shallow` with one to take."""

    feature = _specs(feature=("groups", "batch", *SHAPE))

    def __init__(self, *, full: bool) -> None:
        super().__init__()
        self.full = full
        if full:
            self.outputs = (*Step.outputs, *self.feature)
        else:
            self.inputs = (*Step.inputs, *self.feature)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        latents, factors, weights = inputs["latents"], inputs["coefficients"], inputs["guidance"]
        sample, time = factors[0] * latents, inputs["timestep"]
        feature = inputs.get("feature")
        if feature is None:
            feature = np.stack([_deep(sample, time, states) for states in inputs["encoder_hidden_states"]])
        answers = [
            _outer(sample, time, embeds, own) for embeds, own in zip(inputs["text_embeds"], feature, strict=True)
        ]
        guided = sum(weight * answer for weight, answer in zip(weights, answers, strict=True))
        moved = factors[1] * latents + factors[2] * guided + factors[3] * inputs["noise"]
        return {"next_latents": moved, "feature": feature} if self.full else {"next_latents": moved}


def _by_hand(conditions: Mapping[str, Any], how: Denoising, cache: int) -> Any:
    """Row by row and group by group, the deep part's answer kept in a dictionary."""
    table, count = how.schedule.table, len(SEEDS)
    latents = how.schedule.initial(np.stack([noise.normal(seed, SHAPE) for seed in SEEDS]))
    kept: dict[int, Any] = {}
    for step in range(table.steps):
        if step % cache == 0 or how.guided[step] != how.guided[step - 1]:
            kept = {}
        groups = [0, 1] if how.guided[step] else [len(conditions["text_embeds"]) // count - 1]
        answers = []
        for group in groups:
            states, embeds = (conditions[name][group * count :][:count] for name in conditions)
            sample, time = latents * table.input_scale[step], table.timesteps[step]
            if group not in kept:
                kept[group] = _deep(sample, time, states)
            answers.append(_outer(sample, time, embeds, kept[group]))
        output = answers[-1] if len(answers) == 1 else answers[0] + 4.0 * (answers[1] - answers[0])
        drawn = np.stack([noise.normal(seed, SHAPE, stream=1 + step) for seed in SEEDS])
        latents = how.schedule.advance(latents, output, step, drawn)
    return latents


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.0), (0.0, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("cache", [1, 2, 3, 9])
def test_the_feature_is_kept_from_step_to_step(cache: int, interval: tuple[float, float], sigma: float) -> None:
    how, full, shallow = _how(7, interval, sigma, cache), Cached(full=True), Cached(full=False)
    conditions = _conditions(how)
    found = denoise_with_step(full, conditions, SEEDS, how, shallow)
    expected = _by_hand(conditions, how, cache)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (len(full.given), len(shallow.given)) == (how.full.count(True), how.full.count(False))
    uncached = denoise_with_step(Cached(full=True), conditions, SEEDS, _how(7, interval, sigma), shallow)
    assert (np.abs(found - uncached).max() > 5e-4) == (cache > 1)


def test_the_feature_stays_in_one_buffer_until_guidance_changes() -> None:
    how, full, shallow = _how(6, (0.0, 1.0), cache=2), Cached(full=True), Cached(full=False)
    denoise_with_step(full, _conditions(how), SEEDS, how, shallow)
    assert "feature" not in full.puts + shallow.puts  # it never comes to the host
    assert len({id(given["feature"]) for given in shallow.given}) == 1
    assert [shallow.puts.count(name) for name in ("encoder_hidden_states", "guidance", "latents")] == [1, 1, 0]
    how, full, shallow = _how(6, (0.0, 0.5), cache=2), Cached(full=True), Cached(full=False)
    denoise_with_step(full, _conditions(how), SEEDS, how, shallow)
    # Full are 0, 2, 4 and 3, where guidance ends.
    assert how.full == (True, False, True, True, True, False)
    assert [given["feature"].numpy().shape[:2] for given in shallow.given] == [(2, 3), (1, 3)]
