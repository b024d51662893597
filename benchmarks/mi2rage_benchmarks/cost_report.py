"""How the cost of a data set is shown."""

from __future__ import annotations

from collections.abc import Iterator

from mi2rage_benchmarks.cost import Check, CostFigures, CostReport, Energy, Plan

__all__ = ["lines_of"]


def lines_of(report: CostReport) -> Iterator[str]:
    """The report for people, line by line."""
    figures = report.figures
    chain = ", ".join(f"{name} {value}" for name, value in figures.chain.items())
    yield f"measured by {figures.origin}, on {figures.device}: {chain}"
    rate = 3600 / figures.candidate_s
    yield f"{1000 * figures.candidate_s:.4g} ms a candidate, {rate:,.0f} an hour ({len(figures.shards_s)} shards)"
    if figures.pauses:
        yield f"{figures.pauses} gaps between shards were taken for pauses and left out"
    yield from _stages(figures)
    yield f"{100 * report.kept_share:.3g}% of the candidates are kept ({report.kept_from})"
    yield f"{report.kept_per_hour:,.0f} kept samples per device-hour (a GPU-hour, where the device is one)"
    if figures.energy is not None:
        yield _energy(figures.energy, report.joules_per_kept)
    if report.plan is not None:
        yield from _plan(report.plan)
    if report.check is not None:
        yield _check(report.check)


def _stages(figures: CostFigures) -> Iterator[str]:
    total = sum(figures.stages_s.values())
    if not total:
        return
    shares = ", ".join(f"{name} {100 * seconds / total:.3g}%" for name, seconds in figures.stages_s.items())
    apart_ms = 1000 * total / figures.candidates
    yield f"work of the stages: {shares}; one after the other they would take {apart_ms:.4g} ms"


def _energy(energy: Energy, per_kept: float | None) -> str:
    if per_kept is None:
        return f"no energy: {energy.missing}"
    read = ", ".join(f"{name} {joules:,.0f} J" for name, joules in energy.joules.items())
    return f"{per_kept:.4g} J per kept sample, all that was read together: {read}"


def _plan(plan: Plan) -> Iterator[str]:
    made = f"{plan.candidates:,} candidates, {plan.texts:,} real samples or a greater width"
    yield f"plan for {plan.samples:,} kept samples on {plan.devices} devices: {made}"
    yield f"  time: {_between(plan.hours, plan.hours_low, plan.hours_high, _time)}"
    if plan.money is not None:
        price = f"{plan.price_per_hour:g} an hour and device, {plan.device_hours:,.4g} device-hours"
        yield f"  money: {_between(plan.money, plan.money_low, plan.money_high, _money)}; {price}"
    if plan.joules is not None:
        yield f"  energy: {plan.joules / 3.6e6:,.4g} kWh"


def _between(middle: float, low: float | None, high: float | None, shown: object) -> str:
    assert callable(shown)
    around = "no interval, too few shards" if low is None else f"95%: {shown(low)} to {shown(high)}"
    return f"{shown(middle)} ({around})"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.3g} s"
    if hours < 1:
        return f"{60 * hours:.3g} min"
    return f"{hours:,.3g} h" if hours < 100 else f"{hours:,.0f} h"


def _money(amount: float) -> str:
    return f"{amount:,.2f}"


def _check(check: Check) -> str:
    planned = _between(
        check.planned_s / 3600,
        None if check.planned_low_s is None else check.planned_low_s / 3600,
        None if check.planned_high_s is None else check.planned_high_s / 3600,
        _time,
    )
    verdict = {None: "", True: ", inside the interval", False: ", outside the interval"}[check.within]
    longer = "longer" if check.off >= 0 else "shorter"
    took = f"{_time(check.measured_s / 3600)}, {100 * abs(check.off):.1f}% {longer}{verdict}"
    return f"check with {check.texts} texts, {check.candidates} candidates: planned {planned}, took {took}"
