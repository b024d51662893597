"""The denoising loop: around a UNet on the host, or on the device where the bundle has a step as one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, DeviceArray, Engine
from mi2rage_engines.errors import EngineError
from mi2rage_rt import noise
from mi2rage_rt.schedule import Latents, Schedule

__all__ = ["FEATURE", "Denoising", "denoise_with_step", "denoise_with_unet", "guidance_embedding"]

FEATURE = "feature"
"""What a full step gives, and shallow ones take."""


@dataclasses.dataclass(frozen=True, slots=True)
class Denoising:
    """What the rows of a batch have in common.

    Attributes:
        schedule: the steps.
        guidance_scale: of classifier-free guidance.
        guided: for each step whether it is guided.
        full: for each step whether the whole UNet runs; see `full_steps`.
        latent_shape: (channels, height, width).
    """

    schedule: Schedule
    guidance_scale: float
    guided: tuple[bool, ...]
    full: tuple[bool, ...]
    latent_shape: tuple[int, int, int]

    def first_steps(self, count: int, guided: bool) -> Denoising:
        """The first steps alone, to measure with: a full one, and behind it such as take its feature."""
        full = (True, *[False] * (count - 1))
        return dataclasses.replace(self, schedule=self.schedule.first_steps(count), guided=(guided,) * count, full=full)


def denoise_with_unet(engine: Engine, conditions: Mapping[str, Array], seeds: Sequence[int], how: Denoising) -> Latents:
    """Latents of a batch, the sampler and guidance computed on the host.

    Args:
        engine: sample (rows, c, h, w), timestep and the conditions -> out_sample (rows, c, h, w).
        conditions: the UNet's other inputs, one row a seed; where any step is guided, as many rows without the prompt
            come first.
        seeds: of the noise, one a row.
        how: the steps.

    Returns:
        float32 (B, c, h, w), before the autoencoder's scale.

    Raises:
        EngineError: the graph failed, or gave NaN or infinity.
    """
    schedule, time = how.schedule, _Time(engine)
    prompted = _prompted(conditions, len(seeds))
    latents = schedule.initial(_noise(seeds, how.latent_shape, stream=0))
    for step, guided in enumerate(how.guided):
        sample = schedule.scaled(latents, step)
        if guided:
            sample = np.concatenate([sample, sample])
        given = {"sample": sample, "timestep": time.at(schedule, step), **(conditions if guided else prompted)}
        output = engine.run(given)["out_sample"].astype(np.float32, copy=False)
        if guided:
            without, towards = np.split(output, 2)
            output = without + np.float32(how.guidance_scale) * (towards - without)
        drawn = _noise(seeds, how.latent_shape, stream=1 + step) if schedule.needs_noise(step) else None
        latents = schedule.advance(latents, output, step, drawn)
    return _finite(engine, latents)


def denoise_with_step(
    engine: Engine,
    conditions: Mapping[str, Array],
    seeds: Sequence[int],
    how: Denoising,
    shallow: Engine | None = None,
) -> Latents:
    """Latents of a batch, which stay where the engine computes until the last step; see `denoise_with_unet`.

    Args:
        engine: the graph `denoise_step` of `GeneratorSpec`, or `denoise_step_full`.
        shallow: `denoise_step_shallow`, needed where not all steps are full.
    """
    schedule, time = how.schedule, _Time(engine)
    initial = schedule.initial(_noise(seeds, how.latent_shape, stream=0))
    latents, spare = engine.put(initial, "latents"), engine.put(np.zeros_like(initial), "latents")
    bound: dict[bool, dict[str, DeviceArray]] = {}
    feature: dict[str, DeviceArray] = {}
    for step, (guided, full) in enumerate(zip(how.guided, how.full, strict=True)):
        runs = engine if full or shallow is None else shallow
        if step and guided != how.guided[step - 1]:
            bound, feature = {}, {}
        if full not in bound:
            bound[full] = _bound(runs, conditions, len(seeds), how.guidance_scale if guided else None)
        drawn = latents  # read, and multiplied by 0
        if schedule.needs_noise(step):
            drawn = runs.put(_noise(seeds, how.latent_shape, stream=1 + step), "noise")
        given = {
            "latents": latents,
            "timestep": runs.put(time.at(schedule, step), "timestep"),
            "coefficients": runs.put(schedule.coefficients(step), "coefficients"),
            "noise": drawn,
            **bound[full],
        }
        if full:
            answer = engine.call(given, into={"next_latents": spare, **feature})
            # Its memory is written again at the next full step.
            feature = {FEATURE: answer[FEATURE]} if shallow is not None else {}
        else:
            runs.call({**given, **feature}, into={"next_latents": spare})
        latents, spare = spare, latents
    # A copy: on the host the memory is the buffer's, which ends with it.
    return _finite(engine, latents.numpy().copy())


def _bound(
    engine: Engine, conditions: Mapping[str, Array], rows: int, guidance_scale: float | None
) -> dict[str, DeviceArray]:
    """What stays the same from step to step: the conditions (groups, batch, ...) and the groups' weights."""
    groups = 1 if guidance_scale is None else 2
    weights = [1.0] if guidance_scale is None else [1.0 - guidance_scale, guidance_scale]
    chosen = conditions if groups == 2 else _prompted(conditions, rows)
    bound = {name: engine.put(array.reshape(groups, rows, *array.shape[1:]), name) for name, array in chosen.items()}
    return {**bound, "guidance": engine.put(np.array(weights, dtype=np.float32), "guidance")}


def _prompted(conditions: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """The rows with the prompts, which come last."""
    return {name: array[-rows:] for name, array in conditions.items()}


class _Time:
    """Time steps as a graph takes them: exports differ, a scalar or one number in a row, whole or not."""

    def __init__(self, engine: Engine) -> None:
        self.spec = next(tensor for tensor in engine.inputs if tensor.name == "timestep")

    def at(self, schedule: Schedule, step: int) -> Array:
        time = np.array(schedule.table.timesteps[step], dtype=self.spec.dtype)
        return time.reshape((1,) * len(self.spec.shape))


def guidance_embedding(guidance_scale: float, size: int) -> NDArray[np.float32]:
    """Sines and cosines of the guidance scale w, float32 `(size,)`, as a guided distillation is told it.

    LCM (Luo et al. 2023, section 4.2) embeds w - 1 as timesteps are: sin and cos of 1000 (w - 1) / 10000^(i / (n - 1)).
    """
    half = size // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -np.float32(np.log(10000.0) / (half - 1)))
    angles = np.float32(1000 * (guidance_scale - 1)) * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, size % 2)).astype(np.float32)


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], stream: int) -> NDArray[np.float32]:
    drawn = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in enumerate(seeds):
        noise.normal_into(drawn[row], seed, stream=stream)
    return drawn


def _finite(engine: Engine, latents: Latents) -> Latents:
    if not np.isfinite(latents).all():
        raise EngineError(
            f"{engine.name}: the latents became NaN or infinite; the graph's precision is too low for this model; "
            "export it in a higher one"
        )
    return latents
