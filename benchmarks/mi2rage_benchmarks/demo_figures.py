"""The demo page's figures, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mi2rage_benchmarks.svg import BLUE, GREEN, GREY, INK, new_axes, svg_text

if TYPE_CHECKING:
    from mi2rage_benchmarks.demo import Student

__all__ = ["LatencyRow", "f1_figure", "latency_figure", "links_figure", "scores_figure"]


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One comparison: medians in ms, their middle halves, the ratio PyTorch / ONNX Runtime and its 95% interval."""

    name: str
    batch: int
    torch_ms: float
    torch_quartiles_ms: tuple[float, float]
    ort_ms: float
    ort_quartiles_ms: tuple[float, float]
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


def f1_figure(students: Sequence[Student]) -> str:
    """Bars of test F1 by student."""
    figure, axes = new_axes(5.2, 3.2)
    colours = [
        GREEN if student.name == "MI2RAGE" else BLUE if student.name == "direct" else GREY for student in students
    ]
    values = [100 * student.metrics.f1 for student in students]
    bars = axes.barh([student.name for student in students], values, color=colours, height=0.62)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("micro F1 on real test pairs")
    return svg_text(figure)


def scores_figure(added_nats: NDArray[np.float64], kept: NDArray[np.bool_]) -> str:
    """Histogram of the added information of kept and dropped candidates."""
    figure, axes = new_axes(5.2, 3.2)
    low, high = np.percentile(added_nats, [1, 99])
    edges = np.linspace(low, high, 40)
    shown = np.clip(added_nats, low, high)
    axes.hist([shown[kept], shown[~kept]], edges, stacked=True, color=[GREEN, GREY], label=["kept", "dropped"])
    axes.set_xlabel("added information, nats")
    axes.set_ylabel("candidates")
    axes.legend(frameon=False)
    return svg_text(figure)


def links_figure(links: NDArray[np.int_], kept: NDArray[np.bool_], cue_rates: Sequence[float]) -> str:
    """Share kept, and share that shows the deciding object, by link; the first rate is the real pictures'."""
    figure, axes = new_axes(5.2, 3.2)
    numbers = np.unique(links)
    shares = [100 * kept[links == link].mean() for link in numbers]
    axes.bar(numbers, shares, color=GREEN, alpha=0.3, width=0.6, label="kept")
    axes.plot(numbers, [100 * rate for rate in cue_rates[1:]], color=INK, marker="o", label="shows the deciding object")
    axes.axhline(100 * cue_rates[0], color=BLUE, linestyle="--", label="the same, real pictures")
    axes.set_xticks(numbers)
    axes.set_ylim(0, 118)
    axes.set_xlabel("link of the chain")
    axes.set_ylabel("share of pictures, %")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    return svg_text(figure)


def latency_figure(rows: Sequence[LatencyRow]) -> str:
    """Median latency of both sides, the middle half as bars."""
    figure, axes = new_axes(9.6, 0.6 * len(rows) + 1.4)
    places = np.arange(len(rows))
    for offset, colour, name in ((-0.18, GREY, "PyTorch"), (0.18, BLUE, "ONNX Runtime")):
        torch_side = name == "PyTorch"
        medians = [row.torch_ms if torch_side else row.ort_ms for row in rows]
        quartiles = [row.torch_quartiles_ms if torch_side else row.ort_quartiles_ms for row in rows]
        errors = np.array([[m - low, high - m] for m, (low, high) in zip(medians, quartiles, strict=True)]).T
        axes.barh(places + offset, medians, height=0.34, color=colour, label=name, xerr=np.maximum(errors, 0))
    axes.set_yticks(places, [f"{row.name}, batch {row.batch}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a call")
    axes.legend(frameon=False, loc="lower right")
    return svg_text(figure)
