"""The bench's page: one HTML file that holds its figures, tables and environment."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from mi2rage_benchmarks import bench_figures as figures
from mi2rage_benchmarks.bench_markdown import disturbances, short, told
from mi2rage_benchmarks.compare import Comparison
from mi2rage_benchmarks.report import BenchCell, BenchReport, SideResult
from mi2rage_engines.errors import require
from mi2rage_rt.files import atomic_text

__all__ = ["write_bench_page"]


def write_bench_page(report: BenchReport, path: Path, comparison: Comparison | None = None) -> None:
    """Write the page; it needs no other file and no network.

    Args:
        comparison: with an older report, where one was made.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "bench")
    source = resources.files("mi2rage_benchmarks").joinpath("templates/bench.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = template.render(
        report=report,
        short=short,
        tiles=_tiles(report),
        rows=[_row(cell, side) for cell in report.cells for side in cell.sides],
        failed=report.failures,
        disturbed=disturbances(report),
        comparison=comparison,
        figures={
            "ratios": figures.ratio_figure(report),
            "latency": figures.latency_figure(report),
            "throughput": figures.throughput_figure(report),
            "roofline": figures.roofline_figure(report),
            "stages": figures.stages_figure(report),
        },
    )
    with atomic_text(path) as file:
        file.write(page)


def _tiles(report: BenchReport) -> list[tuple[str, str]]:
    """The figures at the head of the page, with what they are."""
    compared = [side for cell in report.cells for side in cell.sides if side.ratio is not None]
    verdicts = [side.ratio.verdict for side in compared if side.ratio is not None]
    checks = [check for cell in report.cells for side in cell.sides for check in side.checks]
    bounded = [check for check in checks if check.threshold is not None]
    samples = sum(len(side.timing.samples_ms) for cell in report.cells for side in cell.sides if side.timing)
    return [
        (f"{verdicts.count('faster')} / {len(verdicts)}", "comparisons in which the side is faster than eager"),
        (f"{verdicts.count('slower')}", "in which it is slower"),
        (f"{sum(check.passed for check in bounded)} / {len(bounded)}", "answers within their bounds, before timing"),
        (f"{samples:,}", "timed calls, all in the JSON file"),
        (f"{report.gemm_gflops:.0f}", "GFLOP/s, matrix product in this run"),
    ]


def _row(cell: BenchCell, side: SideResult) -> dict[str, Any]:
    timing = side.timing
    return {
        "title": cell.title,
        "batch": cell.batch_size,
        "side": side.name,
        "failed": side.failed,
        "median": None if timing is None else short(timing.median_ms),
        "quartiles": None if timing is None else f"{short(timing.p25_ms)} – {short(timing.p75_ms)}",
        "tail": None if timing is None else _tail(timing.percentiles_ms),
        "first": None if side.first_ms is None else short(side.first_ms),
        "rate": None if timing is None else short(1000 * cell.items / timing.median_ms),
        "ratio": side.ratio,
        "told": None if side.ratio is None else told(side.ratio),
        "itself": None if side.of_itself is None else told(side.of_itself),
        "gemm": None if side.gemm_fraction is None else f"{100 * side.gemm_fraction:.0f}%",
        "first_of_cell": side is cell.sides[0],
    }


def _tail(percentiles: dict[str, float]) -> str:
    return (
        ", ".join(f"{name} {short(value)}" for name, value in percentiles.items() if name != "p50") or "too few samples"
    )
