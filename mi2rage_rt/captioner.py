"""Image to text without PyTorch: the vision graph once an image, then the decoder graph token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, Engine, check_names
from mi2rage_engines.errors import DataError, EngineError, InputError
from mi2rage_engines.spec import CaptionerSpec
from mi2rage_rt.decoding import choose_tokens
from mi2rage_rt.images import pixel_values
from mi2rage_rt.protocols import Image
from mi2rage_rt.resampling import image_batches
from mi2rage_rt.text import PlainTokenizer

__all__ = ["CaptionOptions", "RuntimeCaptioner"]

_CROSS = ("cross_keys", "cross_values")
_STATE = ("past_keys", "past_values", *_CROSS)


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionOptions:
    """How captions are written.

    Attributes:
        max_new_tokens: tokens after the prefix at most; None takes the bundle's default.
        top_p, temperature: of nucleus sampling, see `choose_tokens`.
        batch_size: images captioned together at most.
    """

    max_new_tokens: int | None = None
    top_p: float = 0.9
    temperature: float = 1.0
    batch_size: int = 16


class RuntimeCaptioner:
    """Fulfils `ImageToText` from a bundle's graphs.

    Args:
        spec: the component's part of the manifest.
        engines: `vision` and `decoder`.
        tokenizer: the captions'.
        options: defaults of every call.

    Raises:
        EngineError: a graph lacks a tensor.
    """

    def __init__(
        self,
        spec: CaptionerSpec,
        engines: Mapping[str, Engine],
        tokenizer: PlainTokenizer,
        options: CaptionOptions | None = None,
    ) -> None:
        self.name = spec.name
        self.spec = spec
        self.options = options or CaptionOptions()
        self._tokenizer = tokenizer
        self._vision = engines["vision"]
        self._decoder = engines["decoder"]
        self._takes_images = any(tensor.name == "image" for tensor in self._vision.inputs)
        check_names(self._vision, ["image", "rows", "columns"] if self._takes_images else ["pixel_values"], _CROSS)
        check_names(self._decoder, ["input_ids", *_STATE], ["logits", "present_keys", "present_values"])
        self._dtype = next(tensor.dtype for tensor in self._decoder.inputs if tensor.name == "past_keys")

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        options: CaptionOptions | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        """Captions in the order of the images, each beginning with its prefix.

        Args:
            images: uint8 `(H, W, 3)` each.
            prefixes: one an image; by default none.
            seeds: one an image for nucleus sampling; None for greedy decoding.
            options: in place of those given at construction.
            with_prefix: off leaves the prefix out of what is returned.

        Raises:
            DataError: the lists differ in length, or a prefix leaves no room.
            InputError: an option is out of range.
            EngineError: a graph failed, or gave NaN.
        """
        options = options or self.options
        _check_options(options)
        prompts = [self.prompt_ids(prefix) for prefix in (prefixes if prefixes is not None else [""] * len(images))]
        if len(prompts) != len(images) or (seeds is not None and len(seeds) != len(images)):
            raise DataError(
                f"{len(images)} images, {len(prompts)} prefixes, {'no' if seeds is None else len(seeds)} seeds; "
                "expected one of each for every image"
            )
        captions = [""] * len(images)
        # Rows of one call have equal lengths: the decoder graph knows no padding.
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            for start in range(0, len(rows), options.batch_size):
                batch = rows[start : start + options.batch_size]
                ids = self.generate_ids(
                    [images[row] for row in batch],
                    [prompts[row] for row in batch],
                    None if seeds is None else [seeds[row] for row in batch],
                    options,
                )
                for row, sequence in zip(batch, ids, strict=True):
                    captions[row] = self._tokenizer.decode(sequence if with_prefix else sequence[length - 1 :])
        return captions

    def prompt_ids(self, prefix: str) -> list[int]:
        """The ids that decoding starts from: `bos_id`, then the prefix's ids."""
        return [self.spec.bos_id, *self._tokenizer.bare_ids(prefix)]

    def generate_ids(
        self,
        images: Sequence[Image],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        options: CaptionOptions | None = None,
    ) -> list[list[int]]:
        """The ids after the first and before the end, prefix included, of one batch.

        Args:
            images: uint8 `(H, W, 3)` each.
            prompts: what `prompt_ids` gave, all of one length.
            seeds: None for greedy decoding.
            options: in place of those given at construction.
        """
        options = options or self.options
        room = self._tokenizer.max_length - len(prompts[0])
        if room < 1:
            raise DataError(
                f"{self.name}: a prefix of {len(prompts[0])} tokens leaves no room; expected a shorter one "
                f"(the model has {self._tokenizer.max_length} positions)"
            )
        limit = min(options.max_new_tokens or self.spec.max_new_tokens, room)
        state = self._start(images)
        written = [list(prompt) for prompt in prompts]
        active = np.arange(len(images))
        step_ids = np.array(prompts, dtype=np.int64)
        for step in range(limit):
            logits = self._advance(step_ids, state)
            chosen = choose_tokens(
                logits,
                None if seeds is None else [seeds[int(row)] for row in active],
                step,
                top_p=options.top_p,
                temperature=options.temperature,
            )
            going = chosen != self.spec.eos_id
            for row, token in zip(active[going], chosen[going], strict=True):
                written[row].append(int(token))
            if not going.any():
                break
            if not going.all():
                state.update({name: array[:, going] for name, array in state.items()})
            active, step_ids = active[going], chosen[going, None]
        return [ids[1:] for ids in written]

    def _start(self, images: Sequence[Image]) -> dict[str, Array]:
        """The decoder's state before the first id: an empty past, and what the images give."""
        spec = self.spec
        empty = np.zeros((spec.layers, len(images), spec.heads, 0, spec.head_size), dtype=self._dtype)
        if self._takes_images:
            cross = self._look_by_size(images)
        else:
            cross = self._vision.run({"pixel_values": pixel_values(images, spec.preprocessing)})
        return {"past_keys": empty, "past_values": empty, **{name: cross[name] for name in _CROSS}}

    def _look_by_size(self, images: Sequence[Image]) -> dict[str, Array]:
        """What a vision graph with preprocessing gives for images of any sizes; those of one size run together."""
        places: list[int] = []
        answers = []
        for batch, inputs in image_batches(images, self.spec.preprocessing, self.spec.graphs["vision"].axes):
            places += batch
            answers.append(self._vision.run(inputs))
        order = np.argsort(places)
        return {name: np.concatenate([answer[name] for answer in answers], axis=1)[:, order] for name in _CROSS}

    def _advance(self, ids: NDArray[np.int64], state: dict[str, Array]) -> NDArray[np.float32]:
        """Run the decoder on `ids` `(B, L)`, move `state` on, and return the last logits `(B, V)`."""
        output = self._decoder.run({"input_ids": ids, **state})
        state["past_keys"], state["past_values"] = output["present_keys"], output["present_values"]
        logits: NDArray[np.float32] = output["logits"][:, -1].astype(np.float32, copy=False)
        if np.isnan(logits).any():
            raise EngineError(
                f"{self._decoder.name}: the logits hold NaN; the graph's precision is too low for this model; "
                "export it in a higher one"
            )
        return logits


def _check_options(options: CaptionOptions) -> None:
    if not 0 < options.top_p <= 1:
        raise InputError(f"top_p {options.top_p}: expected a share above 0 and at most 1, e.g. 0.9")
    if options.temperature <= 0:
        raise InputError(f"temperature {options.temperature}: expected a number above 0, e.g. 1.0")
    if options.batch_size < 1:
        raise InputError(f"batch size {options.batch_size}: expected 1 or more")
