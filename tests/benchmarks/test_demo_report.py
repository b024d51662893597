"""The demo's page from made-up results: self-contained, escaped, every number where it belongs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_benchmarks.demo import DemoConfig, DemoResult, Student, summary_from
from mi2rage_benchmarks.demo_report import marked_html, write_demo_report
from mi2rage_benchmarks.probes import Ratio, Timing
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, SideResult
from mi2rage_benchmarks.standalone import StandaloneRun
from mi2rage_engines.bundle import Manifest, ParityRecord
from mi2rage_engines.errors import InputError
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_training.metrics import relation_metrics
from mi2rage_training.selection import Selection
from mi2rage_training.store import StoreManifest
from mi2rage_training.teacher import TeacherScores
from tests.training.fakes import candidates

METRICS = relation_metrics(["a", "None", "a"], ["a", "None", "None"])


@pytest.fixture
def result(tmp_path: Path) -> DemoResult:
    image = encode_image(np.zeros((24, 24, 3), np.uint8))
    rows = tuple(
        dataclasses.replace(row, image=image, caption="a <b> & c" if row.provenance.link == 1 else None)
        for row in candidates(6, links=2)
    )
    (tmp_path / "0.png").write_bytes(image)
    added = np.linspace(-1, 1, len(rows))
    flat = np.ones(len(rows)), np.full((len(rows), 2), 0.5)
    scores = TeacherScores(added + 1, added, 1.25, *flat, ("None", "a"), (1.0,), 0.1, 0.1)
    timing = Timing.from_samples([1.0, 2.0, 3.0], [9.0], 1)
    ratio = Ratio(median=1.5, low=1.25, high=1.75, windows=6)
    cell = BenchCell(
        subject="classifier",
        title="classifier",
        kind="graph",
        batch_size=1,
        sizes={},
        items=1,
        flop=0,
        sides=(
            SideResult(name=EAGER, timing=timing),
            SideResult(name="ONNX Runtime fp32", timing=timing, ratio=ratio),
        ),
    )
    parity = ParityRecord(subject="classifier", measure="max_abs", value=1e-6, threshold=1e-4, passed=True, cases=3)
    manifest = Manifest(schema_version=2, source={}, tool_versions={}, parity=(parity,), files={})
    return DemoResult(
        config=DemoConfig(links=2),
        out=tmp_path,
        world=tmp_path,
        candidates=rows,
        selection=Selection(StoreManifest(schema_version=1, settings={}, rows=6, shards={}), scores, added > 0),
        students=tuple(Student(name, "why", 9, METRICS) for name in ("text only", "direct", "MI2RAGE", "real pairs")),
        manifest=manifest,
        standalone=StandaloneRun(METRICS, ("mi2rage-rt predict",), ("p",), (tmp_path / "0.png",), ("c",), frozenset()),
        bench=BenchReport(cells=(cell,), environment={"cpu": "test"}, seed=0),
        seconds={"one step": 1.0},
        cue_rates=(0.9, 0.5, 0.4),
    )


def test_the_page_is_whole_and_self_contained(result: DemoResult, tmp_path: Path) -> None:
    write_demo_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert 'src="data:image/png;base64,' in page
    assert page.count("<svg") == 4
    assert "a &lt;b&gt; &amp; c" in page
    assert "66.7" in page  # F1 of one hit, one miss
    assert "1.50× (1.25 – 1.75)" in page
    assert page.rstrip().endswith("</html>")


def test_the_same_result_gives_the_same_page(result: DemoResult, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_demo_report(result, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_summary_has_every_student(result: DemoResult) -> None:
    summary: dict[str, Any] = summary_from(result)
    assert list(summary["students"]) == ["text only", "direct", "MI2RAGE", "real pairs"]
    assert summary["standalone"]["torch_loaded"] is False
    assert summary["kept"] == 6


def test_sentences_are_escaped_and_marked() -> None:
    sample = Sample("x", ("<i>", "Ana", "&", "Bo"), Span(1, 2), Span(3, 4))
    assert marked_html(sample) == '&lt;i&gt; <mark>Ana</mark> &amp; <mark class="tail">Bo</mark>'


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    from mi2rage_benchmarks.demo import run_demo

    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="--force"):
        run_demo(tmp_path, DemoConfig())
    assert (tmp_path / "mine.txt").read_text() == "keep me"
