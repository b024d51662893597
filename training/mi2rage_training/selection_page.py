"""A self-contained page of a selection: what was kept, what was dropped, and why."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError
from mi2rage_rt.files import atomic_text
from mi2rage_rt.noise import seed_from
from mi2rage_training.page_parts import given_part, made_part
from mi2rage_training.selection import Selection
from mi2rage_training.selection_figures import STYLE, bars, counts, histogram
from mi2rage_training.store import Candidate, Candidates, StoredCandidates

__all__ = ["check_page", "sampled_parents", "write_selection_page"]


def check_page(path: Path | None) -> None:
    """Refuse early a page that would overwrite something.

    Raises:
        InputError: `path` is there.
    """
    if path is not None and path.exists():
        raise InputError(f"{path}: is there already; expected the name of a new HTML file; give another, or remove it")


def sampled_parents(candidates: Candidates, count: int, seed: int = 0) -> dict[str, list[int]]:
    """The rows of some parents: labels in turn, within a label shuffled by (seed, parent); never picked by looks."""
    rows: dict[str, list[int]] = defaultdict(list)
    labels: dict[str, str] = {}
    for row, candidate in enumerate(candidates):
        rows[candidate.provenance.parent].append(row)
        labels.setdefault(candidate.provenance.parent, str(candidate.sample.label))
    by_label: dict[str, list[str]] = defaultdict(list)
    for parent in sorted(rows, key=lambda parent: seed_from("page", seed, parent)):
        by_label[labels[parent]].append(parent)
    turns = [(turn, label, parent) for label, of in by_label.items() for turn, parent in enumerate(of)]
    chosen = sorted(turns)[:count]
    return {parent: rows[parent] for _, _, parent in sorted(chosen, key=lambda item: (item[1], item[0]))}


def _columns(selection: Selection) -> dict[str, tuple[str, NDArray[np.float64]]]:
    """What is known of each candidate, by its short name: unit, and values float64 (N,)."""
    found: dict[str, tuple[str, NDArray[np.float64]]] = {}
    if selection.scores is not None:
        found["added"] = ("nats", selection.scores.added_nats)
        found["information"] = ("nats", selection.scores.information_nats)
    if selection.similarity is not None:
        found["similarity"] = ("cosine", selection.similarity)
    if selection.weights is not None:
        found["weight"] = ("of 1 on average", selection.weights)
    return found


def _child(candidate: Candidate, selection: Selection, row: int) -> str:
    picture, said = made_part(candidate)
    numbers = "".join(
        f"<div><dt>{name}</dt><dd>{values[row]:{'+' if unit == 'nats' else ''}.2f}</dd></div>"
        for name, (unit, values) in _columns(selection).items()
    )
    verdict, _, why = selection.reasons[row].partition(": ")
    origin = candidate.provenance
    return (
        f'<li class="{"kept" if selection.kept[row] else "dropped"}">{picture}<div class="words">'
        f'<div class="soft">link {origin.link}, child {origin.child}</div><div>{said}</div></div>'
        f'<dl>{numbers}</dl><div class="why"><b>{verdict}</b> {html.escape(why)}</div></li>'
    )


def _parent(candidates: Mapping[int, Candidate], selection: Selection, rows: Sequence[int]) -> str:
    children = "".join(_child(candidates[row], selection, row) for row in rows)
    first = candidates[rows[0]]
    kept = sum(bool(selection.kept[row]) for row in rows)
    return (
        f'<section class="parent"><div class="given">{given_part(first)}</div>'
        f'<div class="soft">{html.escape(first.provenance.parent)}: {kept} of {len(rows)} kept</div>'
        f"<ul>{children}</ul></section>"
    )


def _parents(candidates: Mapping[int, Candidate], selection: Selection, shown: dict[str, list[int]]) -> str:
    parts, last = [], None
    for rows in shown.values():
        label = str(candidates[rows[0]].sample.label)
        if label != last:
            parts.append(f"<h3><code>{html.escape(label)}</code></h3>")
            last = label
        parts.append(_parent(candidates, selection, rows))
    return "".join(parts)


def _shares(names: Sequence[str], kept: NDArray[np.bool_]) -> list[tuple[str, int, int]]:
    """Of each name: how many are kept, and how many there are."""
    all_of = Counter(names)
    kept_of = Counter(name for name, keep in zip(names, kept, strict=True) if keep)
    return [(name, kept_of[name], all_of[name]) for name in sorted(all_of)]


def _summary(candidates: Candidates, selection: Selection) -> str:
    labels, links = [], []
    for candidate in candidates:
        labels.append(str(candidate.sample.label))
        links.append(f"link {candidate.provenance.link}")
    found = Counter(reason.partition(" (")[0].partition(" of ")[0] for reason in selection.reasons)
    whys = [(why, why.startswith("kept"), count) for why, count in sorted(found.items())]
    figures = [
        f"<figure><figcaption>By label</figcaption>{bars(_shares(labels, selection.kept))}</figure>",
        f"<figure><figcaption>By link</figcaption>{bars(_shares(links, selection.kept))}"
        f"<figcaption>By reason</figcaption>{counts(whys)}</figure>",
    ]
    for name, (unit, values) in _columns(selection).items():
        if name != "weight":
            title = f"<figcaption>{name} <small>{unit}</small></figcaption>"
            figures.append(f"<figure>{title}{histogram(values, selection.kept, name)}</figure>")
    return f'<div class="figures">{"".join(figures)}</div>'


def _settings(settings: dict[str, Any]) -> str:
    policy = settings.get("config", {}).get("policy", {})
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in policy.items() if value is not None)


def _facts(candidates: Candidates, selection: Selection) -> str:
    kept, parents = int(selection.kept.sum()), {candidate.provenance.parent for candidate in candidates}
    lines = [
        f"<b>{kept}</b> of {len(candidates)} candidates of {len(parents)} real samples are kept "
        f"(<i>{html.escape(_settings(selection.manifest.settings))}</i>)."
    ]
    if selection.scores is not None:
        scores = selection.scores
        lines.append(
            f"The label's entropy is {scores.label_entropy_nats:.2f} nats. Over all candidates the teachers' lower "
            f"bound on what both modalities tell of it is {scores.bound_nats:.2f} nats, on what the real one alone "
            f"tells {scores.real_bound_nats:.2f} nats."
        )
    return " ".join(lines)


def write_selection_page(
    path: Path | str, candidates: Candidates, selection: Selection, *, parents: int = 24, seed: int = 0
) -> None:
    """Write one HTML file that needs no other.

    Args:
        candidates: all of them, in the order that was selected from.
        parents: how many real samples are shown with all their children (see `sampled_parents`).
        seed: of that sample.

    Raises:
        DataError: an image cannot be decoded.
    """
    words = candidates.without_images() if isinstance(candidates, StoredCandidates) else candidates
    shown = sampled_parents(words, parents, seed)
    wanted = {row for rows in shown.values() for row in rows}
    pictured = {row: candidate for row, candidate in enumerate(candidates) if row in wanted}
    with atomic_text(Path(path)) as file:
        file.write(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Selection: kept and dropped</title><style>{STYLE}</style>"
            f"<h1>What was kept, and why</h1><p>{_facts(words, selection)}</p>"
            f'<p class="key"><span class="kept"></span> kept <span class="dropped"></span> dropped</p>'
            f"{_summary(words, selection)}"
            f"<h2>{len(shown)} real samples and all that was made of them</h2>"
            f"<p>Drawn by seed {seed}, the labels in turn: none is picked by its looks. "
            '<mark class="head">Head</mark> and <mark class="tail">tail</mark> are marked.</p>'
            f"{_parents(pictured, selection, shown)}</html>\n"
        )
