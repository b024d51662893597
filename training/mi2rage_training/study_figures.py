"""The study's figures, each as SVG text for the page (its colours follow the page's mode) and as a PNG."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import require
from mi2rage_training.study_results import Diagnostic, Group

__all__ = ["DotRow", "Drawing", "ForestRow", "Verdict", "diagnostic_figure", "differences_figure", "f1_figure"]

Verdict = Literal["yes", "no", "not shown"]

_INK, _SOFT, _LINE, _PAPER = "#1d2330", "#5c6577", "#dfe3ea", "#fffffe"
_GREY, _BLUE, _GREEN, _AMBER, _RED, _VIOLET = "#7d8796", "#2f6fdb", "#1a7f4b", "#a86400", "#c0392f", "#7b4fc9"
_VARIABLES = {
    _INK: "ink",
    _SOFT: "soft",
    _LINE: "line",
    _PAPER: "paper",
    _GREY: "grey",
    _BLUE: "blue",
    _GREEN: "green",
    _AMBER: "amber",
    _RED: "red",
    _VIOLET: "violet",
}
"""The colours of the light mode, and the page's CSS variables that take their place in the SVG."""

_GROUP_COLOURS: dict[Group, str] = {"baseline": _GREY, "control": _BLUE, "method": _GREEN, "upper": _AMBER}
_VERDICT_COLOURS: dict[Verdict, str] = {"yes": _GREEN, "no": _RED, "not shown": _GREY}
_SERIES = ((_BLUE, "o"), (_GREEN, "s"), (_AMBER, "D"), (_VIOLET, "^"), (_RED, "v"), (_GREY, "P"))
_STYLE = {
    "svg.hashsalt": "mi2rage-rt",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _SOFT,
    "ytick.color": _INK,
    "ytick.left": False,
}
_WIDTH = 4.8
_PNG_DPI = 200


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure: a name for its file, what it shows in words, and its two forms."""

    name: str
    description: str
    svg: str
    png: bytes


@dataclass(frozen=True, slots=True)
class DotRow:
    """One cell: F1 in points of each seed, their mean, its 95% interval (None for one seed)."""

    title: str
    group: Group
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One comparison: difference in F1 points, bootstrap interval, t-interval (None for one seed), the verdict."""

    question: str
    mean: float
    interval: tuple[float, float]
    t_interval: tuple[float, float] | None
    verdict: Verdict


def _axes(height: float) -> tuple[Any, Any]:
    # The Figure class alone: pyplot keeps global state and may look for a display.
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _styled() -> Any:
    return require("matplotlib", "train").rc_context(_STYLE)


def _drawing(figure: Any, name: str, description: str) -> Drawing:
    text, image = io.StringIO(), io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.savefig(image, format="png", dpi=_PNG_DPI, facecolor=_PAPER, metadata={"Software": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several figures share one page, so their ids must differ; and its colours are the page's to choose.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Drawing(name, description, svg, image.getvalue())


def _places(groups: Sequence[object]) -> list[float]:
    """The height of each row, a little more between two groups."""
    places = [0.0]
    for before, after in itertools.pairwise(groups):
        places.append(places[-1] + (1.0 if before == after else 1.5))
    return places


def _value_beside(axes: Any, place: float, value: str, colour: str) -> None:
    spot: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(value, (1, place), xytext=(4, 0), color=colour, fontweight="bold", **spot)


def _title(axes: Any, title: str) -> None:
    axes.set_title(textwrap.fill(title[:1].upper() + title[1:], 52), fontsize=10, fontweight="bold", loc="left")


def f1_figure(name: str, title: str, rows: Sequence[DotRow], reference: float | None) -> Drawing:
    """Dots of test F1: each seed, the mean, its interval; `reference` is the mean that differences are taken from."""
    with _styled():
        places = _places([row.group for row in rows])
        figure, axes = _axes(0.32 * (places[-1] + 1) + 0.9)
        if reference is not None:
            axes.axvline(reference, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
        right = max(max((*row.values, *(row.interval or ()))) for row in rows)
        for place, row in zip(places, rows, strict=True):
            colour = _GROUP_COLOURS[row.group]
            axes.scatter(row.values, [place + 0.3] * len(row.values), s=14, color=colour, alpha=0.5, linewidths=0)
            if row.interval is not None:
                axes.plot(row.interval, [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.scatter([row.mean], [place], s=46, color=colour, edgecolors=_PAPER, linewidths=1.2, zorder=3)
            _value_beside(axes, place, f"{row.mean:.1f}", colour)
        axes.set_yticks(places, [textwrap.fill(row.title, 26) for row in rows])
        axes.set_ylim(places[-1] + 0.7, -0.7)
        axes.set_xlim(right=right + 1)
        axes.grid(axis="x")
        axes.set_xlabel("micro F1 on real test pairs, points")
        _title(axes, title)
        described = "; ".join(f"{row.title} {row.mean:.1f}" for row in rows)
        return _drawing(figure, name, f"F1, {title}: {described}")


def differences_figure(name: str, title: str, rows: Sequence[ForestRow]) -> Drawing:
    """A forest plot: the paired differences, their bootstrap intervals (thick) and t-intervals (thin)."""
    with _styled():
        labels = [textwrap.fill(row.question, 31) for row in rows]
        lines = [label.count("\n") + 1 for label in labels]
        places = np.cumsum([0.0, *((a + b) / 2 + 0.9 for a, b in itertools.pairwise(lines))])
        figure, axes = _axes(0.165 * (places[-1] + lines[0] / 2 + lines[-1] / 2 + 2) + 0.9)
        axes.axvline(0, color=_INK, linewidth=1)
        for place, row in zip(places, rows, strict=True):
            colour = _VERDICT_COLOURS[row.verdict]
            axes.plot(row.interval, [place, place], color=colour, linewidth=3, solid_capstyle="round")
            if row.t_interval is not None:
                axes.plot(row.t_interval, [place + 0.45] * 2, color=colour, linewidth=1.2, alpha=0.75)
            inside = _PAPER if row.verdict == "not shown" else colour
            axes.scatter([row.mean], [place], s=40, color=inside, edgecolors=colour, linewidths=1.5, zorder=3)
            _value_beside(axes, place, f"{row.mean:+.1f}".replace("-0.0", "+0.0").replace("-", "−"), colour)
        axes.set_yticks(places, labels)
        axes.set_ylim(places[-1] + lines[-1] / 2 + 0.6, -lines[0] / 2 - 0.6)
        axes.grid(axis="x")
        axes.set_xlabel("difference in F1, points")
        _title(axes, title)
        described = "; ".join(f"{row.question} {row.mean:+.1f}, {row.verdict}" for row in rows)
        return _drawing(figure, name, f"Paired differences, {title}: {described}")


def diagnostic_figure(name: str, diagnostic: Diagnostic) -> Drawing:
    """Lines over columns that count something (three or more with a digit in them), else bars, one group a row."""
    with _styled():
        values = np.array([[np.nan if value is None else value for value in row] for row in diagnostic.rows.values()])
        if sum(any(sign.isdigit() for sign in column) for column in diagnostic.columns) >= 3:
            figure = _lines(diagnostic, values)
        else:
            figure = _bars(diagnostic, values)
        return _drawing(figure, name, f"{diagnostic.title}, {diagnostic.unit}; the numbers are in the table")


def _lines(diagnostic: Diagnostic, values: NDArray[np.float64]) -> Any:
    figure, axes = _axes(2.8)
    places = np.arange(len(diagnostic.columns))
    for index, (row, line) in enumerate(zip(diagnostic.rows, values, strict=True)):
        colour, marker = _SERIES[index % len(_SERIES)]
        style = "-" if index < len(_SERIES) else "--"
        axes.plot(places, line, color=colour, marker=marker, markersize=5, linestyle=style, label=row)
    axes.set_xticks(places, [textwrap.fill(column, 10) for column in diagnostic.columns])
    axes.set_ylabel(diagnostic.unit)
    if not np.any(values < 0):
        axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    _title(axes, diagnostic.title)
    figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=8)
    return figure


def _bars(diagnostic: Diagnostic, values: NDArray[np.float64]) -> Any:
    rows, columns = values.shape
    figure, axes = _axes(0.2 * rows * (columns + 0.6) + 1.2)
    places = np.arange(rows)
    height = 0.8 / columns
    for index, column in enumerate(diagnostic.columns):
        middle = places + (index - (columns - 1) / 2) * height
        bars = axes.barh(middle, values[:, index], 0.9 * height, color=_SERIES[index % len(_SERIES)][0], label=column)
        written = ["" if np.isnan(value) else f"{value:.3g}" for value in values[:, index]]
        axes.bar_label(bars, written, padding=3, fontsize=8)
    axes.set_yticks(places, [textwrap.fill(row, 26) for row in diagnostic.rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(diagnostic.unit)
    axes.grid(axis="x")
    _title(axes, diagnostic.title)
    if columns > 1:
        figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=8)
    return figure
