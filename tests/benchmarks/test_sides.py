"""The clock of a bundle's engines: host time where a call waits for its work, the GPU's own where it does not."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mi2rage_benchmarks import sides
from mi2rage_benchmarks.sides import Clocked, EngineClock, _ClockedEngine, bundle_sides
from mi2rage_engines.errors import InputError


class Waiting:
    """An engine whose calls return when their work is done."""

    name = "waiting"

    def run(self, inputs):
        time.sleep(0.002)
        return inputs

    call = run


class Enqueueing:
    """An engine whose calls return at once; its GPU needs 7 ms for each, by its own clock."""

    def __init__(self):
        self.clock_ms = 0.0

    def call(self, inputs):
        self.clock_ms += 7
        return inputs

    def run(self, inputs):
        time.sleep(0.002)
        return inputs

    def mark(self):
        now = self.clock_ms
        return SimpleNamespace(now=now, ms_since=lambda earlier: now - earlier.now)


def test_a_call_that_waits_is_timed_on_the_host():
    clock = EngineClock()
    engine = _ClockedEngine(Waiting(), clock, "unet")
    assert engine.name == "waiting"
    call = Clocked(lambda: (engine.run(1), engine.call(2)), clock)
    assert call() == (1, 2)
    assert 4 <= call.stages_ms[0]["unet"] <= call.total_ms[0]
    assert call.outside_ms[0] == pytest.approx(call.total_ms[0] - call.stages_ms[0]["unet"])


def test_a_call_that_only_enqueues_is_timed_by_the_gpus_marks():
    clock = EngineClock()
    engine = _ClockedEngine(Enqueueing(), clock, "unet")

    def loop():
        for step in range(3):
            engine.call(step)

    call = Clocked(loop, clock)
    call()
    call()
    assert [stages["unet"] for stages in call.stages_ms] == pytest.approx([21, 21])


def test_a_run_of_such_an_engine_waits_and_is_timed_on_the_host():
    clock = EngineClock()
    engine = _ClockedEngine(Enqueueing(), clock, "unet")
    call = Clocked(lambda: engine.run(1), clock)
    call()
    assert 2 <= call.stages_ms[0]["unet"] <= call.total_ms[0]


def test_a_call_that_fails_adds_nothing_and_the_clock_goes_on():
    clock = EngineClock()
    broken = SimpleNamespace(mark=lambda: None, call=lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ClockedEngine(broken, clock, "unet").call(1)
    assert clock.by_engine() == {}


def made_side(folder, threads, backend):
    return SimpleNamespace(folder=folder, backend=backend, manifest=SimpleNamespace(precision="fp32"))


def test_every_side_has_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(sides, "BundleSide", made_side)
    names = [[side.name for side in bundle_sides([Path(folder) for folder in folders], 1)]
             for folders in (("a",), ("a", "b"), ("before/bundle", "after/bundle", "c"))]  # fmt: skip
    assert names == [
        ["ONNX Runtime fp32"],
        ["ONNX Runtime fp32 (a)", "ONNX Runtime fp32 (b)"],
        ["ONNX Runtime fp32 (before/bundle)", "ONNX Runtime fp32 (after/bundle)", "ONNX Runtime fp32 (c)"],
    ]
    with pytest.raises(InputError, match=r"bundle .*/a: came twice.*--against-itself"):
        bundle_sides([Path("a"), Path("./a")], 1)
    with pytest.raises(InputError, match="backend ort-cpu: came twice"):
        bundle_sides([Path("a")], 1, backends=("ort-cpu", "ort-cpu"))
