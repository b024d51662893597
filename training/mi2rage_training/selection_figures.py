"""The style and the figures of the selection page: bars of shares, and histograms of kept against dropped."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["STYLE", "bars", "counts", "histogram"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --paper: #f6f5f1; --card: #fff; --line: #e3e1da;
  --head: #ffd9a8; --tail: #b9e3f5; --kept: #1a7f5a; --dropped: #b3b0a6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --soft: #9aa3b2; --paper: #15181e; --card: #1e232c;
  --line: #303744; --head: #7a4a12; --tail: #17506b; --kept: #3fbf8f; --dropped: #596273; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1000px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 46rem; } p b { color: var(--ink); }
.soft { color: var(--soft); font-size: .85rem; } code { font-size: .95em; }
.key span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-left: .6em; }
span.kept, i.kept { background: var(--kept); } span.dropped, i.dropped { background: var(--dropped); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: .8rem; }
figure, .parent { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; } figcaption small { font-weight: 400; color: var(--soft); }
.bars { display: grid; grid-template-columns: minmax(0, auto) minmax(60px, 1fr) auto; gap: .25rem .6rem;
  align-items: center; font-size: .85rem; margin-bottom: .8rem; }
.bars div { display: flex; height: .8rem; border-radius: 2px; overflow: hidden; }
.bars span { font-variant-numeric: tabular-nums; color: var(--soft); text-align: right; }
svg { width: 100%; height: auto; display: block; } svg .kept { fill: var(--kept); }
svg .dropped { fill: var(--dropped); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg line { stroke: var(--soft); stroke-width: .7; }
.parent { margin-bottom: .8rem; } .given { font-size: 1.05rem; }
mark { border-radius: 3px; padding: 0 .2em; color: inherit; } .head { background: var(--head); }
.tail { background: var(--tail); }
ul { list-style: none; margin: .6rem 0 0; padding: 0; }
li { display: grid; grid-template-columns: 72px minmax(0, 1fr) auto 13rem; gap: .3rem .9rem; align-items: center;
  padding: .45rem .6rem; border-left: 4px solid var(--dropped); border-top: 1px solid var(--line); }
li.kept { border-left-color: var(--kept); } li.kept b { color: var(--kept); }
li.dropped img { opacity: .6; }
img, .none { width: 72px; height: 72px; object-fit: cover; border-radius: 6px; vertical-align: middle; }
.none { display: grid; place-items: center; text-align: center; border: 1px dashed var(--line); font-size: .7rem;
  color: var(--soft); } img.pixels { image-rendering: pixelated; }
dl { display: flex; gap: .9rem; margin: 0; font-variant-numeric: tabular-nums; } dl div { text-align: right; }
dt { font-size: .75rem; color: var(--soft); } dd { margin: 0; } .why { font-size: .85rem; }
@media (max-width: 700px) { body { padding: 1.2rem .7rem 3rem; }
  li { grid-template-columns: 72px minmax(0, 1fr); } li img, .none { grid-row: 1 / span 3; align-self: start; }
  dl, .why { grid-column: 2; } }
"""

_BINS = 32
_WIDTH, _HALF, _BOTTOM = 420, 60, 18


def bars(shares: Sequence[tuple[str, int, int]]) -> str:
    """A bar a name: the share of its candidates that is kept.

    Args:
        shares: name, kept, all.
    """
    rows = (
        f'<code>{html.escape(name)}</code><div><i class="kept" style="width:{100 * kept / total:.2f}%"></i>'
        f'<i class="dropped" style="flex:1"></i></div><span>{kept} of {total}</span>'
        for name, kept, total in shares
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def counts(whys: Sequence[tuple[str, bool, int]]) -> str:
    """A bar a reason, as long as the number of candidates.

    Args:
        whys: reason, whether to keep, candidates.
    """
    most = max(count for _, _, count in whys)
    rows = (
        f'<code>{html.escape(why)}</code><div><i class="{"kept" if kept else "dropped"}" '
        f'style="width:{100 * count / most:.2f}%"></i></div><span>{count}</span>'
        for why, kept, count in whys
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def histogram(values: NDArray[np.float64], kept: NDArray[np.bool_], name: str) -> str:
    """Inline SVG: the kept above the line, the dropped below it; the outer bins take what lies beyond 99% of all."""
    low, high = np.quantile(values, (0.005, 0.995))
    high = max(high, low + 1e-6)
    edges = np.linspace(low, high, _BINS + 1)
    inside = np.clip(values, low, high)
    sides = [np.histogram(inside[mask], edges)[0] for mask in (kept, ~kept)]
    scale, width = _HALF / max(1, *(int(side.max()) for side in sides)), _WIDTH / _BINS
    parts = []
    for role, counts in zip(("kept", "dropped"), sides, strict=True):
        for index, count in enumerate(counts):
            height = count * scale
            top = _HALF - height if role == "kept" else _HALF
            words = f"{edges[index]:.2f} to {edges[index + 1]:.2f}: {count} {role}"
            parts.append(
                f'<rect class="{role}" x="{index * width:.2f}" y="{top:.2f}" width="{width - 0.8:.2f}" '
                f'height="{height:.2f}"><title>{words}</title></rect>'
            )
    ends = (("start", 0.0, low), ("middle", _WIDTH / 2, (low + high) / 2), ("end", float(_WIDTH), high))
    ticks = "".join(
        f'<text x="{x}" y="{2 * _HALF + 14}" text-anchor="{anchor}">{value:.2f}</text>' for anchor, x, value in ends
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {2 * _HALF + _BOTTOM}" role="img" aria-label="{html.escape(name)}: kept above the '
        f'line, dropped below">{"".join(parts)}<line x1="0" x2="{_WIDTH}" y1="{_HALF}" y2="{_HALF}"/>{ticks}</svg>'
    )
