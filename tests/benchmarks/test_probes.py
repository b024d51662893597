"""Timers, intervals and the environment; no figure is judged."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from mi2rage_benchmarks import probes
from mi2rage_benchmarks.environment import busy_cores, environment
from mi2rage_benchmarks.probes import Pace, Timing, percentiles_ms, ratio_of, time_alternating


def test_sides_take_turns_there_and_back_and_each_begins():
    calls: list[str] = []
    between: list[int] = []
    sides = [lambda name=name: calls.append(name) for name in "abc"]
    found = time_alternating(sides, repeats=15, between=lambda: between.append(len(calls)))
    a, b, c = "a" * 6, "b" * 6, "c" * 6  # one untimed, then a window of five
    assert "".join(calls) == "aaabbbccc" + a + b + c + c + b + a + b + c + a
    assert between == [9 + 18, 9 + 36, 9 + 54]
    assert [(len(timing.samples_ms), len(timing.warmup_ms), timing.window) for timing in found] == [(15, 3, 5)] * 3


def test_no_side_always_follows_the_same_other_one():
    """What a side leaves behind, such as threads that still spin, falls on all others alike."""
    for sides in (2, 3, 4):
        turns = [probes._order(turn, sides) for turn in range(2 * sides)]
        assert all(sorted(order) == list(range(sides)) for order in turns)
        assert Counter(order[0] for order in turns) == dict.fromkeys(range(sides), 2)
        follows = Counter(pair for order in turns for pair in itertools.pairwise(order))
        assert all(count == follows[after, before] for (before, after), count in follows.items())


def test_slow_calls_have_short_windows_and_little_warm_up(monkeypatch):
    monkeypatch.setattr(probes, "call_ms", lambda call: call() or 2500.0)
    calls: list[str] = []
    first, second = time_alternating([lambda: calls.append("a"), lambda: calls.append("b")], repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ba"
    assert (first.window, len(first.samples_ms), len(second.warmup_ms)) == (1, 3, 1)


def test_a_ratio_is_of_neighbouring_windows():
    slow = Timing.from_samples([4.0] * 5 + [9.0] * 5, [], 5)
    fast = Timing.from_samples([2.0] * 5 + [3.0] * 5, [], 5)
    ratio = ratio_of(slow, fast)
    # The median of logarithms: between two windows it is their geometric mean.
    assert ratio.median == pytest.approx(6**0.5)
    assert (ratio.low, ratio.high, ratio.windows, ratio.verdict) == (None, None, 2, "not known")
    assert (slow.median_ms, slow.p25_ms, slow.p75_ms) == (6.5, 4.0, 9.0)


def test_percentiles_only_with_samples_enough():
    assert list(percentiles_ms([1.0] * 49)) == ["p50"]
    assert list(percentiles_ms([1.0] * 99)) == ["p50", "p90"]
    assert list(percentiles_ms([1.0] * 999)) == ["p50", "p90", "p95"]
    found = Timing.from_samples([float(value) for value in range(1, 1001)], [], 5).percentiles_ms
    assert found == pytest.approx({"p50": 500.5, "p90": 900.1, "p95": 950.05, "p99": 990.01})


def test_a_steady_state_is_the_last_three_windows_within_three_per_cent():
    assert Timing.from_samples([9.0, 1.0, 1.02, 1.03], [], 1).steady is True
    assert Timing.from_samples([1.0, 1.0, 1.0, 1.04], [], 1).steady is False
    assert Timing.from_samples([1.0, 1.0], [], 1).steady is None


def test_timing_ends_when_all_is_known_or_the_time_is_over():
    steady, rising = [1.0] * 10, [float(value) for value in range(1, 11)]
    pace = Pace(budget_seconds=10)
    assert pace.ended([steady[:7], steady[:7]], 1, 1) is None  # eight turns if the budget allows
    assert pace.ended([steady[:8], steady[:8]], 1, 1) == "settled"
    assert pace.ended([steady[:8], rising[:8]], 1, 1) is None
    assert pace.ended([steady[:8], rising[:8]], 1, 10) == "budget"
    assert pace.ended([steady[:3], steady[:3]], 1, 10) == "budget"
    assert pace.ended([steady[:2], steady[:2]], 1, 99) is None  # three windows whatever the budget
    scattered = [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert pace.ended([steady[:9], scattered], 1, 1) is None  # steady at last, but the ratio is not known
    asked = Pace(repeats=10, budget_seconds=5)
    assert asked.ended([steady[:9], steady[:9]], 1, 99) is None
    assert asked.ended([steady, steady], 1, 1) == "settled"
    assert Pace(repeats=4, budget_seconds=None).ended([rising[:4]], 1, 0) == "repeats"


def test_a_run_goes_on_until_its_budget_ends(monkeypatch):
    monkeypatch.setattr(probes, "_REST_SECONDS", 0.0)
    times = iter(np.random.default_rng(0).lognormal(0, 1, 100_000))
    monkeypatch.setattr(probes, "call_ms", lambda call: call() or float(next(times)))
    first, second = time_alternating([int, int], pace=Pace(budget_seconds=0.2))
    assert first.ended == second.ended == "budget"
    assert len(first.samples_ms) == len(second.samples_ms) >= 15


def test_the_environment_names_the_processor():
    found = environment(3)
    assert found["threads"] == "3"
    assert found["cpu"]
    assert np.int64(found["cores"]) >= 1
    busy = busy_cores(0.05)
    assert busy is None or busy >= 0
