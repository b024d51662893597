"""A report as Markdown: what a terminal shows and a repository keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mi2rage_benchmarks.ratios import Ratio
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, MemoryRow, SideResult, Soak

__all__ = ["brief", "disturbances", "markdown", "short", "table", "told"]


_ROUGH = 0.05


def markdown(report: BenchReport) -> str:
    """The report as Markdown tables, one row a side, and what is to be known with them."""
    parts = [table(_CELL_TITLES, [row for cell in report.cells for row in _cell_rows(cell)])]
    if any(side.timing and len(side.timing.percentiles_ms) > 1 for cell in report.cells for side in cell.sides):
        parts.append(table(_TAIL_TITLES, [row for cell in report.cells for row in _tail_rows(cell)]))
    ceilings = f"matrix product in this run: {report.gemm_gflops:.1f} GFLOP/s"
    parts.append(ceilings + (f"; copy: {report.copy_gbps:.1f} GB/s" if report.copy_gbps else ""))
    if disturbed := disturbances(report):
        parts.append("\n".join(["Disturbed:", "", *(f"- {line}" for line in disturbed)]))
    if lines := list(_quality_lines(report)):
        parts.append("\n".join(["Other images than eager's, which is the price of the time:", "", *lines]))
    if report.memory:
        parts.append(table(_MEMORY_TITLES, [_memory_row(row) for row in report.memory]))
    parts += [_soak_line(soak) for soak in report.soak]
    if report.command:
        parts.append(f"`{report.command}`")
    parts.append("; ".join(f"{name} {value}" for name, value in report.environment.items()))
    return "\n\n".join(parts)


def brief(report: BenchReport) -> str:
    """One row a call: eager's milliseconds, and each other side's ratio to them with its interval."""
    names = dict.fromkeys(side.name for cell in report.cells for side in cell.sides if side.ratio and not side.of_part)
    rows = []
    for cell in report.cells:
        sides = {side.name: side for side in cell.sides}
        eager = sides.get(EAGER)
        base = "" if eager is None or eager.timing is None else short(eager.timing.median_ms)
        ratios = [found.ratio if (found := sides.get(name)) else None for name in names]
        rows.append(
            [cell.title, str(cell.batch_size), base, *("" if item is None else _ratio(item) for item in ratios)]
        )
    return table(("call", "batch", "eager ms", *names), rows)


_CELL_TITLES = (
    "call",
    "batch",
    "side",
    "ms (quartiles)",
    "items/s",
    "ratio to eager (95%)",
    "verdict",
    "of GEMM",
    "outside engines",
)
_TAIL_TITLES = ("call", "batch", "side", "samples", "first ms", "p50", "p90", "p95", "p99")
_MEMORY_TITLES = ("call", "batch", "side", "weights MB", "loaded MB", "peak MB", "peak / (weights + largest tensor)")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns as wide as what they hold; words to the left, figures to the right."""
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    words = ("call", "side", "verdict", "now", "what")
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


def _cell_rows(cell: BenchCell) -> list[list[str]]:
    if cell.failed is not None:
        blank = [""] * (len(_CELL_TITLES) - 4)
        return [[f"{cell.title} ({cell.kind})", str(cell.batch_size), "every side", f"failed: {cell.failed}", *blank]]
    return [_side_row(cell, side) for side in cell.sides]


def _side_row(cell: BenchCell, side: SideResult) -> list[str]:
    start = [f"{cell.title} ({cell.kind})", str(cell.batch_size), side.name]
    timing = side.timing
    if timing is None:
        return [*start, f"failed: {side.failed}", *[""] * (len(_CELL_TITLES) - 4)]
    outside = ""
    if side.outside_ms is not None and side.outside_share is not None:
        outside = f"{side.outside_ms:.3g} ms, {100 * side.outside_share:.1f}%"
    if side.of_generation is not None:
        outside = f"{_ratio(side.of_generation)} of generation alone"
    verdict = "" if side.ratio is None else told(side.ratio)
    if side.of_itself is not None:
        verdict += f"; against itself: {told(side.of_itself)}"
    return [
        *start,
        f"{short(timing.median_ms)} ({short(timing.p25_ms)}-{short(timing.p75_ms)})",
        short(1000 * cell.items / timing.median_ms),
        "" if side.ratio is None else _ratio(side.ratio),
        verdict,
        "" if side.gemm_fraction is None else f"{100 * side.gemm_fraction:.0f}%",
        outside,
    ]


def short(value: float) -> str:
    """Three digits that count, without an exponent: 0.0123, 4.57, 1,260."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{value:.3g}"


def told(ratio: Ratio) -> str:
    """The verdict in words, with what it rests on."""
    if ratio.precision is None:
        return f"not known: {ratio.windows} windows"
    if ratio.verdict != "no difference":
        return ratio.verdict
    # That none was found says little where a large one would have been missed too.
    found = " found, known only" if ratio.precision > _ROUGH else ""
    return f"no difference{found} to {100 * ratio.precision:.1f}%"


def _ratio(ratio: Ratio) -> str:
    interval = "no interval" if ratio.low is None or ratio.high is None else f"{ratio.low:.2f}-{ratio.high:.2f}"
    return f"{ratio.median:.2f} ({interval})"


def _tail_rows(cell: BenchCell) -> list[list[str]]:
    return [
        [
            f"{cell.title} ({cell.kind})",
            str(cell.batch_size),
            side.name,
            str(len(side.timing.samples_ms)),
            "" if side.first_ms is None else short(side.first_ms),
            *(_percentile(side.timing.percentiles_ms.get(name)) for name in ("p50", "p90", "p95", "p99")),
        ]
        for side in cell.sides
        if side.timing is not None
    ]


def _percentile(value: float | None) -> str:
    return "too few" if value is None else short(value)


def disturbances(report: BenchReport) -> list[str]:
    """What disturbed cells, and what did not come to rest."""
    lines = []
    for cell in report.cells:
        notes = list(cell.conditions.notes) if cell.conditions else []
        unsteady = [side.name for side in cell.sides if side.timing and side.timing.steady is False]
        if unsteady:
            notes.append(f"the last three windows differ by more than 3%: {', '.join(unsteady)}")
        if notes:
            lines.append(f"{cell.title}, batch {cell.batch_size}: {'; '.join(notes)}")
    return lines


def _quality_lines(report: BenchReport) -> Iterator[str]:
    """How far images are from eager's where they are not held to be equal."""
    for cell in report.cells:
        for side in cell.sides:
            for check in side.checks:
                if check.measure == "image_psnr_db" and check.threshold is None:
                    yield f"- {cell.title}, batch {cell.batch_size}, {side.name}: PSNR {check.value:.1f} dB"


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
