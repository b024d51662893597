"""The search for the highest rate, on made-up servers."""

from __future__ import annotations

import random

import pytest

from mi2rage_benchmarks.loadgen_search import highest_rate
from mi2rage_engines.errors import InputError


@pytest.mark.parametrize("start", [1.0, 90.0, 100.0, 130.0, 1500.0])
def test_the_edge_is_found_from_below_and_from_above(start):
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= 100

    found = highest_rate(holds, start, runs=30)
    assert found.held is not None
    assert found.failed is not None
    assert found.held <= 100 < found.failed <= 1.05 * found.held
    assert found.confirmed
    assert found.runs == len(tried) <= 30
    assert tried.count(found.held) == 2


def test_a_lucky_run_at_the_edge_is_not_believed():
    lucky = {110.0: 1}

    def holds(rate: float) -> bool:
        if rate in lucky and lucky[rate] > 0:
            lucky[rate] -= 1
            return True
        return rate <= 100

    found = highest_rate(holds, 110.0, runs=30)
    assert found.held is not None
    assert 95 < found.held <= 100
    assert found.confirmed


def test_with_a_noisy_edge_the_found_rate_is_seldom_above_it():
    above = 0
    for seed in range(200):
        draws = random.Random(seed)
        found = highest_rate(lambda rate, draws=draws: rate * draws.uniform(0.93, 1.07) <= 100, 10.0, runs=40)
        assert found.held is not None
        assert 80 < found.held < 110
        above += found.held > 103
    assert above < 20


def test_where_the_runs_are_used_up_what_held_is_told_as_unconfirmed():
    found = highest_rate(lambda rate: rate <= 100, 1.0, runs=3)
    assert (found.held, found.confirmed, found.failed, found.runs) == (4.0, False, None, 3)


def test_where_no_rate_holds_the_search_ends_after_a_few_runs():
    found = highest_rate(lambda rate: False, 160.0, runs=30)
    assert (found.held, found.confirmed, found.failed) == (None, False, 10.0)
    assert found.runs == 5


@pytest.mark.parametrize(("start", "runs", "precision"), [(0.0, 5, 0.05), (1.0, 0, 0.05), (1.0, 5, 0.0)])
def test_numbers_out_of_range_are_refused(start, runs, precision):
    with pytest.raises(InputError, match="expected"):
        highest_rate(lambda rate: True, start, runs=runs, precision=precision)
