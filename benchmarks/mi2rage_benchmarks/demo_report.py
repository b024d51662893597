"""The demo as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_benchmarks.demo import DemoResult
from mi2rage_benchmarks.demo_figures import LatencyRow, f1_figure, latency_figure, links_figure, scores_figure
from mi2rage_benchmarks.report import BenchReport
from mi2rage_engines.errors import require
from mi2rage_rt.files import atomic_text
from mi2rage_rt.samples import Sample
from mi2rage_training.store import Candidate

__all__ = ["marked_html", "write_demo_report"]

_CHAINS = 10


def marked_html(sample: Sample) -> str:
    """The sentence as escaped HTML, head and tail in `<mark>`; the tail inside an overlap stays unmarked."""
    parts = []
    for index, token in enumerate(sample.tokens):
        in_head = sample.head.start <= index < sample.head.end
        in_tail = sample.tail.start <= index < sample.tail.end
        word = html.escape(token)
        if in_head:
            word = f"<mark>{word}</mark>"
        elif in_tail:
            word = f'<mark class="tail">{word}</mark>'
        parts.append(word)
    return " ".join(parts)


def _data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _chains(result: DemoResult) -> list[dict[str, Any]]:
    """One sentence of each label, the rest in order: nothing is picked by how it looks."""
    by_parent: dict[str, list[int]] = defaultdict(list)
    for row, candidate in enumerate(result.candidates):
        by_parent[candidate.provenance.parent].append(row)
    first_of_label = {str(result.candidates[rows[0]].sample.label): rows for rows in reversed(by_parent.values())}
    shown = [first_of_label[label] for label in sorted(first_of_label)]
    shown += [rows for rows in by_parent.values() if rows not in shown][: max(0, _CHAINS - len(shown))]
    return [_chain(result, rows) for rows in shown[:_CHAINS]]


def _chain(result: DemoResult, rows: list[int]) -> dict[str, Any]:
    def link(row: int) -> dict[str, Any]:
        candidate: Candidate = result.candidates[row]
        return {
            "image": _data_uri(candidate.image),
            "caption": candidate.caption,
            "added": float(result.scores.added_nats[row]),
            "kept": bool(result.selection.kept[row]),
        }

    sample = result.candidates[rows[0]].sample
    return {"label": sample.label, "tweet": marked_html(sample), "links": [link(row) for row in rows]}


def _latency_rows(bench: BenchReport) -> list[LatencyRow]:
    rows = []
    for cell in bench.cells:
        eager, runtime = cell.sides[0].timing, cell.sides[-1]
        if eager is None or runtime.timing is None or runtime.ratio is None:
            continue
        rows.append(
            LatencyRow(
                name=cell.title,
                batch=cell.batch_size,
                torch_ms=eager.median_ms,
                torch_quartiles_ms=(eager.p25_ms, eager.p75_ms),
                ort_ms=runtime.timing.median_ms,
                ort_quartiles_ms=(runtime.timing.p25_ms, runtime.timing.p75_ms),
                ratio=runtime.ratio.median,
                ratio_low=runtime.ratio.low,
                ratio_high=runtime.ratio.high,
            )
        )
    return rows


def write_demo_report(result: DemoResult, path: Path) -> None:
    """Write the page: every image and figure stands inside it.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "bench")
    source = resources.files("mi2rage_benchmarks").joinpath("templates/demo.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    scores, kept = result.scores, result.selection.kept
    links = np.array([candidate.provenance.link for candidate in result.candidates])
    latency = _latency_rows(result.bench)
    mi2rage = next(student for student in result.students if student.name == "MI2RAGE")
    run = result.standalone
    page = template.render(
        config=result.config,
        total_seconds=sum(result.seconds.values()),
        candidates=len(result.candidates),
        kept=int(kept.sum()),
        mi2rage_f1=100 * mi2rage.metrics.f1,
        parity=result.manifest.checks,
        torch_loaded=run.torch_loaded,
        students=result.students,
        chains=_chains(result),
        entropy=scores.label_entropy_nats,
        bound=scores.bound_nats,
        text_bound=scores.real_bound_nats,
        standalone=run,
        pictures=[
            {"image": _data_uri(file.read_bytes()), "prompt": prompt, "caption": caption}
            for file, prompt, caption in zip(run.images, run.prompts, run.captions, strict=True)
        ],
        latency=latency,
        seconds=result.seconds,
        environment=result.bench.environment,
        figures={
            "f1": f1_figure(result.students),
            "scores": scores_figure(scores.added_nats, kept),
            "links": links_figure(links, kept, result.cue_rates),
            "latency": latency_figure(latency),
        },
    )
    with atomic_text(path) as file:
        file.write(page)
