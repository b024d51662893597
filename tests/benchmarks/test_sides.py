"""The clock of a bundle's engines: host time where a call waits for its work, the GPU's own where it does not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mi2rage_benchmarks.sides import Clocked, EngineClock, _ClockedEngine


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
