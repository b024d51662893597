"""A self-contained page of samples: tweets with their pictures by label, and captions of the pretraining corpus."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError
from mi2rage_rt.files import atomic_text
from mi2rage_rt.samples import Sample, read_samples
from mi2rage_training.microworld.world import Facts, corpus, read_facts

__all__ = ["write_gallery"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --paper: #f6f5f1; --card: #fff; --line: #e3e1da;
  --head: #ffd9a8; --tail: #b9e3f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --soft: #9aa3b2; --paper: #15181e; --card: #1e232c;
  --line: #303744; --head: #7a4a12; --tail: #17506b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1160px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 46rem; }
h2 small { color: var(--soft); font-weight: 400; margin-left: .5rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: .8rem; }
.card { display: flex; gap: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .65rem; min-width: 0; }
.card img { width: 96px; height: 96px; flex: none; image-rendering: pixelated; border-radius: 6px; }
.card div { min-width: 0; overflow-wrap: anywhere; }
.facts { font-size: .78rem; color: var(--soft); margin-top: .3rem; }
mark { border-radius: 3px; padding: 0 .2em; color: inherit; } .head { background: var(--head); }
.tail { background: var(--tail); } .wrong { color: #c0392b; }
code { font-size: .95em; }
"""


def _picture(content: bytes, words: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _sentence(sample: Sample) -> str:
    opening = {sample.head.start: '<mark class="head">', sample.tail.start: '<mark class="tail">'}
    closing = {sample.head.end - 1, sample.tail.end - 1}
    words = [
        opening.get(index, "") + html.escape(token) + ("</mark>" if index in closing else "")
        for index, token in enumerate(sample.tokens)
    ]
    return " ".join(words)


def _sample_card(folder: Path, sample: Sample, fact: Facts) -> str:
    seen = ", ".join(attribute.replace(":", " ") for attribute in sorted(fact.attributes))
    noise = ""
    if fact.true_label != sample.label:
        noise = f'<br><span class="wrong">wrong on purpose: {html.escape(fact.true_label)} is true</span>'
    types = " &rarr; ".join(fact.types)
    image = _picture((folder / str(sample.image)).read_bytes(), seen)
    facts = f'<div class="facts">{types} &middot; <i>{fact.family}</i><br>{seen}{noise}</div>'
    return f'<div class="card">{image}<div>{_sentence(sample)}{facts}</div></div>'


def _corpus_cards(seed: int, count: int) -> str:
    drawn = corpus(seed, count)
    cards = []
    for image, text, scene in zip(drawn.images, drawn.texts, drawn.scenes, strict=True):
        seen = ", ".join(attribute.replace(":", " ") for attribute in sorted(scene.attributes))
        words = f'<div>{html.escape(text)}<div class="facts">{seen}</div></div>'
        cards.append(f'<div class="card">{_picture(_png(image), seen)}{words}</div>')
    return "".join(cards)


def _sections(folder: Path, labels: Sequence[str], samples: list[Sample], facts: dict[str, Facts], each: int) -> str:
    parts = []
    for label in labels:
        of_label = [sample for sample in samples if sample.label == label]
        cards = "".join(_sample_card(folder, sample, facts[sample.id]) for sample in of_label[:each])
        parts.append(
            f"<h2><code>{html.escape(label)}</code><small>{len(of_label)} of {len(samples)} training rows</small></h2>"
            f'<div class="grid">{cards}</div>'
        )
    return "".join(parts)


def write_gallery(folder: Path | str, page: Path | str, *, each: int = 8, corpus_seed: int = 0) -> None:
    """Write one HTML page of samples from a world that `build_world` wrote.

    Args:
        folder: the world.
        page: the HTML file to write; it needs no other file.
        each: training samples a label.
        corpus_seed: of the corpus captions shown below them.

    Raises:
        DataError: `folder` holds no world.
    """
    folder = Path(folder)
    try:
        world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: cannot be read as a micro-world ({error}); expected what `mi2rage-rt world` writes"
        ) from error
    body = _sections(folder, labels, read_samples(folder / "train.jsonl"), read_facts(folder), each)
    counts = ", ".join(f"{count} {split}" for split, count in world["splits"].items())
    with atomic_text(Path(page)) as file:
        file.write(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Micro-world, seed {world['seed']}</title><style>{_STYLE}</style>"
            f"<h1>The micro-world</h1><p>Seed {world['seed']}: {counts} rows. The words give the "
            '<mark class="head">head</mark>, the <mark class="tail">tail</mark> and an ambiguous phrase; the picture '
            "gives a cue; only both together tell the relation. Eight training rows a label.</p>"
            f"{body}<h2>Pretraining corpus<small>captions and posts, no relations, other names and scenes</small></h2>"
            f'<div class="grid">{_corpus_cards(corpus_seed, 4 * each)}</div></html>\n'
        )
