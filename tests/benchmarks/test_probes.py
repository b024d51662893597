"""Timers, intervals and the environment; no figure is judged."""

from __future__ import annotations

import numpy as np
import pytest

from mi2rage_benchmarks import probes
from mi2rage_benchmarks.environment import busy_cores, environment
from mi2rage_benchmarks.probes import Timing, ratio_of, time_alternating


def test_sides_take_turns_and_each_begins_in_its_turn():
    calls: list[str] = []
    between: list[int] = []
    sides = [lambda name=name: calls.append(name) for name in "abc"]
    found = time_alternating(sides, repeats=15, between=lambda: between.append(len(calls)))
    a, b, c = "a" * 6, "b" * 6, "c" * 6  # one untimed, then a window of five
    assert "".join(calls) == "aaabbbccc" + a + b + c + b + c + a + c + a + b
    assert between == [9 + 18, 9 + 36, 9 + 54]
    assert [(len(timing.samples_ms), len(timing.warmup_ms), timing.window) for timing in found] == [(15, 3, 5)] * 3


def test_slow_calls_have_short_windows_and_little_warm_up(monkeypatch):
    monkeypatch.setattr(probes, "call_ms", lambda call: call() or 2500.0)
    calls: list[str] = []
    first, second = time_alternating([lambda: calls.append("a"), lambda: calls.append("b")], repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert (first.window, len(first.samples_ms), len(second.warmup_ms)) == (1, 3, 1)


def test_a_ratio_is_of_neighbouring_windows():
    slow = Timing.from_samples([4.0] * 5 + [9.0] * 5, [], 5)
    fast = Timing.from_samples([2.0] * 5 + [3.0] * 5, [], 5)
    ratio = ratio_of(slow, fast)
    assert (ratio.median, ratio.low, ratio.high, ratio.windows) == (2.5, None, None, 2)
    assert (slow.median_ms, slow.p25_ms, slow.p75_ms) == (6.5, 4.0, 9.0)


@pytest.mark.parametrize("true_ratio", [1.0, 2.0])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(true_ratio):
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        shared = np.repeat(draws.lognormal(0, 0.3, 8), 5)  # what else the machine did in a window
        sides = [shared * scale * draws.lognormal(0, 0.05, 40) for scale in (true_ratio, 1.0)]
        ratio = ratio_of(*(Timing.from_samples(list(side), [], 5) for side in sides))
        assert ratio.low <= ratio.median <= ratio.high
        hits += ratio.low <= true_ratio <= ratio.high
    assert hits >= 85  # 95 of 100 were it exact; a bootstrap of eight windows is a little narrow


def test_the_environment_names_the_processor():
    found = environment(3)
    assert found["threads"] == "3"
    assert found["cpu"]
    assert np.int64(found["cores"]) >= 1
    busy = busy_cores(0.05)
    assert busy is None or busy >= 0
