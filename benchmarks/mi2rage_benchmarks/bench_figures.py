"""The bench page's figures, as SVG text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mi2rage_benchmarks.bench_markdown import short
from mi2rage_benchmarks.cells import COMPILED
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, SideResult
from mi2rage_benchmarks.svg import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE,
    PURPLE,
    RED,
    WASH,
    new_axes,
    new_figure,
    svg_text,
)

__all__ = ["colours_of", "latency_figure", "ratio_figure", "roofline_figure", "stages_figure", "throughput_figure"]

_FIXED = {EAGER: GREY, COMPILED: AMBER}
_OTHERS = (BLUE, GREEN, PURPLE, RED, INK)
_MARKERS = "osD^vP"
_STAGES = (BLUE, GREEN, AMBER, PURPLE, RED, INK)


def colours_of(report: BenchReport) -> dict[str, str]:
    """A colour for each side that did whole works, the same in every figure."""
    names = dict.fromkeys(side.name for cell in report.cells for side in cell.sides if not side.of_part)
    others = itertools.cycle(_OTHERS)
    return {name: _FIXED.get(name) or next(others) for name in names}


def _label(cell: BenchCell) -> str:
    return f"{cell.title}, batch {cell.batch_size}"


def _timed(cell: BenchCell) -> list[SideResult]:
    return [side for side in cell.sides if side.timing is not None and not side.of_part]


def _legend(axes: Any, colours: dict[str, str], **where: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize=9, **where)


def ratio_figure(report: BenchReport) -> str | None:
    """Each side's ratio to eager with its 95% interval; None where there is none."""
    cells = [cell for cell in report.cells if any(side.ratio for side in _timed(cell))]
    if not cells:
        return None
    colours = {name: colour for name, colour in colours_of(report).items() if name != EAGER}
    places = [(cell, [side for side in _timed(cell) if side.ratio]) for cell in cells]
    rows = sum(len(sides) for _, sides in places) + 0.6 * len(places)
    figure, axes = new_axes(10.4, 0.24 * rows + 1.3)
    ticks, names, place = [], [], 0.0
    for number, (cell, sides) in enumerate(places):
        if number % 2 == 0:
            axes.axhspan(place - 0.8, place + len(sides) - 0.2, color=WASH, zorder=0)
        ticks.append(place + (len(sides) - 1) / 2)
        names.append(_label(cell))
        for side in sides:
            assert side.ratio is not None
            ratio, colour = side.ratio, colours[side.name]
            if ratio.low is not None and ratio.high is not None:
                axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2.4, alpha=0.5)
            hollow = ratio.verdict in ("no difference", "not known")
            axes.plot(
                ratio.median, place, "o", color=colour, markersize=6.5, markerfacecolor="white" if hollow else colour
            )
            axes.annotate(
                f"{ratio.median:.2f}",
                (max(ratio.median, ratio.high or 0.0), place),
                textcoords="offset points",
                xytext=(8, 0),
                va="center",
                fontsize=8.5,
                color=INK,
            )
            place += 1
        place += 0.6
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    _plain_log_ticks(axes.xaxis, [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16])
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - 0.6, -0.8)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("times as fast as PyTorch eager (95% interval; hollow: no difference)")
    _legend(axes, colours, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(colours)))
    return svg_text(figure)


def _plain_log_ticks(axis: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def latency_figure(report: BenchReport) -> str | None:
    """Every raw sample, a panel a call, the medians as bars; None where nothing was timed."""
    cells = [cell for cell in report.cells if _timed(cell)]
    if not cells:
        return None
    colours = colours_of(report)
    rows = -(-len(cells) // 2)
    most = max(len(_timed(cell)) for cell in cells)
    figure = new_figure(10.4, rows * (0.26 * most + 0.75) + 0.6)
    draws = np.random.default_rng(0)
    for number, cell in enumerate(cells):
        axes = figure.add_subplot(rows, 2, number + 1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        for place, side in enumerate(_timed(cell)):
            assert side.timing is not None
            samples, colour = np.array(side.timing.samples_ms), colours[side.name]
            spread = place + draws.uniform(-0.3, 0.3, len(samples))
            axes.plot(samples, spread, ".", color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
            axes.plot([side.timing.median_ms] * 2, [place - 0.42, place + 0.42], color=colour, linewidth=2.6)
        axes.set_title(_label(cell), fontsize=10, loc="left", color=INK)
        axes.set_yticks([])
        axes.set_ylim(len(_timed(cell)) - 0.4, -0.6)
        axes.set_xlim(0)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        if number >= len(cells) - 2:
            axes.set_xlabel("milliseconds a call; a dot is a call, a bar the median")
    figure.legend(
        handles=_handles(colours), frameon=False, fontsize=9, loc="outside upper center", ncols=min(4, len(colours))
    )
    return svg_text(figure)


def throughput_figure(report: BenchReport) -> str | None:
    """Items a second over the batch size, by call; None where nothing was run at two sizes."""
    colours = colours_of(report)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for cell in report.cells:
        for side in _timed(cell):
            assert side.timing is not None
            rate = 1000 * cell.items / side.timing.median_ms
            curves.setdefault(cell.title, {}).setdefault(side.name, []).append((cell.batch_size, rate))
    shown = {title: sides for title, sides in curves.items() if any(len(points) > 1 for points in sides.values())}
    if not shown:
        return None
    columns = min(3, len(shown))
    figure = new_figure(10.4, 2.5 * -(-len(shown) // columns) + 0.5)
    for number, (title, sides) in enumerate(shown.items()):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        sizes = sorted({size for points in sides.values() for size, _ in points})
        for name, points in sides.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", color=colours[name], linewidth=2, label=name)
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xscale("log", base=2)
        _plain_log_ticks(axes.xaxis, sizes)
        axes.set_ylim(0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        if number % columns == 0:
            axes.set_ylabel("items/s")
        if number >= len(shown) - columns:
            axes.set_xlabel("batch size")
    figure.legend(
        handles=_handles(colours), frameon=False, fontsize=9, loc="outside upper center", ncols=min(4, len(colours))
    )
    return svg_text(figure)


def _handles(colours: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]


def roofline_figure(report: BenchReport) -> str | None:
    """Rates over operations a byte, under the ceilings of the same run; None where they were not measured."""
    cells = [cell for cell in report.cells if cell.intensity and _timed(cell)]
    if not cells or not report.gemm_gflops or not report.copy_gbps:
        return None
    colours = colours_of(report)
    titles = list(dict.fromkeys(cell.title for cell in cells))
    figure, axes = new_axes(10.4, 4.8)
    intensities = [cell.intensity or 1.0 for cell in cells]
    ridge = report.gemm_gflops / report.copy_gbps
    x = np.geomspace(min(*intensities, ridge) / 3, max(*intensities, ridge) * 3, 200)
    axes.plot(x, np.minimum(report.gemm_gflops, x * report.copy_gbps), color=INK, linewidth=1.6)
    for cell in cells:
        for side in _timed(cell):
            assert side.timing is not None
            rate = cell.flop / side.timing.median_ms / 1e6
            marker = _MARKERS[titles.index(cell.title) % len(_MARKERS)]
            axes.plot(
                cell.intensity,
                rate,
                marker,
                color=colours[side.name],
                markersize=7,
                alpha=0.85,
                markeredgecolor="white",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.annotate(
        f"matrix product {report.gemm_gflops:.0f} GFLOP/s",
        (x[-1], report.gemm_gflops),
        textcoords="offset points",
        xytext=(0, 5),
        ha="right",
        fontsize=9,
    )
    axes.annotate(
        f"copy {report.copy_gbps:.1f} GB/s",
        (x[8], x[8] * report.copy_gbps),
        textcoords="offset points",
        xytext=(10, -8),
        fontsize=9,
    )
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("operations a byte, counted on the PyTorch modules")
    axes.set_ylabel("GFLOP/s")
    from matplotlib.lines import Line2D

    shapes = [
        Line2D([], [], color=INK, marker=_MARKERS[place % len(_MARKERS)], linestyle="", label=title)
        for place, title in enumerate(titles)
    ]
    sides = [Line2D([], [], color=colour, marker="s", linestyle="", label=name) for name, colour in colours.items()]
    axes.legend(handles=[*sides, *shapes], frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return svg_text(figure)


def stages_figure(report: BenchReport) -> str | None:
    """Where whole calls spend their time, by side; None where nothing of it is known."""
    bars = [
        (f"{_label(cell)}\n{side.name}", side)
        for cell in report.cells
        if cell.kind == "whole"
        for side in _timed(cell)
        if side.stages_ms
    ]
    if not bars:
        return None
    figure, axes = new_axes(10.4, 0.44 * len(bars) + 1.2)
    names = list(dict.fromkeys(name for _, side in bars for name in side.stages_ms))
    colours = dict(zip(names, itertools.cycle(_STAGES), strict=False)) | {"outside": GREY}
    for place, (_, side) in enumerate(bars):
        assert side.timing is not None
        whole = max(side.timing.median_ms, sum(side.stages_ms.values()))
        parts = side.stages_ms | {"outside": max(0.0, whole - sum(side.stages_ms.values()))}
        start = 0.0
        for name, taken in parts.items():
            share = 100 * taken / whole
            axes.barh(place, share, left=start, height=0.62, color=colours[name])
            if share >= 6:
                axes.text(
                    start + share / 2,
                    place,
                    f"{short(taken)} ms",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white",
                )
            start += share
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a call, %")
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in colours.items()]
    axes.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        ncols=min(5, len(handles)),
    )
    return svg_text(figure)
