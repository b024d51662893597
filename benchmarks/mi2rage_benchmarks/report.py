"""What `bench` found: the records of its JSON document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_benchmarks.limits import attainable_gflops
from mi2rage_benchmarks.probes import Ratio, Timing
from mi2rage_benchmarks.watch import Conditions
from mi2rage_engines.bundle import ParityRecord
from mi2rage_engines.errors import InputError
from mi2rage_engines.validation import first_problem

__all__ = [
    "EAGER",
    "SCHEMA_VERSION",
    "BenchCell",
    "BenchReport",
    "Kind",
    "MemoryRow",
    "SideResult",
    "Soak",
    "held_against",
    "read_report",
]

SCHEMA_VERSION = 2
"""Version 1 is of before there was a number: reports without conditions, stages, moved bytes and verdicts."""

Kind = Literal["graph", "whole"]
"""`graph`: one call of one graph, arrays in, arrays out. `whole`: what a user calls, with all that is around graphs."""

EAGER = "PyTorch eager"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SideResult(_Record):
    """How one side did a cell's work; times are of the wall's clock, until the answer is on the host.

    Attributes:
        of_part: whether it did a part of the work alone, to be held against the whole.
        failed: why there is no timing; None where there is one.
        checks: its answer against eager's, before anything was timed.
        load_ms: making the side ready: its graphs loaded. None for PyTorch, whose models the sides share.
        first_ms: the first call of all, which compiles where the side compiles; None for eager, which counts
            operations in it.
        ratio: eager's time over this side's; above 1 this side is faster.
        gemm_fraction: rate of the cell's operations over the best rate of a matrix product in the same run, in the
            precision of PyTorch's sides; a side in int8 may do more than one.
        roofline_fraction: the same over what the roofline allows: the product's rate, or what a copy's rate can feed;
            above 1 where caches hold what was taken to come from memory.
        stages_ms: of a call, milliseconds by graph or network, medians; the rest is outside them.
        outside_ms, outside_share: a call's time outside the engines, and that over all of it; medians.
        of_generation: a chain's images/s over those of its generation alone.
        of_itself: the time of the bundle's first side over this one's, which is the same bundle once more.
    """

    name: str
    of_part: bool = False
    failed: str | None = None
    checks: tuple[ParityRecord, ...] = ()
    load_ms: float | None = None
    first_ms: float | None = None
    timing: Timing | None = None
    ratio: Ratio | None = None
    gemm_fraction: float | None = None
    roofline_fraction: float | None = None
    stages_ms: dict[str, float] = {}
    outside_ms: float | None = None
    outside_share: float | None = None
    of_generation: Ratio | None = None
    of_itself: Ratio | None = None


class BenchCell(_Record):
    """The same work, done by every side.

    Attributes:
        subject: its name on the command line; title: what it is, and what PyTorch's sides run in and where, if not in
            fp32 on the CPU.
        part: of a recipe, by its name; empty where there is no recipe.
        sizes: of the graph's dynamic axes, or what else the work depends on.
        items: images, captions or samples a call makes.
        flop: operations a call, counted on the PyTorch modules; moved_bytes: what they read and write, in fp32. Both
            are 0 where bundles leave some of the work out.
        sides: eager first.
        failed: why there are none; None where there are.
        conditions: what else the machine did meanwhile.
        seconds: that the cell took, loading and comparing included.
    """

    subject: str
    title: str
    part: str = ""
    kind: Kind
    batch_size: int
    sizes: dict[str, int]
    items: int
    flop: int
    moved_bytes: int = 0
    sides: tuple[SideResult, ...]
    failed: str | None = None
    conditions: Conditions | None = None
    seconds: float | None = None

    @property
    def intensity(self) -> float | None:
        """Operations a byte."""
        return self.flop / self.moved_bytes if self.moved_bytes else None


class MemoryRow(_Record):
    """One side's memory for one whole call, in a process of its own that ran nothing else.

    Attributes:
        weights_bytes: of the model.
        loaded_bytes: resident after loading, over what was resident before.
        peak_bytes: the same at its highest while calls ran.
        largest_bytes: the largest tensor of the call in PyTorch.
    """

    subject: str
    side: str
    batch_size: int
    failed: str | None = None
    weights_bytes: int = 0
    loaded_bytes: int = 0
    peak_bytes: int = 0
    largest_bytes: int | None = None

    @property
    def over_need(self) -> float:
        """The peak over the weights and the largest tensor."""
        return self.peak_bytes / max(1, self.weights_bytes + (self.largest_bytes or 0))


class Soak(_Record):
    """Resident bytes of a process that only classifies, after so many requests each."""

    side: str
    requests: tuple[int, ...]
    resident_bytes: tuple[int, ...]


class BenchReport(_Record):
    """All that was measured in one run, and the environment it was measured in.

    Attributes:
        gemm_gflops, copy_gbps: the run's ceilings: the best rates of a matrix product in the precision of PyTorch's
            sides, and of copying memory, read and written bytes together.
        title: of the recipe; None where there was none. command: that made it; None where no command did.
        isolated: whether each cell had a process of its own.
        seconds: that the run took.
    """

    schema_version: int = SCHEMA_VERSION
    cells: tuple[BenchCell, ...]
    environment: dict[str, str]
    seed: int
    gemm_gflops: float = 0.0
    copy_gbps: float = 0.0
    memory: tuple[MemoryRow, ...] = ()
    soak: tuple[Soak, ...] = ()
    title: str | None = None
    command: str | None = None
    isolated: bool = False
    seconds: float | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """The cells and sides that could not be measured, with their reasons."""
        cells = [f"{cell.title}, batch {cell.batch_size}: {cell.failed}" for cell in self.cells if cell.failed]
        sides = [
            f"{cell.title}, batch {cell.batch_size}, {side.name}: {side.failed}"
            for cell in self.cells
            for side in cell.sides
            if side.failed
        ]
        return (*cells, *sides)


def held_against(cell: BenchCell, gflops: float, gbps: float) -> BenchCell:
    """The cell with each side's fractions of a run's ceilings, which are known when the run ends.

    Args:
        gflops, gbps: the ceilings, see `BenchReport`; 0 where one was not measured.
    """
    allowed = attainable_gflops(cell.flop, cell.moved_bytes, gflops, gbps) if gbps else gflops

    def held(side: SideResult) -> SideResult:
        # Of a part of the work the operations were not counted, nor where the sides' differ.
        if side.timing is None or not gflops or side.of_part or not cell.flop:
            return side
        rate = cell.flop / side.timing.median_ms / 1e6
        return side.model_copy(update={"gemm_fraction": rate / gflops, "roofline_fraction": rate / allowed})

    return cell.model_copy(update={"sides": tuple(map(held, cell.sides))})


def read_report(path: Path) -> BenchReport:
    """A report from its JSON file; those of version 1 are brought up.

    Raises:
        InputError: no such file, no report, or one of a later version.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: no report can be read ({error}); expected a JSON file made by 'mi2rage-rt bench --out'"
        ) from error
    version = document.get("schema_version", 1) if isinstance(document, dict) else 1
    if version not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path}: report schema version {version}; this release reads 1 to {SCHEMA_VERSION}; measure again with "
            "this release, or compare with the one that wrote it"
        )
    try:
        return BenchReport.model_validate(document | {"schema_version": SCHEMA_VERSION} if version == 1 else document)
    except (ValidationError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"{path}: {problem}; expected a JSON file made by 'mi2rage-rt bench --out'; measure again"
        ) from error
