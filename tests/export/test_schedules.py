"""Sampler tables against diffusers' own schedulers, and the samplers that have no table."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from mi2rage_engines.errors import ModelFolderError
from mi2rage_export.schedules import STEP_COUNTS, schedule_table, schedule_tables
from mi2rage_rt.schedule import Schedule
from mi2rage_training.samplers import scheduler_noise

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AFFINE = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    (
        "DDIMScheduler",
        {
            "clip_sample": False,
            "prediction_type": "sample",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("DDPMScheduler", {"clip_sample": False}),
]
REFUSED = [
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
]


def _scheduler(name: str, options: dict[str, object]):
    return getattr(diffusers, name)(**(STABLE_DIFFUSION | options))


@pytest.mark.parametrize(("name", "options"), AFFINE)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_table_steps_as_the_scheduler_does(name, options, steps):
    """The trajectories differ by at most 1e-4 of their size; diffusers computes in float32."""
    schedule = Schedule(schedule_table(_scheduler(name, options), steps))
    scheduler = _scheduler(name, options)
    scheduler.set_timesteps(steps)
    rng = np.random.default_rng(0)
    latents = schedule.initial(rng.standard_normal((2, 4, 3, 3), dtype=np.float32))
    expected = torch.from_numpy(latents.copy())
    for step, timestep in enumerate(scheduler.timesteps):
        output, noise = rng.standard_normal((2, 2, 4, 3, 3), dtype=np.float32)
        scaled = scheduler.scale_model_input(expected, timestep).numpy()
        np.testing.assert_allclose(schedule.scaled(latents, step), scaled, rtol=1e-4, atol=1e-4 * np.abs(scaled).max())
        with scheduler_noise(scheduler, lambda shape, _, noise=noise: noise):
            expected = scheduler.step(torch.from_numpy(output), timestep, expected, return_dict=False)[0].float()
        latents = schedule.advance(latents, output, step, noise if schedule.needs_noise(step) else None)
        size = float(expected.abs().max())
        np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=1e-4 * max(1.0, size))


def test_samplers_that_add_noise_are_told_from_those_that_do_not():
    quiet = schedule_table(_scheduler("EulerDiscreteScheduler", {}), 5)
    noisy = schedule_table(_scheduler("LCMScheduler", {}), 4)
    assert quiet.noise_coefficient == (0.0,) * 5
    assert noisy.noise_coefficient[-1] == 0.0
    assert min(noisy.noise_coefficient[:-1]) > 0.1


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_what_has_no_table_is_refused(name, options):
    with pytest.raises(ModelFolderError, match=rf"scheduler {name}: .* choose another with --scheduler ddim\|euler"):
        schedule_tables(_scheduler(name, options))


def test_step_counts_that_the_scheduler_does_not_permit_are_left_out():
    scheduler = _scheduler("LCMScheduler", {"original_inference_steps": 10})
    assert [table.steps for table in schedule_tables(scheduler)] == [steps for steps in STEP_COUNTS if steps <= 10]
    with pytest.raises(ModelFolderError, match=r"permits none of the step counts \[20\]"):
        schedule_tables(scheduler, [20])


def test_the_scheduler_is_left_as_it_was():
    scheduler = _scheduler("EulerDiscreteScheduler", {})
    scheduler.set_timesteps(7)
    schedule_table(scheduler, 3)
    assert len(scheduler.timesteps) == 7
