"""What the figures of the pages have in common: matplotlib without a display, as SVG text for a page to hold."""

from __future__ import annotations

import io
from typing import Any

from mi2rage_engines.errors import require

__all__ = [
    "AMBER",
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "LINE",
    "PURPLE",
    "RED",
    "WASH",
    "new_axes",
    "new_figure",
    "svg_text",
]

BLUE, GREEN, GREY, INK = "#2f6fdb", "#1a7f4b", "#a8afbb", "#1d2330"
AMBER, PURPLE, RED, LINE, WASH = "#c77700", "#7a4fc4", "#c0392b", "#dfe3ea", "#f5f7fa"


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # The Figure class alone: pyplot keeps global state and may look for a display.
    matplotlib = require("matplotlib", "bench")
    matplotlib.rcParams.update({"svg.hashsalt": "mi2rage-rt", "font.size": 10, "svg.fonttype": "path"})
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, without the frame's upper and right line."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_text(figure: Any) -> str:
    """The figure as an `<svg>` element, the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
