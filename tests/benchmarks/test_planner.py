"""From a small run to a large one: the arithmetic, and what the interval is worth."""

from __future__ import annotations

import numpy as np
import pytest

from mi2rage_benchmarks.cost import CostFigures, Energy
from mi2rage_benchmarks.planner import _t_975, checked, plan, seconds_interval
from mi2rage_engines.errors import InputError


def figures(shards_s=(2.0, 2.0, 2.0, 2.0), held=20, **changes):
    values = {
        "origin": "a test",
        "device": "a device",
        "chain": {"links": 2},
        "texts": 60,
        "candidates": 120,
        "load_s": 30.0,
        "fill_s": 6.0,
        "shards_s": tuple(shards_s),
        "shards_candidates": (held,) * len(shards_s),
    }
    return CostFigures(**(values | changes))


def test_time_and_money_are_those_of_the_pace_and_the_start():
    made = plan(figures(), 36_000, kept_share=0.5, devices=2, price_per_hour=3.0)
    assert (made.candidates, made.texts) == (72_000, 36_000)
    # 0.1 s a candidate, 36,000 of them on each device, and 36 s to load and to fill.
    assert made.hours == pytest.approx((36_000 * 0.1 + 36) / 3600)
    assert made.device_hours == pytest.approx(2 * made.hours)
    assert made.money == pytest.approx(3.0 * made.device_hours)
    # Shards that all take the same leave no doubt.
    assert (made.hours_low, made.hours_high) == pytest.approx((made.hours, made.hours))
    assert made.joules is None


def test_twice_the_devices_take_half_the_time_but_for_the_start():
    one, two = (plan(figures(load_s=None, fill_s=0.0), 1000, devices=count, price_per_hour=1.0) for count in (1, 2))
    assert one.hours == pytest.approx(2 * two.hours)
    assert one.money == pytest.approx(two.money)


def test_a_share_of_candidates_that_is_kept_asks_for_whole_candidates():
    assert plan(figures(), 10, kept_share=0.3).candidates == 34
    assert plan(figures(), 3, kept_share=0.1).candidates == 30


def test_joules_are_those_of_all_candidates():
    measured = figures(energy=Energy(joules={"GPU": 300.0, "CPU": 60.0}))
    assert measured.candidate_j == 3.0
    assert plan(measured, 100, kept_share=0.5).joules == 600.0
    assert figures(energy=Energy(missing="nothing there")).candidate_j is None


def test_without_a_price_there_is_no_money_and_without_shards_no_interval():
    made = plan(figures(shards_s=(2.0, 3.0)), 100)
    assert (made.money, made.money_low, made.hours_low, made.hours_high) == (None, None, None, None)
    assert seconds_interval(figures(shards_s=(2.0, 3.0)), 100) is None


@pytest.mark.parametrize(("known", "to_come"), [(4, 4), (6, 40), (20, 400)])
def test_the_interval_holds_about_95_of_100_runs(known, to_come):
    draws = np.random.default_rng(0)
    inside = 0
    for _ in range(4000):
        found = seconds_interval(figures(draws.normal(2.0, 0.3, known)), 20 * to_come)
        assert found is not None
        inside += found[0] <= draws.normal(2.0, 0.3, to_come).sum() <= found[1]
    # The share of 4,000 scatters by 0.35 points.
    assert 0.938 <= inside / 4000 <= 0.962


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.706),
        (5, 2.571),
        (10, 2.228),
        (11, 2.201),
        (12, 2.179),
        (15, 2.131),
        (20, 2.086),
        (30, 2.042),
        (120, 1.980),
    ],
)
def test_quantiles_are_students(freedom, quantile):
    assert _t_975(freedom) == pytest.approx(quantile, abs=1e-3)


def test_a_check_says_how_far_off_the_plan_was():
    found = checked(figures(shards_s=(1.8, 2.0, 2.2, 2.0)), 200, 400, 50.6)
    assert found.planned_s == pytest.approx(46.0)
    assert found.off == pytest.approx(0.1)
    assert found.planned_low_s < 46.0 < found.planned_high_s
    assert found.within is (found.planned_low_s <= 50.6 <= found.planned_high_s)
    assert checked(figures(shards_s=(1.8, 2.0, 2.2, 2.0)), 200, 400, 500.0).within is False
    assert checked(figures(shards_s=(2.0,)), 200, 400, 50.6).within is None


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"devices": 0}, {"kept_share": 0.0}, {"kept_share": 1.2}, {"price_per_hour": -1.0}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="expected"):
        plan(figures(), **({"samples": 10} | wrong))
