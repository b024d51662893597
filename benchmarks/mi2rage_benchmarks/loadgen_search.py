"""The highest rate that holds: doubling, then bisection, then the same again with other arrivals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

from mi2rage_engines.errors import InputError

__all__ = ["RateSearch", "highest_rate"]


@dataclasses.dataclass(frozen=True, slots=True)
class RateSearch:
    """What a search found.

    Attributes:
        held: the highest rate that held; None where none did.
        confirmed: it held a second time, with other arrivals.
        failed: the lowest rate above it that did not hold; None where the search ended before there was one.
        runs: how many were made.
    """

    held: float | None
    confirmed: bool
    failed: float | None
    runs: int


class _OutOfRunsError(Exception):
    """The search has used up its runs."""


_LEAST = 1 / 16
"""Of the first rate: where that does not hold either, hardly any will, and runs at low rates take long."""


def highest_rate(
    holds: Callable[[float], bool], start: float, *, runs: int = 16, precision: float = 0.05
) -> RateSearch:
    """Search for the highest rate of which `holds` is true, as if it were true of every lower one.

    A run near the edge holds or not by luck, and a search goes on from the lucky ones; so the rate that is found is
    run once more, and where it does not hold again the next lower one is taken, by `precision`, and has to hold twice.

    Args:
        holds: makes one run, other arrivals every time.
        start: where doubling begins; halved first where it does not hold, to a sixteenth at most.
        runs: at most, 1 or more.
        precision: the search ends where failed / held is at most 1 + precision.

    Raises:
        InputError: `start` or `precision` is not above 0, or `runs` below 1.
    """
    _check(start, runs, precision)
    passed: dict[float, int] = {}
    failed: list[float] = []

    def run(rate: float) -> bool:
        if sum(passed.values()) + len(failed) >= runs:
            raise _OutOfRunsError
        if holds(rate):
            passed[rate] = passed.get(rate, 0) + 1
            return True
        failed.append(rate)
        return False

    with contextlib.suppress(_OutOfRunsError):
        held = _bracketed(run, start, precision)
        if held is not None:
            _settle(run, held, precision)
    # A rate that held once and failed later has not held.
    lowest = min(failed, default=math.inf)
    best = max((rate for rate in passed if rate < lowest), default=None)
    return RateSearch(
        held=best,
        confirmed=best is not None and passed[best] > 1,
        failed=min(failed, default=None),
        runs=sum(passed.values()) + len(failed),
    )


def _check(start: float, runs: int, precision: float) -> None:
    for name, value in (("rate", start), ("precision", precision)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name}: came {value}; expected a number above 0")
    if runs < 1:
        raise InputError(f"runs: came {runs}; expected 1 or more")


def _bracketed(run: Callable[[float], bool], start: float, precision: float) -> float | None:
    """The highest rate that held, once one that did not is within the precision; None where none held."""
    if run(start):
        held = start
        while run(2 * held):
            held *= 2
        failing = 2 * held
    else:
        failing = start
        while not run(failing / 2):
            failing /= 2
            if failing <= _LEAST * start:
                return None
        held = failing / 2
    while failing / held > 1 + precision:
        middle = math.sqrt(failing * held)
        if run(middle):
            held = middle
        else:
            failing = middle
    return held


def _settle(run: Callable[[float], bool], held: float, precision: float) -> None:
    """Run `held` again, and go down until a rate has held twice."""
    if run(held):
        return
    while True:
        held /= 1 + precision
        if run(held) and run(held):
            return
