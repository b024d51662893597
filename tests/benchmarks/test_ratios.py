"""What may be said of a ratio, on simulated windows: a thing against itself, and against 5% more work."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mi2rage_benchmarks.probes import Pace, Timing, ratio_of
from mi2rage_benchmarks.ratios import RESOLUTION, Ratio, ratio_between, ratio_from

WINDOW = 5
RUNS = 200


def _noise(kind: str, draws: np.random.Generator, windows: int) -> np.ndarray:
    """One side's relative noise by window and call, float64 (windows, WINDOW)."""
    calls = windows, WINDOW
    if kind == "normal":
        return draws.normal(0, 0.03, calls)
    if kind == "skewed":
        return draws.gamma(1, 0.05, calls)
    if kind == "spikes":  # now and then a whole window is late
        return (
            draws.normal(0, 0.02, calls) + ((draws.random(windows) < 0.15) * draws.exponential(0.3, windows))[:, None]
        )
    assert kind == "drifting"  # a window is much like the last one
    slow = np.zeros(windows)
    for place in range(1, windows):
        slow[place] = 0.3 * slow[place - 1] + draws.normal(0, 0.02)
    return draws.normal(0, 0.01, calls) + slow[:, None]


def _measured(kind: str, work: float, draws: np.random.Generator, pace: Pace) -> Ratio:
    """The ratio that a run ends with: the side does `work` times the other's work."""
    shared = draws.lognormal(0, 0.3, 60)[:, None]  # what else the machine did falls on both
    side, other = (scale * np.exp(_noise(kind, draws, 60)) * shared for scale in (work, 1.0))
    for turns in range(1, 61):
        samples = [list(times[:turns].ravel()) for times in (side, other)]
        if pace.ended(samples, WINDOW, turns) is not None:
            break
    return ratio_of(*(Timing.from_samples(times, [], WINDOW) for times in samples))


@pytest.mark.parametrize("kind", ["normal", "skewed", "spikes", "drifting"])
def test_a_thing_against_itself_is_no_difference_and_five_per_cent_are_found(kind):
    draws = np.random.default_rng(0)
    pace = Pace(budget_seconds=40)
    same = [_measured(kind, 1.0, draws, pace).verdict for _ in range(RUNS)]
    more = [_measured(kind, 1.05, draws, pace).verdict for _ in range(RUNS)]
    assert same.count("no difference") >= 0.95 * RUNS
    assert more.count("faster") >= 0.95 * RUNS  # the other side is


@pytest.mark.parametrize("windows", [6, 8, 12, 30])
def test_the_interval_holds_the_truth_as_often_as_it_says(windows):
    draws = np.random.default_rng(1)
    hits = 0
    for _ in range(RUNS):
        side, other = (scale * np.exp(draws.normal(0, 0.05, windows)) for scale in (2.0, 1.0))
        ratio = ratio_from(side, other)
        hits += ratio.low <= 2.0 <= ratio.high
    assert hits >= 0.93 * RUNS  # 0.95, less twice the simulation's own error


def test_windows_that_are_alike_widen_the_interval():
    steps = np.exp(np.repeat([0.0, 0.1, 0.0, 0.1, 0.0, 0.1], 4))
    mixed = np.exp(np.tile([0.0, 0.1], 12))
    ones = np.ones(24)
    assert ratio_from(steps, ones).precision > 1.5 * ratio_from(mixed, ones).precision


def test_the_verdict_needs_an_interval_without_one_and_more_than_the_resolution():
    def verdict(median, low, high):
        return Ratio.model_validate({"median": median, "low": low, "high": high, "windows": 9}).verdict

    assert verdict(1.5, 1.4, 1.6) == "faster"
    assert verdict(0.5, 0.4, 0.6) == "slower"
    assert verdict(1.5, 0.9, 1.6) == "no difference"
    assert verdict(1 + RESOLUTION / 2, 1.005, 1.015) == "no difference"
    assert verdict(1.5, None, None) == "not known"


def test_ratios_of_two_runs():
    def ratio(median, low, high):
        return Ratio.model_validate({"median": median, "low": low, "high": high, "windows": 9})

    found = ratio_between(ratio(2.0, 1.8, 2.2), ratio(1.0, 0.95, 1.05))
    assert found.median == 2.0
    # Wider than either of the two, narrower than both added up.
    assert math.log(2.0 / 1.8) < math.log(found.median / found.low) < math.log(2.0 / 1.8) + math.log(1.05)
    assert found.verdict == "faster"
    assert ratio_between(ratio(1.02, 1.01, 1.03), ratio(1.0, 0.99, 1.01), resolution=0.05).verdict == "no difference"
    assert ratio_between(ratio(1.5, None, None), ratio(1.0, 0.99, 1.01)).verdict == "not known"
