from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.spec import ScheduleTable
from mi2rage_rt.schedule import Schedule, full_steps, guided_steps, interval_from_text, schedule_for
from tests.runtime.tiny_bundle import schedule


def ddim_by_hand(steps: int) -> ScheduleTable:
    """Song et al. 2021, equation 12 with sigma 0, on 1000 linear betas, `leading` timesteps, final alpha 1."""
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = np.arange(steps)[::-1] * (1000 // steps)
    sample, output = [], []
    for time in times:
        previous = time - 1000 // steps
        alpha, before = alphas[time], alphas[previous] if previous >= 0 else 1.0
        sample.append(np.sqrt(before / alpha))
        output.append(np.sqrt(1 - before) - np.sqrt(before * (1 - alpha) / alpha))
    return _table("DDIM", times, [1.0] * steps, sample, output, 1.0)


def euler_by_hand(steps: int) -> ScheduleTable:
    """Karras et al. 2022, algorithm 1 without churn; the model answers with noise."""
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = np.linspace(0, 999, steps)[::-1]
    sigmas = np.append(np.interp(times, np.arange(1000), np.sqrt((1 - alphas) / alphas)), 0.0)
    scale = 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
    return _table("Euler", times, scale, [1.0] * steps, np.diff(sigmas), float(sigmas[0]))


def _table(name: str, times: Any, scale: Any, sample: Any, output: Any, sigma: float) -> ScheduleTable:
    return ScheduleTable(
        scheduler=name,
        steps=len(times),
        init_noise_sigma=sigma,
        timesteps=tuple(map(float, times)),
        input_scale=tuple(map(float, scale)),
        sample_coefficient=tuple(map(float, sample)),
        output_coefficient=tuple(map(float, output)),
        noise_coefficient=(0.0,) * len(times),
    )


@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_equals_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    common = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    if kind == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
        ours = Schedule(ddim_by_hand(7))
    else:
        scheduler = diffusers.EulerDiscreteScheduler(**common)
        ours = Schedule(euler_by_hand(7))
    scheduler.set_timesteps(7)
    noise = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
    theirs = torch.from_numpy(noise) * float(scheduler.init_noise_sigma)
    latents = ours.initial(noise)
    for step, time in enumerate(scheduler.timesteps):
        assert float(time) == pytest.approx(ours.table.timesteps[step])
        seen = scheduler.scale_model_input(theirs, time)
        np.testing.assert_allclose(ours.scaled(latents, step), seen.numpy(), atol=1e-4)
        theirs = scheduler.step(torch.tanh(seen), time, theirs).prev_sample
        latents = ours.advance(latents, np.tanh(ours.scaled(latents, step)), step)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, theirs.numpy(), atol=1e-4)


def test_noise_is_added_where_the_table_says() -> None:
    ours = Schedule(schedule(3, noise=0.5))
    zero, one = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    assert [ours.needs_noise(step) for step in range(3)] == [True, True, False]
    np.testing.assert_array_equal(ours.advance(zero, zero, 0, one), 0.5 * one)


def test_the_steps_there_are_are_named() -> None:
    tables = [schedule(5), schedule(3)]
    assert schedule_for(tables, 3).steps == 3
    with pytest.raises(InputError, match=r"steps 4: .* expected one of 3, 5"):
        schedule_for(tables, 4)


def test_a_short_column_is_refused() -> None:
    with pytest.raises(BundleError, match="timesteps has 1 numbers; expected 3"):
        Schedule(schedule(3).model_copy(update={"timesteps": (1.0,)}))


def test_the_numbers_of_a_step() -> None:
    table = schedule(3, noise=0.5).model_copy(update={"input_scale": (1.0, 0.25, 1.0), "init_noise_sigma": 3.0})
    ours = Schedule(table)
    numbers = ours.coefficients(1)
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, [0.25, 0.5, 0.25, 0.5])
    latents = np.ones((1, 2), np.float32)
    assert ours.scaled(latents, 0) is latents  # nothing to compute, no copy
    np.testing.assert_array_equal(ours.scaled(latents, 1), [[0.25, 0.25]])
    np.testing.assert_array_equal(ours.initial(latents), [[3.0, 3.0]])
    first = ours.first_steps(1)
    assert first.steps == 1
    assert first.table.timesteps == table.timesteps[:1]
    np.testing.assert_array_equal(first.coefficients(0), ours.coefficients(0))


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [
        (4, (0.0, 1.0), [0, 1, 2, 3]),
        (4, (0.0, 0.5), [0, 1]),
        (5, (0.0, 0.5), [0, 1, 2]),
        (4, (0.25, 0.75), [1, 2]),
        (3, (1.0, 1.0), []),
        (1, (0.0, 0.1), [0]),
    ],
)
def test_guidance_on_a_share_of_the_steps(steps: int, interval: tuple[float, float], expected: list[int]) -> None:
    assert [step for step, guided in enumerate(guided_steps(steps, interval)) if guided] == expected


@pytest.mark.parametrize(
    ("guided", "interval", "expected"),
    [
        ("1111111", 1, [0, 1, 2, 3, 4, 5, 6]),
        ("1111111", 3, [0, 3, 6]),
        ("0000", 9, [0]),
        ("1111000", 3, [0, 3, 4, 6]),  # at 4 guidance ends
        ("0110", 4, [0, 1, 3]),
        ("", 2, []),
    ],
)
def test_steps_that_run_the_whole_unet(guided: str, interval: int, expected: list[int]) -> None:
    found = full_steps([letter == "1" for letter in guided], interval)
    assert [step for step, full in enumerate(found) if full] == expected
    with pytest.raises(InputError, match="feature cache 0: expected a whole number of steps from 1 on"):
        full_steps([True], 0)


def test_unusable_intervals() -> None:
    assert interval_from_text("0:0.5") == (0.0, 0.5)
    for text in ("0.5", "a:b", "0:1:2"):
        with pytest.raises(InputError, match="expected FIRST:LAST"):
            interval_from_text(text)
    for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5), (float("nan"), 1.0)):
        with pytest.raises(InputError, match="two shares of the steps from 0 to 1 in rising order"):
            guided_steps(4, interval)
