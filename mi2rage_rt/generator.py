"""Text to image without PyTorch: text encoder, UNet and VAE decoder as graphs, the sampler as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, Engine, check_names
from mi2rage_engines.errors import BundleError, DataError, EngineError, InputError
from mi2rage_engines.spec import GeneratorSpec
from mi2rage_rt import noise
from mi2rage_rt.schedule import Schedule, schedule_for
from mi2rage_rt.text import PlainTokenizer

__all__ = ["GenerateOptions", "RuntimeGenerator"]

Latents = NDArray[np.float32]

_UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond")


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What may differ from the bundle's own defaults; None takes them.

    Attributes:
        steps: denoising steps; the bundle has a schedule for some numbers.
        guidance_scale: of classifier-free guidance; 1 or less leaves it out. A model distilled with guidance is told
            it instead.
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
    guided: bool
    latent_shape: tuple[int, int, int]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt, encoded: states float32 `(sequence, width)`, pooled float32 `(projection,)` where there is one."""

    states: NDArray[np.float32]
    pooled: NDArray[np.float32] | None


class RuntimeGenerator:
    """Fulfils `TextToImage` from a bundle's graphs.

    Args:
        spec: the component's part of the manifest.
        engines: `text_encoder`, `unet`, and `vae_decoder` (left out by a generator that works on pixels); SDXL has
            `text_encoder_2` too.
        tokenizer: the prompts'.
        options: defaults of every call.
        tokenizer_2: the second text encoder's.

    Raises:
        EngineError: a graph lacks a tensor, or takes one that nothing here gives.
        BundleError: `text_outputs`, text encoders and tokenizers differ in number.
    """

    def __init__(
        self,
        spec: GeneratorSpec,
        engines: Mapping[str, Engine],
        tokenizer: PlainTokenizer,
        options: GenerateOptions | None = None,
        tokenizer_2: PlainTokenizer | None = None,
    ) -> None:
        self.name = spec.name
        self.spec = spec
        self.options = options or GenerateOptions()
        self._tokenizers = [tokenizer] if tokenizer_2 is None else [tokenizer, tokenizer_2]
        self._text_encoders = [engines[name] for name in ("text_encoder", "text_encoder_2") if name in engines]
        self._unet = engines["unet"]
        self._vae_decoder = engines.get("vae_decoder")
        self._unet_inputs = {tensor.name: tensor for tensor in self._unet.inputs}
        self._check_graphs()

    def _check_graphs(self) -> None:
        outputs = self.spec.text_outputs
        counts = (len(outputs), len(self._text_encoders), len(self._tokenizers))
        if len(set(counts)) > 1:
            raise BundleError(
                f"{self.name}: {counts[0]} text_outputs, {counts[1]} text encoders and {counts[2]} tokenizers; "
                "expected as many of each; export again"
            )
        pooled = ["text_embeds"] if "text_embeds" in self._unet_inputs else []
        for encoder, output in zip(self._text_encoders, outputs, strict=True):
            needed = [output, *pooled] if encoder is self._text_encoders[-1] else [output]
            check_names(encoder, ["input_ids"], needed)
        check_names(self._unet, ["sample", "timestep", "encoder_hidden_states"], ["out_sample"])
        unknown = sorted(set(self._unet_inputs) - set(_UNET_INPUTS))
        if unknown:
            raise EngineError(
                f"{self._unet.name}: takes {', '.join(unknown)}, which this release does not give; expected inputs "
                f"among {', '.join(_UNET_INPUTS)}; run it with the release that exported it"
            )
        if self._vae_decoder is not None:
            check_names(self._vae_decoder, ["latent_sample"], ["sample"])

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
        images = np.empty((len(prompts), *plan.size, 3), dtype=np.uint8)
        encoded = self._encode(list(dict.fromkeys(prompts)), options.batch_size)
        negative = self._negative() if plan.guided else None
        for start in range(0, len(prompts), options.batch_size):
            rows = slice(start, start + options.batch_size)
            conditions = self._conditions([encoded[prompt] for prompt in prompts[rows]], negative, plan)
            latents = self._denoise(conditions, seeds[rows], plan)
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
        return _Plan(
            schedule=schedule_for(spec.schedules, steps),
            guidance_scale=guidance,
            guided=guidance > 1 and "timestep_cond" not in self._unet_inputs,
            latent_shape=(spec.latents.channels, sizes[0], sizes[1]),
            size=(sizes[0] * spec.latents.downsampling, sizes[1] * spec.latents.downsampling),
        )

    def _encode(self, prompts: Sequence[str], batch_size: int) -> dict[str, _Prompt]:
        encoded = {}
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            outputs = [
                encoder.run({"input_ids": tokenizer.encode(batch).astype(_dtype(encoder, "input_ids"))})
                for encoder, tokenizer in zip(self._text_encoders, self._tokenizers, strict=True)
            ]
            parts = [output[name] for output, name in zip(outputs, self.spec.text_outputs, strict=True)]
            states = np.concatenate(parts, axis=-1).astype(np.float32, copy=False)
            pooled: Sequence[Array | None] = [None] * len(batch)
            if "text_embeds" in self._unet_inputs:
                pooled = list(outputs[-1]["text_embeds"].astype(np.float32, copy=False))
            encoded.update({prompt: _Prompt(*rows) for prompt, *rows in zip(batch, states, pooled, strict=True)})
        return encoded

    def _negative(self) -> _Prompt:
        """What guidance leads away from."""
        empty = self._encode([""], 1)[""]
        if not self.spec.zero_negative:
            return empty
        return _Prompt(np.zeros_like(empty.states), None if empty.pooled is None else np.zeros_like(empty.pooled))

    def _conditions(self, prompts: Sequence[_Prompt], negative: _Prompt | None, plan: _Plan) -> dict[str, Array]:
        """The UNet's inputs that stay the same for all steps; where there is guidance, the negative rows come first."""
        rows = prompts if negative is None else [*[negative] * len(prompts), *prompts]
        conditions: dict[str, Array] = {"encoder_hidden_states": np.stack([row.states for row in rows])}
        if "text_embeds" in self._unet_inputs:
            conditions["text_embeds"] = np.stack([row.pooled for row in rows if row.pooled is not None])
        if "time_ids" in self._unet_inputs:
            # As if the image were one that was neither scaled nor cropped.
            conditions["time_ids"] = np.tile(np.array([*plan.size, 0, 0, *plan.size], np.float32), (len(rows), 1))
        if "timestep_cond" in self._unet_inputs:
            size = int(self._unet_inputs["timestep_cond"].shape[1])
            conditions["timestep_cond"] = np.tile(_guidance_embedding(plan.guidance_scale, size), (len(rows), 1))
        return conditions

    def _denoise(self, conditions: Mapping[str, Array], seeds: Sequence[int], plan: _Plan) -> Latents:
        schedule = plan.schedule
        latents = schedule.initial(_noise(seeds, plan.latent_shape, stream=0))
        for step in range(schedule.steps):
            sample = schedule.scaled(latents, step)
            if plan.guided:
                sample = np.concatenate([sample, sample])
            output = self._unet.run({"sample": sample, "timestep": self._time(schedule, step), **conditions})[
                "out_sample"
            ].astype(np.float32, copy=False)
            if plan.guided:
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
        wanted = self._unet_inputs["timestep"]
        return np.array(schedule.table.timesteps[step], dtype=wanted.dtype).reshape((1,) * len(wanted.shape))

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


def _dtype(engine: Engine, name: str) -> str:
    return next(tensor.dtype for tensor in engine.inputs if tensor.name == name)


def _guidance_embedding(guidance_scale: float, size: int) -> NDArray[np.float32]:
    """Sines and cosines of the guidance scale w, float32 `(size,)`, as a guided distillation is told it.

    LCM (Luo et al. 2023, section 4.2) embeds w - 1 as timesteps are: sin and cos of 1000 (w - 1) / 10000^(i / (n - 1)).
    """
    half = size // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -np.float32(np.log(10000.0) / (half - 1)))
    angles = np.float32(1000 * (guidance_scale - 1)) * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, size % 2)).astype(np.float32)


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], stream: int) -> Latents:
    return np.stack([noise.normal(seed, shape, stream=stream) for seed in seeds])


def _check_rows(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts but {len(seeds)} seeds; expected one seed for every prompt")
    wrong = next((seed for seed in seeds if not 0 <= seed < 2**64), None)
    if wrong is not None:
        raise DataError(f"seed {wrong}: expected a whole number from 0 to 2^64 - 1")
