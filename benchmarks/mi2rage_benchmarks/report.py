"""What `bench` found: its records, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.probes import Ratio, Timing
from mi2rage_engines.bundle import ParityRecord

__all__ = ["EAGER", "BenchCell", "BenchReport", "Kind", "MemoryRow", "SideResult", "Soak", "markdown"]

Kind = Literal["graph", "whole"]
"""`graph`: one call of one graph, arrays in, arrays out. `whole`: what a user calls, with all that is around graphs."""

EAGER = "PyTorch eager"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SideResult(_Record):
    """How one side did a cell's work.

    Attributes:
        failed: why there is no timing; None where there is one.
        checks: its answer against eager's, before anything was timed.
        first_ms: the first call of all, which compiles where the side compiles; None for eager, which counts
            operations in it.
        ratio: eager's time over this side's; above 1 this side is faster.
        gemm_fraction: rate of the cell's operations over the best rate of an fp32 matrix product in the same run; a
            side in int8 may do more than one.
        outside_ms, outside_share: a call's time outside the engines, and that over all of it; medians.
        of_generation: a chain's images/s over those of its generation alone.
    """

    name: str
    failed: str | None = None
    checks: tuple[ParityRecord, ...] = ()
    first_ms: float | None = None
    timing: Timing | None = None
    ratio: Ratio | None = None
    gemm_fraction: float | None = None
    outside_ms: float | None = None
    outside_share: float | None = None
    of_generation: Ratio | None = None


class BenchCell(_Record):
    """The same work, done by every side.

    Attributes:
        subject: its name on the command line; title: what it is.
        sizes: of the graph's dynamic axes, or what else the work depends on.
        items: images, captions or samples a call makes.
        flop: operations a call, counted on the PyTorch modules.
        sides: eager first.
    """

    subject: str
    title: str
    kind: Kind
    batch_size: int
    sizes: dict[str, int]
    items: int
    flop: int
    sides: tuple[SideResult, ...]


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
    """All that was measured in one run, and the environment it was measured in; `gemm_gflops` is the run's ceiling."""

    cells: tuple[BenchCell, ...]
    environment: dict[str, str]
    seed: int
    gemm_gflops: float = 0.0
    memory: tuple[MemoryRow, ...] = ()
    soak: tuple[Soak, ...] = ()


def markdown(report: BenchReport) -> str:
    """The report as Markdown tables, one row a side."""
    parts = [_table(_CELL_TITLES, [_cell_row(cell, side) for cell in report.cells for side in cell.sides])]
    parts.append(f"fp32 matrix product in this run: {report.gemm_gflops:.1f} GFLOP/s")
    if report.memory:
        parts.append(_table(_MEMORY_TITLES, [_memory_row(row) for row in report.memory]))
    parts += [_soak_line(soak) for soak in report.soak]
    parts.append("; ".join(f"{name} {value}" for name, value in report.environment.items()))
    return "\n\n".join(parts)


_CELL_TITLES = (
    "call",
    "batch",
    "side",
    "ms (quartiles)",
    "items/s",
    "ratio to eager (95%)",
    "of GEMM",
    "outside engines",
)
_MEMORY_TITLES = ("call", "batch", "side", "weights MB", "loaded MB", "peak MB", "peak / (weights + largest tensor)")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    words = ("call", "side")
    rule = [
        "-" * width if title in words else "-" * (width - 1) + ":" for title, width in zip(titles, widths, strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if title in words else cell.rjust(width)
            for title, cell, width in zip(titles, cells, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (titles, rule, *rows)))


def _cell_row(cell: BenchCell, side: SideResult) -> list[str]:
    start = [f"{cell.title} ({cell.kind})", str(cell.batch_size), side.name]
    timing = side.timing
    if timing is None:
        return [*start, f"failed: {side.failed}", "", "", "", ""]
    outside = ""
    if side.outside_ms is not None and side.outside_share is not None:
        outside = f"{side.outside_ms:.3g} ms, {100 * side.outside_share:.1f}%"
    if side.of_generation is not None:
        outside = f"{_ratio(side.of_generation)} of generation alone"
    return [
        *start,
        f"{timing.median_ms:.3g} ({timing.p25_ms:.3g}-{timing.p75_ms:.3g})",
        f"{1000 * cell.items / timing.median_ms:.3g}",
        "" if side.ratio is None else _ratio(side.ratio),
        "" if side.gemm_fraction is None else f"{100 * side.gemm_fraction:.0f}%",
        outside,
    ]


def _ratio(ratio: Ratio) -> str:
    interval = "no interval" if ratio.low is None or ratio.high is None else f"{ratio.low:.2f}-{ratio.high:.2f}"
    return f"{ratio.median:.2f} ({interval})"


def _memory_row(row: MemoryRow) -> list[str]:
    start = [row.subject, str(row.batch_size), row.side]
    if row.failed is not None:
        return [*start, f"failed: {row.failed}", "", "", ""]
    sizes = (f"{size / 1e6:.0f}" for size in (row.weights_bytes, row.loaded_bytes, row.peak_bytes))
    return [*start, *sizes, f"{row.over_need:.2f}"]


def _soak_line(soak: Soak) -> str:
    steps = ", ".join(
        f"{count:,}: {size / 1e6:.1f} MB" for count, size in zip(soak.requests, soak.resident_bytes, strict=True)
    )
    return f"Resident memory of {soak.side} after so many classifications: {steps}"
