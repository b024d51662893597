"""From the figures of a small run to the time and the money of a large one, with an interval."""

from __future__ import annotations

import math

import numpy as np

from mi2rage_benchmarks.cost import Check, CostFigures, Plan
from mi2rage_engines.errors import InputError

__all__ = ["checked", "plan", "seconds_interval"]

_HOUR_S = 3600.0
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 to 10 degrees of freedom."""
_LEAST_SHARDS = 3
"""Below which an interval would say nothing."""


def _t_975(freedom: int) -> float:
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    # Three terms of the expansion of Student's quantile around the normal one in 1 / freedom.
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def seconds_interval(figures: CostFigures, candidates: float) -> tuple[float, float] | None:
    """What so many candidates take at the pace of the figures, as a 95% prediction interval; None for too few shards.

    Both count: that the pace is known from a few shards only, and that the shards to come will differ as those did.
    Shards are taken to be independent of each other, which a run whose machine slows down over time is not; and that
    the machine may be another tomorrow is in neither. `checked` tells how it was in fact.
    """
    paces = np.array(figures.shards_s) / np.array(figures.shards_candidates)
    count = len(paces)
    if count < _LEAST_SHARDS:
        return None
    to_come = max(1.0, candidates / float(np.mean(figures.shards_candidates)))
    spread = float(paces.std(ddof=1)) * math.sqrt(1 / count + 1 / to_come)
    wide = _t_975(count - 1) * spread
    middle = figures.candidate_s
    return candidates * max(0.0, middle - wide), candidates * (middle + wide)


def plan(
    figures: CostFigures,
    samples: int,
    *,
    kept_share: float = 1.0,
    devices: int = 1,
    price_per_hour: float | None = None,
) -> Plan:
    """Time and money for `samples` kept samples.

    Shards do not depend on each other, so devices are taken to share them evenly, and each to load the models and to
    get its stages going once.

    Args:
        figures: of one device.
        samples: wanted, 1 or more.
        kept_share: of the candidates that are kept, above 0, at most 1.
        devices: 1 or more.
        price_per_hour: of a device, in whatever money; 0 or more.

    Raises:
        InputError: a number is out of range.
    """
    _check_range(samples, kept_share, devices, price_per_hour)
    candidates = math.ceil(samples / kept_share - 1e-9)
    start_s = (figures.load_s or 0.0) + figures.fill_s
    share = candidates / devices

    def hours(seconds: float) -> float:
        return (start_s + seconds) / _HOUR_S

    def money(time: float | None) -> float | None:
        return None if time is None or price_per_hour is None else time * devices * price_per_hour

    middle = hours(share * figures.candidate_s)
    # All devices draw from the same doubt about the pace, so the interval is that of all candidates.
    around = seconds_interval(figures, candidates)
    low, high = (None, None) if around is None else (hours(around[0] / devices), hours(around[1] / devices))
    return Plan(
        samples=samples,
        candidates=candidates,
        texts=math.ceil(candidates * figures.texts / figures.candidates),
        devices=devices,
        price_per_hour=price_per_hour,
        hours=middle,
        hours_low=low,
        hours_high=high,
        device_hours=middle * devices,
        money=money(middle),
        money_low=money(low),
        money_high=money(high),
        joules=None if figures.candidate_j is None else candidates * figures.candidate_j,
    )


def _check_range(samples: int, kept_share: float, devices: int, price_per_hour: float | None) -> None:
    for name, count in (("samples", samples), ("devices", devices)):
        if count < 1:
            raise InputError(f"{name}: came {count}; expected 1 or more")
    if not 0 < kept_share <= 1:
        raise InputError(f"kept share: came {kept_share}; expected a number above 0 and at most 1, e.g. 0.4")
    if price_per_hour is not None and not (price_per_hour >= 0 and math.isfinite(price_per_hour)):
        raise InputError(f"price per hour: came {price_per_hour}; expected 0 or more, e.g. 2.50")


def checked(figures: CostFigures, texts: int, candidates: int, measured_s: float) -> Check:
    """How far off the figures are for a piece that took `measured_s`, loading left out."""
    planned = figures.fill_s + candidates * figures.candidate_s
    around = seconds_interval(figures, candidates)
    low, high = (None, None) if around is None else (figures.fill_s + around[0], figures.fill_s + around[1])
    return Check(
        texts=texts,
        candidates=candidates,
        planned_s=planned,
        planned_low_s=low,
        planned_high_s=high,
        measured_s=measured_s,
        off=measured_s / planned - 1,
        within=None if low is None or high is None else low <= measured_s <= high,
    )
