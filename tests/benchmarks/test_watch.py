"""Other processes and a clock that falls are noticed, this process itself is not."""

from __future__ import annotations

import itertools

import pytest

from mi2rage_benchmarks import watch
from mi2rage_benchmarks.watch import Watch, clock_mhz, machine_seconds


@pytest.fixture
def machine(monkeypatch):
    """A machine of which each look sees a second pass; tests set what happened in it."""
    state = {"busy": [], "own": [], "mhz": None}
    clock = itertools.count()
    monkeypatch.setattr(watch.time, "monotonic", lambda: float(next(clock)))

    def total(name):
        made = itertools.accumulate(itertools.chain([0.0], state[name], itertools.repeat(0.0)))
        return lambda: next(made)

    monkeypatch.setattr(watch, "clock_mhz", lambda: state["mhz"] and state["mhz"].pop(0))

    def begin(**changes):
        state.update(changes)
        monkeypatch.setattr(watch, "machine_seconds", total("busy"))
        monkeypatch.setattr(watch.time, "process_time", total("own"))
        return Watch()

    return begin


def test_a_foreign_process_is_noticed_and_our_own_work_is_not(machine):
    alone = machine(busy=[2.0, 2.0, 2.0], own=[2.0, 1.9, 2.0])
    for _ in range(3):
        alone.look()
    found = alone.conditions([100.0, 95.0])
    assert (found.looks, found.foreign_cores, found.notes) == (3, 0.0, ())
    assert (found.foreign_cores_max, found.gemm_low, found.mhz_low) == (pytest.approx(0.1), 0.95, None)

    crowded = machine(busy=[2.0, 2.0, 1.0], own=[1.0, 1.0, 1.0])
    for _ in range(3):
        crowded.look()
    assert crowded.conditions([]).notes == ("other processes kept 1.0 cores busy in 2 of 3 looks",)


def test_a_clock_that_falls_is_noticed(machine):
    slowed = machine(busy=[0.0, 0.0], own=[0.0, 0.0], mhz=[3000.0, 2400.0])
    slowed.look()
    slowed.look()
    found = slowed.conditions([100.0, 80.0])
    assert (found.mhz_low, found.mhz_high) == (2400.0, 3000.0)
    assert found.notes == (
        "the clock fell from 3000 to 2400 MHz",
        "the same matrix product ran at 80% of its best rate at times",
    )


def test_what_the_system_does_not_say_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "_STAT", tmp_path / "nothing")
    monkeypatch.setattr(watch, "_CPUINFO", tmp_path / "nothing")
    assert (machine_seconds(), clock_mhz()) == (None, None)
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.0\nmodel\t: 1\ncpu MHz\t\t: 3000.0\n")
    monkeypatch.setattr(watch, "_CPUINFO", tmp_path / "cpuinfo")
    assert clock_mhz() == 2500.0
    quiet = Watch()
    quiet.look()
    assert quiet.conditions([]).foreign_cores is None
