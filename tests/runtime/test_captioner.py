from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.engine import DeviceArray, HostEngine
from mi2rage_engines.errors import DataError, EngineError, InputError
from mi2rage_engines.spec import AxisRange, TensorSpec
from mi2rage_rt import noise
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions, RuntimeCaptioner
from mi2rage_rt.decoding import choose_tokens
from mi2rage_rt.protocols import ImageToText
from tests.runtime.tiny_bundle import WORDS, next_word_table

BRIGHT, DARK = np.full((9, 7, 3), 255, np.uint8), np.zeros((5, 8, 3), np.uint8)


@pytest.fixture
def captioner(bundle_folder: Path) -> RuntimeCaptioner:
    return Bundle.open(bundle_folder, threads=1).captioner()


def test_greedy_captions_by_image_and_prefix(captioner: RuntimeCaptioner) -> None:
    assert isinstance(captioner, ImageToText)
    captions = captioner.caption([BRIGHT, DARK, BRIGHT, DARK], ["", "", "a red", "the"])
    assert captions == [
        "tim cook leads apple in",
        "rome a red car by the sea",
        "a red car by the sea",
        "the rome a red car by the sea",
    ]
    assert captioner.caption([]) == []


def test_batching_changes_nothing(captioner: RuntimeCaptioner) -> None:
    images, prefixes = [BRIGHT, DARK] * 5, ["", "the sea", "a"] * 3 + ["tim"]
    expected = captioner.caption(images, prefixes)
    for size in (1, 3):
        assert captioner.caption(images, prefixes, options=CaptionOptions(batch_size=size)) == expected
    seeds = list(range(10))
    sampled = captioner.caption(images, prefixes, seeds)
    assert sampled == captioner.caption(images, prefixes, seeds, CaptionOptions(batch_size=3))
    assert sampled != captioner.caption(images, prefixes, seeds[::-1])


def test_sampling_draws_by_seed_and_step(captioner: RuntimeCaptioner) -> None:
    table, ids, last = next_word_table(), [], 4
    for step in range(10):
        last = int(choose_tokens(table[last][None], [77], step, top_p=0.95)[0])
        if last == 3:
            break
        ids.append(last)
    options = CaptionOptions(top_p=0.95)
    assert captioner.generate_ids([BRIGHT], [[4]], [77], options) == [ids]
    assert noise.gumbel(77, len(WORDS), stream=0).shape == (len(WORDS),)


def test_finished_rows_leave_the_batch(captioner: RuntimeCaptioner) -> None:
    sizes = []
    decoder = captioner._decoders["decoder"]
    call = decoder.call

    def spy(inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        sizes.append((inputs["input_ids"].shape, inputs["past_keys"].shape[3]))
        return call(inputs)

    decoder.call = spy  # type: ignore[method-assign, assignment]
    captioner.caption([BRIGHT, DARK])
    assert sizes[0] == ((2, 1), 0)  # prefill
    assert sizes[1] == ((2, 1), 1)
    assert [shape[0] for shape, _ in sizes] == [2] * 6 + [1] * 2


def test_lengths_are_bounded(captioner: RuntimeCaptioner) -> None:
    assert captioner.caption([BRIGHT], options=CaptionOptions(max_new_tokens=2)) == ["tim cook"]
    with pytest.raises(DataError, match="a prefix of 16 tokens leaves no room"):
        captioner.caption([BRIGHT], ["sea " * 15])


def test_unusable_arguments(captioner: RuntimeCaptioner) -> None:
    with pytest.raises(DataError, match="1 images, 2 prefixes"):
        captioner.caption([BRIGHT], ["", ""])
    with pytest.raises(DataError, match="2 seeds"):
        captioner.caption([BRIGHT], seeds=[1, 2])
    for options in (CaptionOptions(top_p=0.0), CaptionOptions(temperature=0.0), CaptionOptions(batch_size=0)):
        with pytest.raises(InputError, match="expected"):
            captioner.caption([BRIGHT], options=options)
    for options in (CaptionOptions(max_new_tokens=0), CaptionOptions(beams=0)):
        with pytest.raises(InputError, match="expected"):
            captioner.caption([BRIGHT], options=options)


class NoNumbers:
    shape, dtype = (1, 1, len(WORDS)), np.dtype(np.float32)

    def numpy(self) -> np.ndarray:
        return np.full(self.shape, np.nan, self.dtype)


def test_nan_logits_are_told(captioner: RuntimeCaptioner) -> None:
    decoder = captioner._decoders["decoder"]
    call = decoder.call
    decoder.call = lambda inputs: {**call(inputs), "logits": NoNumbers()}  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineError, match="NaN"):
        captioner.caption([BRIGHT])


class VisionWithPreprocessing(HostEngine):
    """A vision graph that begins with the image; its cross states are each image's mean level, less 100."""

    name = "vision"
    inputs = tuple(
        TensorSpec(name=name, dtype=dtype, shape=shape)
        for name, dtype, shape in (
            ("image", "uint8", ("batch", "image_height", "image_width", 3)),
            ("rows", "float32", (6, "image_height")),
            ("columns", "float32", (6, "image_width")),
        )
    )
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=(1, "batch", 1, 1, 1)) for name in ("cross_keys", "cross_values")
    )

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.shapes.append(inputs["image"].shape)
        levels = inputs["rows"] @ (inputs["image"].transpose(0, 3, 1, 2) @ inputs["columns"].T)
        means = levels.mean((1, 2, 3)).astype(np.float32).reshape(1, -1, 1, 1, 1) - 100
        return {"cross_keys": means, "cross_values": means}


def test_a_graph_with_preprocessing_is_given_images_by_size(captioner: RuntimeCaptioner) -> None:
    vision, spec = VisionWithPreprocessing(), captioner.spec
    axes = {"image_height": AxisRange(min=1, opt=8, max=10), "image_width": AxisRange(min=1, opt=8, max=10)}
    graphs = {**spec.graphs, "vision": spec.graphs["vision"].model_copy(update={"axes": axes})}
    inside = RuntimeCaptioner(
        spec.model_copy(update={"graphs": graphs}),
        {"vision": vision, "decoder": captioner._decoders["decoder"]},
        captioner._tokenizer,
    )
    wide, large = np.full((7, 9, 3), 255, np.uint8), np.full((40, 40, 3), 255, np.uint8)
    images = [wide, DARK, wide, large, DARK, BRIGHT]  # the last is resized by rows first
    assert inside.caption(images) == captioner.caption(images)
    assert vision.shapes == [(2, 7, 9, 3), (2, 5, 8, 3), (2, 6, 6, 3)]
    # What images of one size give stays where it is: no other engine's memory is copied to the host and back.
    assert inside._look([wide, wide]).keys() == {"cross_keys", "cross_values"}
    assert not any(isinstance(array, np.ndarray) for array in inside._look([wide, wide]).values())
    vision.inputs = vision.inputs[:2]
    with pytest.raises(EngineError, match="has no input columns"):
        RuntimeCaptioner(spec, {"vision": vision, "decoder": captioner._decoders["decoder"]}, captioner._tokenizer)
