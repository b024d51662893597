"""Image to text without PyTorch: the vision graph once an image, then the decoder graph token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import NOTHING, Array, DeviceArray, Engine, check_names
from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.spec import CaptionerSpec
from mi2rage_rt.beam_search import BeamSearch, BeamSettings
from mi2rage_rt.caption_options import CaptionOptions, check_options
from mi2rage_rt.decoder_state import (
    DecoderState,
    GrowingState,
    StaticBuffers,
    StaticState,
    cross_names,
    is_on_host,
    room_for,
    rows_axis,
)
from mi2rage_rt.decoding import choose_tokens
from mi2rage_rt.images import pixel_values
from mi2rage_rt.protocols import Image
from mi2rage_rt.resampling import image_batches
from mi2rage_rt.text import PlainTokenizer

__all__ = ["CaptionOptions", "RuntimeCaptioner"]

_PAST = ("past_keys", "past_values")
_TAKES = {"decoder": ("input_ids", *_PAST), "decoder_static": ("input_ids", "position", *_PAST)}
_GIVES = ("logits", "present_keys", "present_values")


class RuntimeCaptioner:
    """Fulfils `ImageToText` from a bundle's graphs.

    One object may be called from several threads at once where its engines may, as those on ONNX Runtime: what a call
    has written, and what is past, belong to the call.

    Args:
        spec: the component's part of the manifest.
        engines: `vision`, and `decoder`, `decoder_static`, or both.
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
        self._decoders = {name: engine for name, engine in engines.items() if name != "vision"}
        self._takes_images = any(tensor.name == "image" for tensor in self._vision.inputs)
        sees = ["image", "rows", "columns"] if self._takes_images else ["pixel_values"]
        for name, engine in self._decoders.items():
            cross = cross_names(engine)
            check_names(engine, (*_TAKES[name], *(cross or ("cross_keys_0",))), _GIVES)
            check_names(self._vision, sees, cross)
        # Taken out while it is used, so that no two threads have it.
        self._spare: dict[tuple[int, int], StaticBuffers] = {}

    @property
    def on_host(self) -> bool:
        """Whether it computes in the host's memory, on a CPU."""
        return is_on_host(self._vision)

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
            seeds: one an image for nucleus sampling; None for greedy decoding or beam search.
            options: in place of those given at construction.
            with_prefix: off leaves the prefix out of what is returned.

        Raises:
            DataError: the lists differ in length, or a prefix leaves no room.
            InputError: an option is out of range.
            EngineError: a graph failed, or gave NaN.
        """
        options = options or self.options
        check_options(options)
        prompts = [self.prompt_ids(prefix) for prefix in (prefixes if prefixes is not None else [""] * len(images))]
        if len(prompts) != len(images) or (seeds is not None and len(seeds) != len(images)):
            raise DataError(
                f"{len(images)} images, {len(prompts)} prefixes, {'no' if seeds is None else len(seeds)} seeds; "
                "expected one of each for every image"
            )
        captions = [""] * len(images)
        images_at_once = max(1, options.batch_size // (options.beams if seeds is None else 1))
        # Rows of one call have equal lengths: the decoder graph knows no padding.
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            for start in range(0, len(rows), images_at_once):
                batch = rows[start : start + images_at_once]
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
            seeds: None for greedy decoding or beam search.
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
        searches = seeds is None and options.beams > 1
        start = np.array(prompts, dtype=np.int64)
        static = self._static_decoder(options, searches=searches)
        if static is None:
            engine = self._decoders["decoder"]
            cross = self._near(self._look(images), engine)
            state: DecoderState = GrowingState(engine, cross, self.spec, len(start), on_host=is_on_host(engine))
            written = self._written(state, start, limit, seeds, options)
        else:
            key = (len(start), room_for(start.shape[1] + limit - 1, self.spec))
            spare = self._spare.pop(key, None)
            cross = self._near(self._look(images, NOTHING if spare is None else spare.cross), static)
            state = StaticState(static, cross, self.spec, *key, on_host=is_on_host(static), spare=spare)
            written = self._written(state, start, limit, seeds, options)
            if state.rows == len(start) and not is_on_host(static):
                self._spare = {key: state.buffers()}  # one alone: an image's keys and values take 40 MB and more
        return [[*prompt[1:], *ids] for prompt, ids in zip(prompts, written, strict=True)]

    def _written(
        self,
        state: DecoderState,
        start: NDArray[np.int64],
        limit: int,
        seeds: Sequence[int] | None,
        options: CaptionOptions,
    ) -> list[list[int]]:
        """The ids behind `start` `(B, L)` of each image."""
        if seeds is None and options.beams > 1:
            return self._search(state, start, limit, options)
        return self._write(state, start, limit, seeds, options)

    def _write(
        self,
        state: DecoderState,
        start: NDArray[np.int64],
        limit: int,
        seeds: Sequence[int] | None,
        options: CaptionOptions,
    ) -> list[list[int]]:
        """Greedy decoding or sampling: the ids behind `start` `(B, L)` of each row."""
        written: list[list[int]] = [[] for _ in start]
        images = np.arange(len(start))  # of the state's rows
        going = np.arange(len(start))  # rows of the state that are not finished
        ids = start
        for step in range(limit):
            logits = state.advance(ids)[going] if len(going) < state.rows else state.advance(ids)
            drawn = None if seeds is None else [seeds[image] for image in images[going].tolist()]
            chosen = choose_tokens(logits, drawn, step, top_p=options.top_p, temperature=options.temperature)
            open_ = chosen != self.spec.eos_id
            going, chosen = going[open_], chosen[open_]
            for image, token in zip(images[going].tolist(), chosen.tolist(), strict=True):
                written[image].append(token)
            if not len(going) or step + 1 == limit:
                break
            if state.worth_dropping(len(going)):
                state.keep(going)
                images, going = images[going], np.arange(len(going))
            ids = self._fed(state, going, chosen)
        return written

    def _search(
        self, state: DecoderState, start: NDArray[np.int64], limit: int, options: CaptionOptions
    ) -> list[list[int]]:
        """Beam search: the ids behind `start` `(B, L)` of each image's best caption."""
        settings = BeamSettings(options.beams, options.length_penalty, options.early_stopping)
        search = BeamSearch(len(start), settings, self.spec.eos_id, limit)
        logits = state.advance(start)  # one row an image, all beams are alike
        if 2 * options.beams > logits.shape[1]:
            raise InputError(
                f"beams {options.beams}: the captioner knows {logits.shape[1]} tokens; expected half as many at most"
            )
        search.advance(logits)
        if len(search.open):
            state.keep(search.origin)
        going = np.arange(state.rows)  # rows of the state whose images are not done
        while len(search.open):
            search.advance(state.advance(self._fed(state, going, search.ids))[going])
            origin = going[search.origin]
            if len(origin) and state.worth_dropping(len(origin)):
                state.keep(origin)
                going = np.arange(state.rows)
            else:  # beams stay among their image's rows
                going = origin // settings.beams * settings.beams + np.arange(len(origin)) % settings.beams
                order = np.arange(state.rows)
                order[going] = origin
                state.reorder(order)
        return search.best()

    def _fed(self, state: DecoderState, going: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids `(rows, 1)` for the next step; finished rows that are still there are given the end again."""
        ids = np.full((state.rows, 1), self.spec.eos_id, dtype=np.int64)
        ids[going, 0] = chosen
        return ids

    def _static_decoder(self, options: CaptionOptions, *, searches: bool) -> Engine | None:
        """The graph `decoder_static` where it is to be used."""
        static = self._decoders.get("decoder_static")
        wanted = options.static_cache
        if wanted and static is None:
            raise InputError(
                f"{self.name}: a static cache was asked for, and no graph decoder_static is loaded; expected a bundle "
                "that was exported with --static-cache, its captioner opened with static_cache=True; do so, or leave "
                "static_cache out"
            )
        if wanted is None:
            wanted = static is not None and not searches and not is_on_host(static)
        return static if wanted or "decoder" not in self._decoders else None

    def _near(self, cross: Mapping[str, Array | DeviceArray], decoder: Engine) -> Mapping[str, Array | DeviceArray]:
        """What the vision graph gave, by way of the host where one of the two computes there and the other does not."""
        if is_on_host(self._vision) == is_on_host(decoder):
            return cross
        return {name: array if isinstance(array, np.ndarray) else array.numpy() for name, array in cross.items()}

    def _look(
        self, images: Sequence[Image], into: Mapping[str, DeviceArray] = NOTHING
    ) -> Mapping[str, Array | DeviceArray]:
        """The cross-attention's keys and values of the images, once for all tokens; see `Engine.call` for `into`."""
        if self._takes_images:
            return self._look_by_size(images, into)
        return self._vision.call({"pixel_values": pixel_values(images, self.spec.preprocessing)}, into)

    def _look_by_size(
        self, images: Sequence[Image], into: Mapping[str, DeviceArray]
    ) -> Mapping[str, Array | DeviceArray]:
        """What a vision graph with preprocessing gives for images of any sizes; those of one size run together."""
        batches = list(image_batches(images, self.spec.preprocessing, self.spec.graphs["vision"].axes))
        if len(batches) == 1:  # in the order given, and may stay where it is
            return self._vision.call(batches[0][1], into)
        answers = [self._vision.run(inputs) for _, inputs in batches]
        order = np.argsort([place for places, _ in batches for place in places])
        joined: dict[str, Array | DeviceArray] = {}
        for name, first in answers[0].items():
            axis = rows_axis(first.ndim)
            joined[name] = np.concatenate([answer[name] for answer in answers], axis).take(order, axis)
        return joined
