"""Text to image without PyTorch: text encoder, UNet and VAE decoder as graphs, the sampler as a table."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, Engine, check_names
from mi2rage_engines.errors import BundleError, DataError, EngineError, InputError
from mi2rage_engines.spec import GeneratorSpec
from mi2rage_rt.batch_search import BatchSearch
from mi2rage_rt.decoder_state import is_on_host
from mi2rage_rt.denoising import FEATURE, Denoising, denoise_with_step, denoise_with_unet, guidance_embedding
from mi2rage_rt.generate_options import DENOISERS, SHALLOW, GenerateOptions, graphs_to_load, without_feature_cache
from mi2rage_rt.memory_use import memory_of
from mi2rage_rt.schedule import Latents, full_steps, guided_steps, schedule_for
from mi2rage_rt.text import PlainTokenizer

__all__ = ["GenerateOptions", "RuntimeGenerator", "graphs_to_load"]

_CONDITIONS = ("encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond")


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    how: Denoising
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt, encoded: states float32 `(sequence, width)`, pooled float32 `(projection,)` where there is one."""

    states: NDArray[np.float32]
    pooled: NDArray[np.float32] | None


class RuntimeGenerator:
    """Fulfils `TextToImage` from a bundle's graphs.

    One object may be called from several threads at once where its engines may, as those on ONNX Runtime; but let one
    call alone measure a batch size (`auto`, `memory_bytes`), with `batch_size`, before the others begin.

    Args:
        spec: the component's part of the manifest.
        engines: `text_encoder`; `denoise_step` or else `unet`, or for feature caching `denoise_step_full` and
            `denoise_step_shallow`; `vae_decoder` (left out by a generator that works on pixels); SDXL has
            `text_encoder_2` too.
        tokenizer: the prompts'.
        options: defaults of every call.
        tokenizer_2: the second text encoder's.

    Raises:
        EngineError: a graph lacks a tensor, or takes one that nothing here gives.
        BundleError: `text_outputs`, text encoders and tokenizers differ in number.
        InputError: the graphs for feature caching do not run on one backend.
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
        self._denoiser = next((name for name in DENOISERS if name in engines), "unet")
        self._unet, self._shallow = engines[self._denoiser], engines.get(SHALLOW)
        self._vae_decoder = engines.get("vae_decoder")
        self._unet_inputs = {tensor.name: tensor for tensor in self._unet.inputs}
        self._clock, self._memory = time.perf_counter, memory_of(self._unet)
        self._searches: dict[tuple[object, ...], BatchSearch] = {}
        self._check_graphs()

    @property
    def on_host(self) -> bool:
        """Whether it computes in the host's memory, on a CPU."""
        return is_on_host(self._unet)

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
        own, outputs_needed = DENOISERS[self._denoiser]
        check_names(self._unet, [*own, _CONDITIONS[0]], outputs_needed)
        unknown = sorted(set(self._unet_inputs) - {*own, *_CONDITIONS})
        if unknown:
            raise EngineError(
                f"{self._unet.name}: takes {', '.join(unknown)}, which this release does not give; expected inputs "
                f"among {', '.join((*own, *_CONDITIONS))}; run it with the release that exported it"
            )
        if self._shallow is not None:
            self._check_shallow(self._shallow)
        if self._vae_decoder is not None:
            check_names(self._vae_decoder, ["latent_sample"], ["sample"])

    def _check_shallow(self, shallow: Engine) -> None:
        check_names(shallow, [*self._unet_inputs, FEATURE], ["next_latents"])
        if type(shallow) is not type(self._unet):
            raise InputError(
                f"{shallow.name}: does not run on the backend of {self._unet.name}; expected one for both, which take "
                "turns with the same memory; build plans of both, or name a --backend that runs both"
            )

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], options: GenerateOptions | None = None
    ) -> NDArray[np.uint8]:
        """Images for prompts; the noise of a row is drawn from its seed alone.

        Equal prompts, seeds and settings give equal images whatever rows they are computed with, but for rounding:
        sums over batches of other sizes may be added in another order, and a pixel differ by a level.

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
        batch = self._batch_size(len(prompts), options, plan)
        images = np.empty((len(prompts), *plan.size, 3), dtype=np.uint8)
        encoded = self._encode(list(dict.fromkeys(prompts)), batch)
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            conditions = self._conditions([encoded[prompt] for prompt in prompts[rows]], plan)
            self._decode_into(images[rows], self._denoise(conditions, seeds[rows], plan.how))
        return images

    def batch_size(self, rows: int, options: GenerateOptions | None = None) -> int:
        """How many of so many images `generate` makes together, measured where the options ask for it.

        What was measured is kept as long as the generator lives.

        Raises:
            InputError: the options cannot be met, or one image needs more memory than they allow.
            EngineError: a graph failed on a single row.
        """
        options = options or self.options
        return self._batch_size(rows, options, self._plan(options))

    def _batch_size(self, rows: int, options: GenerateOptions, plan: _Plan) -> int:
        most = max(1, rows if options.batch_size == "auto" else min(rows, options.batch_size))
        if options.memory_bytes is None and (most == 1 or options.batch_size != "auto"):
            return most
        key = (plan.how.guided, plan.how.full, plan.how.latent_shape)  # what a batch costs depends on nothing else
        if key not in self._searches:
            # Pixels and latents in float32, each with a copy.
            least_bytes = 8 * (3 * math.prod(plan.size) + math.prod(plan.how.latent_shape))
            self._searches[key] = BatchSearch(functools.partial(self._trial, plan), self._memory, least_bytes)
        most = min(most, self._searches[key].within(options.memory_bytes))
        return self._searches[key].fastest(most) if options.batch_size == "auto" else most

    def _denoise(self, conditions: Mapping[str, Array], seeds: Sequence[int], how: Denoising) -> Latents:
        if self._denoiser == "unet":
            return denoise_with_unet(self._unet, conditions, seeds, how)
        return denoise_with_step(self._unet, conditions, seeds, how, self._shallow)

    def _trial(self, plan: _Plan, rows: int) -> float:
        """Seconds for `rows` images, from one step of each kind and one decoding."""
        conditions = self._conditions([self._empty_prompt] * rows, plan)
        images = np.empty((rows, *plan.size, 3), dtype=np.uint8)
        kinds, seconds = Counter(zip(plan.how.guided, plan.how.full, strict=True)), 0.0

        def timed(count: int, guided: bool) -> tuple[float, Latents]:
            begin = self._clock()
            latents = self._denoise(conditions, range(rows), plan.how.first_steps(count, guided))
            return self._clock() - begin, latents

        for guided in set(plan.how.guided):
            full, latents = timed(1, guided)
            seconds += kinds[guided, True] * full
            if kinds[guided, False]:
                seconds += kinds[guided, False] * max(0.0, timed(2, guided)[0] - full)
        begin = self._clock()
        self._decode_into(images, latents)
        return seconds + self._clock() - begin

    def _plan(self, options: GenerateOptions) -> _Plan:
        spec = self.spec
        sizes: list[int] = []
        for name, asked in (("height", options.height), ("width", options.width)):
            pixels = getattr(spec, name) if asked is None else asked
            unit = spec.latents.downsampling * spec.latents.multiple
            if pixels <= 0 or pixels % unit:
                raise InputError(f"{name} {pixels}: expected a positive multiple of {unit}, e.g. {getattr(spec, name)}")
            sizes.append(pixels // spec.latents.downsampling)
        if options.batch_size != "auto" and options.batch_size < 1:
            raise InputError(f"batch size {options.batch_size}: expected 1 or more, or auto")
        guidance = spec.guidance_scale if options.guidance_scale is None else options.guidance_scale
        steps = spec.steps if options.steps is None else options.steps
        guided = guided_steps(steps, options.guidance_interval)
        if guidance <= 1 or "timestep_cond" in self._unet_inputs:
            guided = (False,) * steps
        if options.feature_cache > 1 and self._shallow is None:
            raise without_feature_cache(spec, options.feature_cache)
        full = full_steps(guided, options.feature_cache)
        shape = (spec.latents.channels, sizes[0], sizes[1])
        how = Denoising(schedule_for(spec.schedules, steps), guidance, guided, full, shape)
        return _Plan(how, (sizes[0] * spec.latents.downsampling, sizes[1] * spec.latents.downsampling))

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

    @functools.cached_property
    def _empty_prompt(self) -> _Prompt:
        return self._encode([""], 1)[""]

    def _negative(self) -> _Prompt:
        """What guidance leads away from."""
        empty = self._empty_prompt
        if not self.spec.zero_negative:
            return empty
        return _Prompt(np.zeros_like(empty.states), None if empty.pooled is None else np.zeros_like(empty.pooled))

    def _conditions(self, prompts: Sequence[_Prompt], plan: _Plan) -> dict[str, Array]:
        """The UNet's inputs that stay the same for all steps; where there is guidance, the negative rows come first."""
        rows = [*[self._negative()] * len(prompts), *prompts] if any(plan.how.guided) else prompts
        conditions: dict[str, Array] = {"encoder_hidden_states": np.stack([row.states for row in rows])}
        if "text_embeds" in self._unet_inputs:
            conditions["text_embeds"] = np.stack([row.pooled for row in rows if row.pooled is not None])
        if "time_ids" in self._unet_inputs:
            # As if the image were one that was neither scaled nor cropped.
            conditions["time_ids"] = np.tile(np.array([*plan.size, 0, 0, *plan.size], np.float32), (len(rows), 1))
        if "timestep_cond" in self._unet_inputs:
            size = int(self._unet_inputs["timestep_cond"].shape[-1])
            conditions["timestep_cond"] = np.tile(guidance_embedding(plan.how.guidance_scale, size), (len(rows), 1))
        return conditions

    def _decode_into(self, images: NDArray[np.uint8], latents: Latents) -> None:
        pixels = latents
        if self._vae_decoder is not None:
            scale = self.spec.latents
            scaled = latents / np.float32(scale.scaling_factor) + np.float32(scale.shift_factor)
            pixels = self._vae_decoder.run({"latent_sample": scaled})["sample"]
        for image, row in zip(images, pixels, strict=True):  # one at a time: an image fits the cache, a batch does not
            if not np.isfinite(row).all():
                raise EngineError(
                    f"{self.name}: the decoded image holds NaN or infinity; the graph's precision is too low for this "
                    "model; export the VAE in a higher one"
                )
            image[:] = _levels(row).transpose(1, 2, 0)


def _dtype(engine: Engine, name: str) -> str:
    return next(tensor.dtype for tensor in engine.inputs if tensor.name == name)


def _levels(pixels: Array) -> NDArray[np.float32]:
    """As diffusers' VaeImageProcessor: [-1, 1] to [0, 1], then rounded to the nearest level."""
    levels = pixels.astype(np.float32)  # a copy, which is changed in place
    levels /= 2
    levels += 0.5
    np.clip(levels, 0, 1, out=levels)
    levels *= 255
    return np.rint(levels, out=levels)


def _check_rows(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts but {len(seeds)} seeds; expected one seed for every prompt")
    wrong = next((seed for seed in seeds if not 0 <= seed < 2**64), None)
    if wrong is not None:
        raise DataError(f"seed {wrong}: expected a whole number from 0 to 2^64 - 1")
