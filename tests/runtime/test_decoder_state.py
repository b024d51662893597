"""Decoding where what is past stays on a device, and with a cache of fixed length: the same captions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.engine import Engine, HostEngine
from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.caption_options import graphs_to_load
from mi2rage_rt.captioner import CaptionOptions, RuntimeCaptioner
from mi2rage_rt.decoder_state import room_for
from tests.runtime.fake_device import FakeArray, FakeDevice
from tests.runtime.tiny_bundle import WORDS, next_word_table

BRIGHT, DARK = np.full((9, 7, 3), 255, np.uint8), np.zeros((5, 8, 3), np.uint8)
IMAGES = [BRIGHT, DARK, BRIGHT, BRIGHT, DARK]
PREFIXES = ["", "the", "in", "leads", "a red"]


class StaticDecoder(HostEngine):
    """The hand-made decoder with a cache of fixed length, in NumPy; what lies behind the position it never reads."""

    name = "decoder_static"
    _STATE = (1, "batch", 1, "length", 1)
    _CROSS = (1, "batch", 1, 1, 1)
    inputs = (
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="position", dtype="int64", shape=(1,)),
        TensorSpec(name="past_keys", dtype="float32", shape=_STATE),
        TensorSpec(name="past_values", dtype="float32", shape=_STATE),
        TensorSpec(name="cross_keys", dtype="float32", shape=_CROSS),
        TensorSpec(name="cross_values", dtype="float32", shape=_CROSS),
    )
    outputs = (
        TensorSpec(name="logits", dtype="float32", shape=("batch", 1, len(WORDS))),
        TensorSpec(name="present_keys", dtype="float32", shape=_STATE),
        TensorSpec(name="present_values", dtype="float32", shape=_STATE),
    )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, start = inputs["input_ids"], int(inputs["position"][0])
        logits = next_word_table()[ids[:, -1]][:, None].copy()
        dark = inputs["cross_keys"][0, :, 0, 0, 0] < 0
        at_start = inputs["past_keys"][0, :, 0, :start, 0].sum(-1) == 0
        logits[dark & at_start, :, 10] += 10.0
        keys, values = inputs["past_keys"].copy(), inputs["past_values"].copy()
        for state in (keys, values):
            state[0, :, 0, start : start + ids.shape[1], 0] = ids
        return {"logits": logits, "present_keys": keys, "present_values": values}


@pytest.fixture
def on_host(bundle_folder: Path) -> RuntimeCaptioner:
    return Bundle.open(bundle_folder, threads=1).captioner()


def moved(captioner: RuntimeCaptioner, *, static: bool = False) -> tuple[RuntimeCaptioner, FakeDevice]:
    """The captioner on a fake device, and its decoder there."""
    vision = FakeDevice(captioner._vision)
    decoder = FakeDevice(StaticDecoder() if static else captioner._decoders["decoder"])
    vision.fetched = decoder.fetched
    name, spec = "decoder", captioner.spec
    if static:
        name = "decoder_static"
        graph = GraphSpec(file="none", inputs=decoder.inputs, outputs=decoder.outputs, opset=20)
        spec = spec.model_copy(update={"graphs": {**spec.graphs, name: graph}})
    return RuntimeCaptioner(spec, {"vision": vision, name: decoder}, captioner._tokenizer), decoder


@pytest.mark.parametrize("static", [False, True])
def test_a_device_writes_the_same_captions(on_host: RuntimeCaptioner, static: bool) -> None:
    captioner, _ = moved(on_host, static=static)
    for options in (CaptionOptions(), CaptionOptions(beams=3), CaptionOptions(beams=2, batch_size=5)):
        expected = on_host.caption(IMAGES, PREFIXES, options=options)
        assert captioner.caption(IMAGES, PREFIXES, options=options) == expected
    options = CaptionOptions(top_p=0.99, temperature=2.0)
    seeds = [3, 1, 4, 1, 5]
    sampled = on_host.caption(IMAGES, PREFIXES, seeds, options)
    assert captioner.caption(IMAGES, PREFIXES, seeds, options) == sampled


def test_only_logits_come_to_the_host(on_host: RuntimeCaptioner) -> None:
    captioner, decoder = moved(on_host)
    captioner.caption([BRIGHT] * 4)  # all end at once
    assert {shape[-1] for shape in decoder.fetched} == {len(WORDS)}
    assert len(decoder.fetched) == len(decoder.calls)


def test_a_device_drops_rows_when_half_are_finished(on_host: RuntimeCaptioner) -> None:
    captioner, decoder = moved(on_host)
    prompts = [captioner.prompt_ids(word) for word in ("cook", "leads", "apple", "in", "a")]
    expected = on_host.generate_ids([BRIGHT] * 5, prompts)
    assert [len(ids) for ids in expected] == [4, 3, 2, 1, 6]
    assert captioner.generate_ids([BRIGHT] * 5, prompts) == expected
    rows = [shapes["input_ids"][0] for shapes, _ in decoder.calls]
    # Five rows, three of which are finished after the third token; of the two that are left one ends after the fourth.
    assert rows == [5, 5, 5, 2, 1, 1]
    states = [shape for shape in decoder.fetched if shape[-1] != len(WORDS)]
    assert len(states) == 2 * 4  # keys and values, past and cross, twice


def test_a_static_cache_has_the_same_shapes_and_buffers_at_every_step(on_host: RuntimeCaptioner) -> None:
    captioner, decoder = moved(on_host, static=True)
    captioner.caption([BRIGHT, DARK])
    prefill, *steps = decoder.calls
    assert prefill[0]["past_keys"] == (1, 2, 1, 16, 1)  # 10 ids are fed
    assert len(steps) == 7 and all(shapes == steps[0][0] for shapes, _ in steps)
    buffers = [into for _, into in steps]
    assert all(set(into) == {"present_keys", "present_values", "logits"} for into in buffers)
    assert buffers[0] != buffers[1] and buffers[0] == buffers[2] == buffers[4] and buffers[1] == buffers[3]
    assert decoder.put_names.count("past_keys") == 2


def test_a_static_cache_is_used_again(on_host: RuntimeCaptioner) -> None:
    """What comes next in the same sizes has the same addresses, so that CUDA graphs hold from call to call."""
    captioner, decoder = moved(on_host, static=True)
    vision: Any = captioner._vision
    for images in ([BRIGHT, DARK], [DARK, DARK], [DARK, BRIGHT], [BRIGHT]):
        assert captioner.caption(images) == on_host.caption(images)
    shown = [into for _, into in vision.calls]
    assert shown[0] == {} and set(shown[1]) == {"cross_keys", "cross_values"} and shown[1] == shown[2]
    assert shown[3] == {}  # another size
    pairs = [
        {into["present_keys"] for shapes, into in decoder.calls if shapes["cross_keys"][1] == rows} for rows in (2, 1)
    ]
    assert [len(pair) for pair in pairs] == [2, 2]
    assert decoder.put_names.count("past_keys") == 4 and decoder.put_names.count("cross_keys") == 0
    captioner.caption([BRIGHT, DARK], options=CaptionOptions(beams=2))  # grows to four rows, and is not kept
    assert [rows for rows, _ in captioner._spare] == [1]


def test_threads_share_no_cache(on_host: RuntimeCaptioner) -> None:
    captioner, _ = moved(on_host, static=True)
    shown = [[BRIGHT, DARK], [DARK, DARK], [DARK, BRIGHT], [BRIGHT, BRIGHT]]
    expected = [on_host.caption(images) for images in shown]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: captioner.caption(shown[number % 4]), range(80)))
    finally:
        sys.setswitchinterval(before)
    assert answers == expected * 20


class OtherArray(FakeArray):
    """Of another backend."""


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("vision_on", ["host", "device"])
def test_what_another_backend_gave_is_copied_once(
    on_host: RuntimeCaptioner, static: bool, vision_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, decoder = moved(on_host, static=static)
    if vision_on == "host":
        captioner._vision = on_host._vision
    else:
        original = decoder.put
        monkeypatch.setattr(decoder, "put", lambda array, name: OtherArray(original(array, name).values, []))
    for _ in range(2):
        assert captioner.caption([BRIGHT, BRIGHT]) == on_host.caption([BRIGHT, BRIGHT])
    assert decoder.put_names.count("cross_keys") == 2  # one a call, not one a token
    assert len(decoder.calls) > 4


def test_a_static_cache_is_used_where_it_helps_or_is_asked_for(on_host: RuntimeCaptioner) -> None:
    static = FakeDevice(StaticDecoder())
    both = dict(on_host._decoders, decoder_static=static)
    captioner = RuntimeCaptioner(
        moved(on_host, static=True)[0].spec, {"vision": on_host._vision, **both}, on_host._tokenizer
    )
    expected = on_host.caption(IMAGES, PREFIXES)
    captioner._decoders["decoder_static"] = StaticDecoder()  # on the host
    assert captioner.caption(IMAGES, PREFIXES) == expected and not static.calls
    asked = CaptionOptions(static_cache=True)
    assert captioner.caption(IMAGES, PREFIXES, options=asked) == expected
    assert captioner.caption(IMAGES, PREFIXES, options=dataclasses.replace(asked, beams=2)) == expected
    with pytest.raises(InputError, match="no graph decoder_static is loaded; expected a bundle that was exported with"):
        on_host.caption(IMAGES, options=asked)


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_second_decoder_is_loaded_where_it_is_used(
    bundle_folder: Path, on_host: bool, asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundle_folder, threads=1)
    captioner, _ = moved(bundle.captioner(), static=True)
    loaded = []

    def open_engine(file: Path) -> Engine:
        loaded.append(file.name)
        engine = {"none": StaticDecoder()}.get(file.name) or original(file)
        return engine if on_host else FakeDevice(engine)

    original = bundle.open_engine
    monkeypatch.setattr(bundle, "open_engine", open_engine)
    monkeypatch.setattr(bundle, "manifest", bundle.manifest.model_copy(update={"captioner": captioner.spec}))
    options = None if asked is None else CaptionOptions(static_cache=asked)
    assert bundle.captioner(options).caption(IMAGES, PREFIXES) == captioner.caption(IMAGES, PREFIXES)
    assert loaded.count("none") == (not on_host if asked is None else asked) and len(loaded) <= 3
    alone = captioner.spec.model_copy(update={"graphs": {"decoder_static": captioner.spec.graphs["decoder_static"]}})
    assert list(graphs_to_load(alone, options, on_host=on_host)) == ["decoder_static"]


def test_the_room_of_a_static_cache(on_host: RuntimeCaptioner) -> None:
    spec = moved(on_host, static=True)[0].spec
    assert [room_for(fed, spec) for fed in (1, 8, 9)] == [8, 8, 16]
    axes = {"length": AxisRange(min=16, opt=24, max=30)}
    graphs = {**spec.graphs, "decoder_static": spec.graphs["decoder_static"].model_copy(update={"axes": axes})}
    bounded = spec.model_copy(update={"graphs": graphs})
    assert [room_for(fed, bounded) for fed in (1, 17, 29)] == [16, 24, 30]
