"""Budgets: what they are given as, and when they are over."""

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_training.budget import Budget, seconds_from


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("1h30m", 5400),
        ("90m", 5400),
        ("45s", 45),
        ("45", 45),
        ("1d", 86400),
        ("0.5h", 1800),
        (" 2H ", 7200),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_from(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-1h", "2 hours", "h", "30m1h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time above 0"):
        seconds_from(text)


def test_the_first_limit_that_is_reached_is_named() -> None:
    budget = Budget(seconds=5400, kept=100, cost=6, cost_per_hour=12)
    assert budget.reached(1799, 99) is None
    assert budget.reached(1800, 99) == "6 are spent, at 12 an hour"
    assert budget.reached(10, 104) == "104 candidates are kept, 100 were asked for"
    assert budget.reached(5400, 0) == "1h30m are over"
    assert Budget().reached(1e9, 10**9) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": 0.0}, "seconds: came 0"),
        ({"kept": -1}, "kept: came -1"),
        ({"cost": 3.0}, "cost: came without a cost per hour"),
        ({"cost_per_hour": 3.0}, "cost per hour: came without a cost"),
        ({"cost": float("nan"), "cost_per_hour": 1.0}, "cost: came nan"),
    ],
)
def test_bad_budgets_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**wrong)  # type: ignore[arg-type]
