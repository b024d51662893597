"""One cell: the same work by every side, answers compared, then timed in turns."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_benchmarks.baselines import TorchPlace
from mi2rage_benchmarks.limits import Ceilings
from mi2rage_benchmarks.probes import Pace, Timing, call_ms, ratio_of, time_alternating
from mi2rage_benchmarks.report import EAGER, BenchCell, SideResult
from mi2rage_benchmarks.sides import AGAIN, BundleSide, Clocked, compiled
from mi2rage_benchmarks.stages import stages_of_torch
from mi2rage_benchmarks.watch import Watch
from mi2rage_benchmarks.work import GENERATION_ALONE, Call, Work
from mi2rage_engines.bundle import ParityRecord
from mi2rage_engines.errors import EngineError, ParityError

if TYPE_CHECKING:
    from mi2rage_engines.spec import Precision

logger = logging.getLogger(__name__)

__all__ = ["COMPILED", "CellRunner"]

COMPILED = "torch.compile"


@dataclasses.dataclass(slots=True)
class _Entry:
    """A side on its way through a cell."""

    name: str
    call: Call | None = None
    failed: str | None = None
    checks: tuple[ParityRecord, ...] = ()
    load_ms: float | None = None
    first_ms: float | None = None
    of_part: bool = False
    stages_ms: dict[str, float] = dataclasses.field(default_factory=dict)

    def fail(self, reason: str) -> None:
        self.call, self.failed = None, " ".join(reason.split())[:300]
        logger.warning("%s failed: %s", self.name, self.failed)


@dataclasses.dataclass(frozen=True, slots=True)
class CellRunner:
    """Runs cells on the same sides.

    Attributes:
        models: the PyTorch models by role, in fp32.
        timed: the same as they are timed, see `lowered`.
        place: where they run, and in what.
        sides: the bundles.
        compile: whether `torch.compile` is a side too.
        ceilings: of the run, sampled between turns.
        pace: how long to time.
    """

    models: Mapping[str, Any]
    timed: Mapping[str, Any]
    place: TorchPlace
    sides: Sequence[BundleSide]
    compile: bool
    ceilings: Ceilings
    pace: Pace

    def run(self, subject: str, work: Work) -> BenchCell:
        """Compare, time and count one work.

        Raises:
            ParityError: a bundle in fp32 answers differently from the models: it was exported from others.
            BundleError: a bundle does not take what the models take.
        """
        start = time.monotonic()
        models = {role: self.timed[role] for role in work.roles}
        expected, counter = work.count({role: self.models[role] for role in work.roles})
        eager = self._eager(work, models, expected)
        entries = [eager]
        if self.compile:
            entries.append(self._compiled(work, models, expected))
        for side in self.sides:
            entries += self._of_bundle(work, side, expected)
        timed = [entry for entry in entries if entry.call is not None]
        watch, products = Watch(), len(self.ceilings.gemm.samples_gflops)

        def between() -> None:
            self.ceilings.sample()
            watch.look()

        timings = time_alternating(
            [entry.call for entry in timed if entry.call is not None],
            pace=self.pace,
            between=between,
            label=f"{work.title}, batch {work.batch_size}",
        )
        if work.kind == "whole" and len(work.roles) == 1:  # a chain's stages lie side by side, and add up to nothing
            eager.stages_ms = stages_of_torch(models, work)
        found = {entry.name: timing for entry, timing in zip(timed, timings, strict=True)}
        return BenchCell(
            subject=subject,
            title=work.title + self.place.words,
            kind=work.kind,
            batch_size=work.batch_size,
            sizes=work.sizes,
            items=work.items,
            flop=counter.flop,
            moved_bytes=counter.moved_bytes,
            sides=tuple(self._result(entry, found) for entry in entries),
            conditions=watch.conditions(self.ceilings.gemm.samples_gflops[products:]),
            seconds=time.monotonic() - start,
        )

    def _eager(self, work: Work, models: Mapping[str, Any], expected: Any) -> _Entry:
        entry = _Entry(EAGER, work.on_torch(models))
        if self.place.precision != "fp32":
            assert entry.call is not None
            entry.checks = work.compare(entry.call(), expected, self.place.precision)
            if reason := _broken(entry.checks):
                logger.warning("%s in %s differs from fp32: %s", EAGER, self.place.precision, reason)
        return entry

    def _compiled(self, work: Work, models: Mapping[str, Any], expected: Any) -> _Entry:
        import torch

        entry = _Entry(COMPILED)
        # Each cell compiles for its own sizes; what an earlier one left would make shapes dynamic.
        torch.compiler.reset()
        try:
            entry.call = work.on_torch(compiled(models))
            entry.first_ms, answer = _timed_answer(entry.call)
        except Exception as error:  # the compiler's have no common base; the row says which it was
            entry.fail(f"{type(error).__name__}: {error}")
            return entry
        entry.checks = work.compare(answer, expected, self.place.precision)
        if reason := _broken(entry.checks):
            entry.fail(reason)
        return entry

    def _of_bundle(self, work: Work, side: BundleSide, expected: Any) -> list[_Entry]:
        main = _Entry(side.name)
        start = time.monotonic()
        try:
            calls = work.on_bundle(side)
            main.load_ms = 1000 * (time.monotonic() - start)
            call = calls.pop("")
            main.call = call if work.kind == "graph" or calls else Clocked(call, side.clock)
            main.first_ms, answer = _timed_answer(main.call)
        except EngineError as error:
            main.fail(str(error))
            return [main]
        precision = side.precision(work.graphs(side.manifest))
        main.checks = work.compare(answer, expected, precision)
        if reason := _broken(main.checks):
            _refuse_other_model(work, side, precision, reason)
            main.fail(reason)
        return [main, *(_Entry(f"{side.name}, {name}", other, of_part=True) for name, other in calls.items())]

    def _result(self, entry: _Entry, found: Mapping[str, Timing]) -> SideResult:
        timing = found.get(entry.name)
        if timing is None:
            return SideResult(name=entry.name, of_part=entry.of_part, failed=entry.failed, checks=entry.checks)
        alone = found.get(f"{entry.name}, {GENERATION_ALONE}")
        itself = found.get(entry.name.removesuffix(AGAIN)) if entry.name.endswith(AGAIN) else None
        outside_ms, outside_share = _outside(entry.call)
        return SideResult(
            name=entry.name,
            of_part=entry.of_part,
            checks=entry.checks,
            load_ms=entry.load_ms,
            first_ms=entry.first_ms,
            timing=timing,
            ratio=None if entry.name == EAGER else ratio_of(found[EAGER], timing),
            stages_ms=entry.stages_ms or _stages(entry.call),
            outside_ms=outside_ms,
            outside_share=outside_share,
            of_generation=None if alone is None else ratio_of(alone, timing),
            of_itself=None if itself is None else ratio_of(itself, timing),
        )


def _timed_answer(call: Call) -> tuple[float, Any]:
    answers: list[Any] = []
    return call_ms(lambda: answers.append(call())), answers[0]


def _broken(checks: Sequence[ParityRecord]) -> str | None:
    """What an answer that breaks a bound is told off with."""
    for check in checks:
        if not check.passed:
            return f"{check.measure} is {check.value:.3g}, the bound is {check.threshold}"
    return None


def _refuse_other_model(work: Work, side: BundleSide, precision: Precision, reason: str) -> None:
    # In a lower precision random weights may well drift apart: that is the row's failure, and not another model.
    if precision == "fp32":
        raise ParityError(
            f"{work.title}: {side.folder} and the PyTorch model differ: {reason}; a comparison of their speed would "
            "mean nothing; expected the model that the bundle was exported from; give that one, or export again"
        )


def _outside(call: Call | None) -> tuple[float | None, float | None]:
    """Median milliseconds outside the engines, and their share, of a clocked call; its first time is left out."""
    if not isinstance(call, Clocked):
        return None, None
    outside, total = np.array(call.outside_ms[1:]), np.array(call.total_ms[1:])
    return float(np.median(outside)), float(np.median(outside / total))


def _stages(call: Call | None) -> dict[str, float]:
    """Median milliseconds in each engine of a clocked call; its first time is left out."""
    if not isinstance(call, Clocked):
        return {}
    made = call.stages_ms[1:]
    names = dict.fromkeys(name for stages in made for name in stages)
    return {name: float(np.median([stages.get(name, 0.0) for stages in made])) for name in names}
