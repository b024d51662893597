"""Sampler tables, read off diffusers' schedulers by probing their `step` with known inputs.

Nothing here knows a formula: whatever a scheduler's configuration does to its coefficients is in the table. A step
that is not affine in (sample, model output, noise), or that remembers earlier steps, is found out and refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import ScheduleTable
from mi2rage_training.samplers import SCHEDULERS, scheduler_noise

__all__ = ["STEP_COUNTS", "schedule_table", "schedule_tables"]

STEP_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50)
"""Numbers of steps that every bundle gets a table for, where the scheduler permits them."""

_TOLERANCE = 1e-4
"""Relative; diffusers computes its coefficients in float32."""

_LARGE = 100.0
"""Large enough to be cut off wherever a scheduler clips its predictions."""


def schedule_table(scheduler: Any, steps: int) -> ScheduleTable:
    """The table of `scheduler` for a number of steps; the scheduler itself is left as it is.

    Args:
        scheduler: one of diffusers' schedulers.
        steps: number of denoising steps.

    Raises:
        ModelFolderError: its step is not affine, or depends on earlier steps.
        ValueError: the scheduler does not permit this number of steps.
    """
    scheduler = _fresh(scheduler)
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        raise _unsupported(scheduler, f"calls the model {len(scheduler.timesteps)} times in {steps} steps")
    rng = np.random.default_rng(steps)
    columns = [_probe(scheduler, timestep, rng) for timestep in scheduler.timesteps]
    scale, sample, output, noise = (tuple(column[index] for column in columns) for index in range(4))
    return ScheduleTable(
        scheduler=type(scheduler).__name__,
        steps=steps,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        timesteps=tuple(float(timestep) for timestep in scheduler.timesteps),
        input_scale=scale,
        sample_coefficient=sample,
        output_coefficient=output,
        noise_coefficient=noise,
    )


def schedule_tables(scheduler: Any, counts: Iterable[int] = STEP_COUNTS) -> tuple[ScheduleTable, ...]:
    """Tables for those of `counts` that the scheduler permits, fewest steps first.

    Raises:
        ModelFolderError: the scheduler's step cannot be put into a table, or none of the counts is permitted.
    """
    tables = []
    for steps in sorted(set(counts)):
        try:
            tables.append(schedule_table(scheduler, steps))
        except (ValueError, IndexError, ZeroDivisionError):  # e.g. more steps than LCM was distilled for
            continue
    if not tables:
        raise _unsupported(scheduler, f"permits none of the step counts {sorted(set(counts))}")
    return tuple(tables)


def _fresh(scheduler: Any) -> Any:
    return type(scheduler).from_config(copy.deepcopy(dict(scheduler.config)))


def _unsupported(scheduler: Any, reason: str) -> ModelFolderError:
    return ModelFolderError(
        f"scheduler {type(scheduler).__name__}: {reason}; expected one whose step is affine in the sample, the model's "
        f"output and fresh noise (no multi-step solver, clip_sample and thresholding off); "
        f"choose another with --scheduler {'|'.join(SCHEDULERS)}"
    )


def _probe(scheduler: Any, timestep: Any, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Coefficients of one step: (input scale, sample, model output, noise).

    The probe's columns are independent cells of one sample: the three unit vectors give the coefficients, the rest
    (nothing at all, random values, large ones) must come out as the coefficients say. The random columns differ from
    step to step, so a scheduler that mixes in earlier outputs fails.
    """
    import torch

    random = rng.standard_normal((3, 4))
    inputs = np.concatenate([np.eye(3), np.zeros((3, 1)), random, random * _LARGE], axis=1)
    sample, output = (torch.from_numpy(row.reshape(1, 1, 1, -1)) for row in inputs[:2])

    def draw(shape: tuple[int, ...], _: int) -> NDArray[np.float64]:
        return np.reshape(inputs[2], shape)

    scaled = scheduler.scale_model_input(sample.clone(), timestep)
    with scheduler_noise(scheduler, draw):
        result = scheduler.step(output, timestep, sample.clone(), return_dict=False)[0]
    found = result.double().numpy().ravel()
    coefficients = found[:3].copy()
    if result.shape != sample.shape or not _close(found, coefficients @ inputs, inputs):
        raise _unsupported(scheduler, "its step is not affine, or it remembers earlier steps")
    scale = float(scaled.double().ravel()[0])
    if not _close(scaled.double().numpy().ravel(), scale * inputs[0], inputs):
        raise _unsupported(scheduler, "it does not scale the model's input by a number")
    return scale, float(coefficients[0]), float(coefficients[1]), float(coefficients[2])


def _close(found: NDArray[np.float64], expected: NDArray[np.float64], inputs: NDArray[np.float64]) -> bool:
    # Terms may cancel: what counts is the error against the size of what was added up.
    size = np.abs(expected).max() / np.abs(inputs).max()
    bound = _TOLERANCE * np.maximum(np.abs(inputs).max(axis=0), 1e-3) * max(size, 1.0)
    return bool(np.isfinite(found).all() and (np.abs(found - expected) <= bound).all())
