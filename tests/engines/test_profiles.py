from __future__ import annotations

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_engines.profiles import (
    ShapeProfile,
    completed,
    default_profile,
    dynamic_axes,
    misfit,
    profile_from_text,
    shapes_of,
)
from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec

IDS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
PAST = TensorSpec(name="past_keys", dtype="float32", shape=(2, "batch", 4, "past", 16))
DECODER = GraphSpec(
    file="d.onnx",
    inputs=(IDS, PAST),
    outputs=(),
    opset=20,
    axes={"batch": AxisRange(min=1, opt=2, max=8), "past": AxisRange(min=0, opt=4, max=15)},
)


def test_text_and_back() -> None:
    profile = profile_from_text(" batch=1:4:16, past=0:3:7 ,width=64")
    assert profile.axes["past"] == AxisRange(min=0, opt=3, max=7)
    assert str(profile) == "batch=1:4:16,past=0:3:7,width=64:64:64"
    assert profile_from_text(str(profile)) == profile


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch", ["cannot read 'batch'", "AXIS=MIN:OPT:MAX"]),
        ("batch=1:2", ["cannot read 'batch=1:2'"]),
        ("batch=1:2:x", ["cannot read"]),
        ("batch=-1:2:3", ["cannot read"]),
        ("", ["cannot read ''"]),
        ("batch=1,batch=2", ["batch is given twice"]),
        ("batch=4:2:8", ["axis batch is 4:2:8", "min <= opt <= max"]),
        ("batch=1:9:8", ["axis batch is 1:9:8"]),
        ("past=0:0:0", ["axis past is 0:0:0", "1 or more"]),
    ],
)
def test_impossible_texts(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        profile_from_text(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_defaults_come_from_the_graph_and_then_from_the_axis_name() -> None:
    assert dynamic_axes(DECODER) == ("batch", "sequence", "past")
    assert str(default_profile(DECODER)) == "batch=1:2:8,sequence=1:8:32,past=0:4:15"


def test_what_is_asked_for_is_completed() -> None:
    asked = profile_from_text("batch=1:32:64,past=0:2:3,height=8")
    assert str(completed(asked, DECODER, "captioner/decoder")) == "batch=1:32:64,sequence=1:8:32,past=0:2:3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("past=0:4:16", ["captioner/decoder", "axis past 0 to 16", "expected 0 to 15"]),
        ("batch=0:1:2", ["axis batch 0 to 2", "expected 1 or more"]),
        ("sequence=0:1:2", ["axis sequence 0 to 2", "expected 1 or more"]),
    ],
)
def test_sizes_outside_of_the_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        completed(profile_from_text(text), DECODER, "captioner/decoder")
    assert all(word in str(caught.value) for word in words), caught.value


def test_sizes_that_are_no_multiples() -> None:
    profile = profile_from_text("past=1:2:4")
    assert completed(profile, DECODER, "g", multiples={"batch": 3}).axes["past"].opt == 2
    with pytest.raises(InputError, match=r"g: the profile .* gives axis past 1:2:4; expected multiples of 2"):
        completed(profile, DECODER, "g", multiples={"past": 2})


def test_shapes() -> None:
    profile = default_profile(DECODER)
    assert shapes_of(profile, PAST, "d") == ((2, 1, 4, 0, 16), (2, 2, 4, 4, 16), (2, 8, 4, 15, 16))
    with pytest.raises(InputError, match=r"d: the profile batch=1:1:1 has no axis 'past' of input past_keys"):
        shapes_of(profile_from_text("batch=1"), PAST, "d")


def test_some_profile_must_hold_all_shapes() -> None:
    small, large = (
        ShapeProfile({**default_profile(DECODER).axes, "batch": AxisRange(min=n, opt=n, max=n)}) for n in (1, 8)
    )
    assert misfit([small, large], DECODER.inputs, {"input_ids": (8, 4), "past_keys": (2, 8, 4, 0, 16)}) is None
    assert (
        misfit([small], DECODER.inputs, {"input_ids": (8, 4)})
        == "axis batch of input input_ids is 8, outside of 1 to 1"
    )
    assert "batch of input past_keys is 1" in str(
        misfit([large], DECODER.inputs, {"input_ids": (8, 4), "past_keys": (2, 1, 4, 0, 16)})
    )
    assert "fixed at 2" in str(misfit([small], DECODER.inputs, {"past_keys": (3, 1, 4, 0, 16)}))
    assert "has 1 axes, not 2" in str(misfit([small], DECODER.inputs, {"input_ids": (1,)}))
