"""Text to image without PyTorch: text encoder, UNet and VAE decoder as graphs, the sampler as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Engine, check_names
from mi2rage_engines.errors import DataError, EngineError, InputError
from mi2rage_engines.spec import GeneratorSpec
from mi2rage_rt import noise
from mi2rage_rt.schedule import Schedule, schedule_for
from mi2rage_rt.text import PlainTokenizer

__all__ = ["GenerateOptions", "RuntimeGenerator"]

Latents = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What may differ from the bundle's own defaults; None takes them.

    Attributes:
        steps: denoising steps; the bundle has a schedule for some numbers.
        guidance_scale: of classifier-free guidance; 1 or less leaves it out.
        height, width: in pixels.
        batch_size: images made together at most.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    schedule: Schedule
    guidance_scale: float
    latent_shape: tuple[int, int, int]


class RuntimeGenerator:
    """Fulfils `TextToImage` from a bundle's graphs.

    Args:
        spec: the component's part of the manifest.
        engines: `text_encoder`, `unet`, and `vae_decoder` (left out by a generator that works on pixels).
        tokenizer: the prompts'.
        options: defaults of every call.

    Raises:
        EngineError: a graph lacks a tensor.
    """

    def __init__(
        self,
        spec: GeneratorSpec,
        engines: Mapping[str, Engine],
        tokenizer: PlainTokenizer,
        options: GenerateOptions | None = None,
    ) -> None:
        self.name = spec.name
        self.spec = spec
        self.options = options or GenerateOptions()
        self._tokenizer = tokenizer
        self._text_encoder = engines["text_encoder"]
        self._unet = engines["unet"]
        self._vae_decoder = engines.get("vae_decoder")
        check_names(self._text_encoder, ["input_ids"], ["last_hidden_state"])
        check_names(self._unet, ["sample", "timestep", "encoder_hidden_states"], ["out_sample"])
        if self._vae_decoder is not None:
            check_names(self._vae_decoder, ["latent_sample"], ["sample"])
        self._timestep = next(tensor for tensor in self._unet.inputs if tensor.name == "timestep")

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], options: GenerateOptions | None = None
    ) -> NDArray[np.uint8]:
        """Images for prompts; the noise of a row is drawn from its seed alone.

        Args:
            prompts: one a row; equal ones are encoded once.
            seeds: 0 to 2^64 - 1, one a row.
            options: in place of those given at construction.

        Returns:
            uint8 `(B, H, W, 3)`, in the order given.

        Raises:
            InputError: the options ask for steps without a schedule, or for a size the model cannot make.
            DataError: prompts and seeds differ in number, or a seed is out of range.
            EngineError: a graph failed, or gave NaN or infinity.
        """
        options = options or self.options
        plan = self._plan(options)
        _check_rows(prompts, seeds)
        height = plan.latent_shape[1] * self.spec.latents.downsampling
        width = plan.latent_shape[2] * self.spec.latents.downsampling
        images = np.empty((len(prompts), height, width, 3), dtype=np.uint8)
        states = self._encode(list(dict.fromkeys(prompts)), options.batch_size)
        negative = self._encode([""], 1)[""] if plan.guidance_scale > 1 else None
        for start in range(0, len(prompts), options.batch_size):
            rows = slice(start, start + options.batch_size)
            positive = np.stack([states[prompt] for prompt in prompts[rows]])
            latents = self._denoise(positive, negative, seeds[rows], plan)
            images[rows] = self._decode(latents)
        return images

    def _plan(self, options: GenerateOptions) -> _Plan:
        spec = self.spec
        sizes = []
        for name, pixels in (("height", options.height or spec.height), ("width", options.width or spec.width)):
            unit = spec.latents.downsampling * spec.latents.multiple
            if pixels <= 0 or pixels % unit:
                raise InputError(f"{name} {pixels}: expected a positive multiple of {unit}, e.g. {getattr(spec, name)}")
            sizes.append(pixels // spec.latents.downsampling)
        if options.batch_size < 1:
            raise InputError(f"batch size {options.batch_size}: expected 1 or more")
        guidance = spec.guidance_scale if options.guidance_scale is None else options.guidance_scale
        steps = spec.steps if options.steps is None else options.steps
        return _Plan(schedule_for(spec.schedules, steps), guidance, (spec.latents.channels, sizes[0], sizes[1]))

    def _encode(self, prompts: Sequence[str], batch_size: int) -> dict[str, NDArray[np.float32]]:
        """Hidden states float32 `(sequence, width)` by prompt."""
        states: dict[str, NDArray[np.float32]] = {}
        dtype = next(tensor.dtype for tensor in self._text_encoder.inputs if tensor.name == "input_ids")
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            ids = self._tokenizer.encode(batch).astype(dtype)
            hidden = self._text_encoder.run({"input_ids": ids})["last_hidden_state"].astype(np.float32)
            states.update(zip(batch, hidden, strict=True))
        return states

    def _denoise(
        self,
        positive: NDArray[np.float32],
        negative: NDArray[np.float32] | None,
        seeds: Sequence[int],
        plan: _Plan,
    ) -> Latents:
        schedule = plan.schedule
        latents = schedule.initial(_noise(seeds, plan.latent_shape, stream=0))
        context = positive
        if negative is not None:
            context = np.concatenate([np.broadcast_to(negative, positive.shape), positive])
        for step in range(schedule.steps):
            sample = schedule.scaled(latents, step)
            if negative is not None:
                sample = np.concatenate([sample, sample])
            output = self._unet.run(
                {"sample": sample, "timestep": self._time(schedule, step), "encoder_hidden_states": context}
            )["out_sample"].astype(np.float32, copy=False)
            if negative is not None:
                without, towards = np.split(output, 2)
                output = without + np.float32(plan.guidance_scale) * (towards - without)
            drawn = _noise(seeds, plan.latent_shape, stream=1 + step) if schedule.needs_noise(step) else None
            latents = schedule.advance(latents, output, step, drawn)
        if not np.isfinite(latents).all():
            raise EngineError(
                f"{self._unet.name}: the latents became NaN or infinite; the graph's precision is too low for this "
                "model; export it in a higher one"
            )
        return latents

    def _time(self, schedule: Schedule, step: int) -> NDArray[np.float32] | NDArray[np.int64]:
        # Exports differ: a scalar or one number in a row, whole or not.
        value = np.array(schedule.table.timesteps[step], dtype=self._timestep.dtype)
        return value.reshape((1,) * len(self._timestep.shape))

    def _decode(self, latents: Latents) -> NDArray[np.uint8]:
        pixels = latents
        if self._vae_decoder is not None:
            scale = self.spec.latents
            scaled = latents / np.float32(scale.scaling_factor) + np.float32(scale.shift_factor)
            pixels = self._vae_decoder.run({"latent_sample": scaled})["sample"].astype(np.float32, copy=False)
        if not np.isfinite(pixels).all():
            raise EngineError(
                f"{self.name}: the decoded image holds NaN or infinity; the graph's precision is too low for this "
                "model; export the VAE in a higher one"
            )
        # As diffusers' VaeImageProcessor: [-1, 1] to [0, 1], then rounded to the nearest level.
        levels = np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255
        return np.asarray(levels.round(), dtype=np.uint8)


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], stream: int) -> Latents:
    return np.stack([noise.normal(seed, shape, stream=stream) for seed in seeds])


def _check_rows(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts but {len(seeds)} seeds; expected one seed for every prompt")
    wrong = next((seed for seed in seeds if not 0 <= seed < 2**64), None)
    if wrong is not None:
        raise DataError(f"seed {wrong}: expected a whole number from 0 to 2^64 - 1")
