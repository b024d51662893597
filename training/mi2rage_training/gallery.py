"""A page of what a run makes, written again and again while it goes on: figures, and real samples with their chains."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from mi2rage_engines.errors import InputError
from mi2rage_rt.files import atomic_text
from mi2rage_training.page_parts import given_part, made_part
from mi2rage_training.selection_figures import STYLE, bars, counts
from mi2rage_training.store import Candidate
from mi2rage_training.tally import Tally

__all__ = ["Gallery", "check_gallery"]

_REFRESH_S = 10
_MARK = "<!-- mi2rage-rt gallery -->"


class Gallery:
    """One HTML file that needs no other, loads itself again in a browser, and never holds more than so many images.

    It shows a real sample of each shard. When there is no more room, the older half of what is shown is thinned out to
    every second sample, so that the page spans the run.

    Args:
        path: the file; an earlier page of a gallery is replaced, anything else is refused.
        judged: whether a judge runs along, so that candidates are kept or not.
        samples: real samples that are shown at most, 2 or more.
        every_s: least time between two writes.

    Raises:
        InputError: `path` is something else.
    """

    def __init__(self, path: Path, *, judged: bool = False, samples: int = 40, every_s: float = 5.0) -> None:
        self.path = path
        self.judged = judged
        self.samples = samples
        self.every_s = every_s
        self._parts: list[str] = []
        self._written_s = float("-inf")
        check_gallery(path)

    def add(self, candidates: Sequence[Candidate], tally: Tally, kept: Sequence[bool] | None = None) -> None:
        """Show one real sample's candidates, and write the page if the last time is long enough ago.

        Args:
            candidates: of one real sample; none are passed over.
            tally: of the whole run so far.
            kept: of each candidate; None keeps all.
        """
        if candidates:
            self._parts.append(_sample(candidates, kept or [True] * len(candidates), judged=self.judged))
        if len(self._parts) > self.samples:
            middle = len(self._parts) // 2
            self._parts = self._parts[:middle:2] + self._parts[middle:]
        if time.monotonic() - self._written_s >= self.every_s:
            self.write(tally, running=True)

    def write(self, tally: Tally, *, running: bool = False) -> None:
        """Write the page; one of a run that goes on loads itself again."""
        self._written_s = time.monotonic()
        again = f'<meta http-equiv="refresh" content="{_REFRESH_S}">' if running else ""
        with atomic_text(self.path) as file:
            file.write(
                f'<!doctype html>{_MARK}<html lang="en"><meta charset="utf-8">{again}'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>Samples of a run</title><style>{STYLE}</style><h1>What the run makes</h1>"
                f"{self._facts(tally, running=running)}"
                f"<h2>{len(self._parts)} real samples and all that was made of them</h2>"
                "<p>The first sample of a shard each, the newest first: none is picked by its looks. "
                '<mark class="head">Head</mark> and <mark class="tail">tail</mark> are marked.</p>'
                f"{''.join(reversed(self._parts))}</html>\n"
            )

    def _facts(self, tally: Tally, *, running: bool) -> str:
        state = "is going on" if running else "has ended"
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        given_up = f", {tally.dropped} were given up" if tally.dropped else ""
        kept = f", <b>{tally.kept}</b> of them kept by the judge" if self.judged else ""
        parts = [
            f"<p>This run {state} ({now}). <b>{tally.rows}</b> candidates are made of {tally.samples} real samples"
            f"{kept}{given_up}.</p>"
        ]
        if tally.by_label:
            title = "Kept by label" if self.judged else "Made by label"
            figure = (
                bars([(label, kept, there) for label, (kept, there) in tally.by_label.items()])
                if self.judged
                else counts([(label, True, there) for label, (_, there) in tally.by_label.items()])
            )
            parts.append(f'<div class="figures"><figure><figcaption>{title}</figcaption>{figure}</figure></div>')
        return "".join(parts)


def check_gallery(path: Path | None) -> None:
    """Refuse early a page that would overwrite something.

    Raises:
        InputError: `path` is there, and is no gallery.
    """
    if path is None or not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if _MARK.encode() in file.read(200):
                return
    raise InputError(f"{path}: is there, and is no gallery of an earlier run; give another file, or remove it")


def _sample(candidates: Sequence[Candidate], kept: Sequence[bool], *, judged: bool) -> str:
    first = candidates[0]
    children = "".join(_child(row, keep, judged=judged) for row, keep in zip(candidates, kept, strict=True))
    label = html.escape(str(first.sample.label))
    return (
        f'<section class="parent"><div class="given">{given_part(first)}</div>'
        f'<div class="soft">{html.escape(first.provenance.parent)}: <code>{label}</code></div>'
        f"<ul>{children}</ul></section>"
    )


def _child(candidate: Candidate, keep: bool, *, judged: bool) -> str:
    picture, said = made_part(candidate)
    origin, added = candidate.provenance, candidate.added_nats
    numbers = "" if added is None else f"<div><dt>added nats</dt><dd>{added:+.2f}</dd></div>"
    verdict = f"<b>{'kept' if keep else 'dropped'}</b>" if judged else ""
    return (
        f'<li class="{"kept" if keep else "dropped"}">{picture}<div class="words">'
        f'<div class="soft">link {origin.link}, child {origin.child}</div><div>{said}</div></div>'
        f'<dl>{numbers}</dl><div class="why">{verdict}</div></li>'
    )
