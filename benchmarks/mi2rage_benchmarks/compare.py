"""Two reports side by side: what changed, and whether it is noise.

Runs meet different machines, or the same one on another day. A side is therefore judged by its ratio to eager, which
was measured in turns with it: what made the whole machine slower cancels. Eager's own times are shown as what they are,
the machine's and PyTorch's, and fail nothing.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.bench_markdown import short, table
from mi2rage_benchmarks.probes import Timing
from mi2rage_benchmarks.ratios import Ratio, Verdict, ratio_between, ratio_from
from mi2rage_benchmarks.report import EAGER, BenchReport, SideResult
from mi2rage_engines.errors import InputError

__all__ = ["RUN_RESOLUTION", "Change", "Comparison", "compared", "comparison_markdown", "share_from"]

RUN_RESOLUTION = 0.05
"""The smallest difference between two runs that is called one: what is fixed when a process starts, such as where its
memory lies, is drawn once in each of them, and no interval within a run knows of it."""

_PASSING = frozenset({"date", "cores busy at start"})
"""What of the environment differs between any two runs."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Change(_Record):
    """One side of one cell, then and now.

    Attributes:
        old_ms, new_ms: medians.
        time: the old time over the new one; above 1 it is faster now.
        speed: the same of the ratios to eager; None for eager itself.
        verdict: on `speed`; `no difference` is noise.
        regressed: whether it is slower by more than the bound, and not by noise.
    """

    title: str
    batch_size: int
    side: str
    old_ms: float
    new_ms: float
    time: Ratio
    speed: Ratio | None
    verdict: Verdict | None
    regressed: bool


class Comparison(_Record):
    """What changed between two reports.

    Attributes:
        gone: what was measured then and is not there now; failed: what failed now and did not then.
        environment: what differs, by name: then and now.
        bound: the slow-down, as a share, above which a change is a regression; None where none was stated.
    """

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    failed: tuple[str, ...]
    environment: dict[str, tuple[str, str]]
    bound: float | None

    @property
    def regressions(self) -> tuple[str, ...]:
        """Each in words; what failed now is among them."""
        slower = [
            f"{change.title}, batch {change.batch_size}, {change.side}: "
            f"{100 * (1 / change.speed.median - 1):.1f}% slower against eager"
            for change in self.changes
            if change.regressed and change.speed is not None
        ]
        return (*slower, *self.failed) if self.bound is not None else ()


def share_from(text: str) -> float:
    """`5%` or `0.05` as 0.05.

    Raises:
        InputError: it is no share above 0.
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 10:
        raise InputError(f"--fail-slower {text!r}: no share; expected e.g. 5% or 0.05")
    return value


def compared(old: BenchReport, new: BenchReport, bound: float | None = None) -> Comparison:
    """What changed from `old` to `new`.

    Args:
        bound: see `Comparison`.
    """
    before, after = _sides(old), _sides(new)
    resolution = RUN_RESOLUTION if bound is None else min(RUN_RESOLUTION, bound)
    changes, failed, gone = [], [], []
    for key, then in before.items():
        now = after.get(key)
        name = f"{key[1]}, batch {key[2]}, {key[3]}"
        if then.timing is None:
            continue
        if now is None:
            gone.append(name)
        elif now.timing is None:
            failed.append(f"{name}: {now.failed}")
        else:
            changes.append(_change(key, then, now, resolution, bound))
    # A cell that failed whole has no sides to find.
    failed += [f"{cell.title}, batch {cell.batch_size}: {cell.failed}" for cell in new.cells if cell.failed]
    names = (old.environment.keys() | new.environment.keys()) - _PASSING
    then_now = {name: (old.environment.get(name, "none"), new.environment.get(name, "none")) for name in sorted(names)}
    return Comparison(
        changes=tuple(changes),
        gone=tuple(gone),
        failed=tuple(failed),
        environment={name: both for name, both in then_now.items() if both[0] != both[1]},
        bound=bound,
    )


_Key = tuple[str, str, int, str]


def _sides(report: BenchReport) -> dict[_Key, SideResult]:
    return {
        (cell.part, cell.title, cell.batch_size, side.name): side
        for cell in report.cells
        for side in cell.sides
        if not side.of_part
    }


def _change(key: _Key, then: SideResult, now: SideResult, resolution: float, bound: float | None) -> Change:
    assert then.timing is not None
    assert now.timing is not None
    speed = None
    if key[3] != EAGER and then.ratio is not None and now.ratio is not None:
        speed = ratio_between(now.ratio, then.ratio, resolution=resolution)
    slower = speed is not None and speed.verdict == "slower" and bound is not None and 1 / speed.median > 1 + bound
    return Change(
        title=key[1],
        batch_size=key[2],
        side=key[3],
        old_ms=then.timing.median_ms,
        new_ms=now.timing.median_ms,
        time=ratio_between(_milliseconds(then.timing), _milliseconds(now.timing), resolution=resolution),
        speed=speed,
        verdict=None if speed is None else speed.verdict,
        regressed=slower,
    )


def _milliseconds(timing: Timing) -> Ratio:
    """A side's own time as a ratio to one millisecond, for its interval."""
    return ratio_from(timing.windows_ms, np.ones(len(timing.windows_ms)))


_TITLES = ("call", "batch", "side", "ms then", "ms now", "times as fast (95%)", "against eager (95%)", "verdict")


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, and what else is to be known."""
    parts = [table(_TITLES, [_row(change) for change in comparison.changes])]
    if comparison.gone:
        parts.append("\n".join(["Not measured now:", "", *(f"- {name}" for name in comparison.gone)]))
    if comparison.failed:
        parts.append("\n".join(["Failed now:", "", *(f"- {name}" for name in comparison.failed)]))
    if comparison.environment:
        lines = [f"- {name}: {then} then, {now} now" for name, (then, now) in comparison.environment.items()]
        parts.append("\n".join(["Different environments:", "", *lines]))
    return "\n\n".join(parts)


def _row(change: Change) -> list[str]:
    verdict: str = change.verdict or "not known"
    if change.side == EAGER:
        verdict = "eager: the machine and PyTorch"
    elif verdict == "no difference":
        verdict = "noise"
    return [
        change.title,
        str(change.batch_size),
        change.side,
        short(change.old_ms),
        short(change.new_ms),
        _interval(change.time),
        "" if change.speed is None else _interval(change.speed),
        f"**{verdict}**" if change.regressed else verdict,
    ]


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.2f} (no interval)"
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
