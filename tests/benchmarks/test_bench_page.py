"""The bench's page from a made-up report: self-contained, escaped, every part where it belongs."""

from __future__ import annotations

import re

import pytest

from mi2rage_benchmarks.bench_figures import colours_of, roofline_figure, stages_figure, throughput_figure
from mi2rage_benchmarks.bench_markdown import short, told
from mi2rage_benchmarks.bench_page import write_bench_page
from mi2rage_benchmarks.compare import compared
from mi2rage_benchmarks.ratios import Ratio
from mi2rage_benchmarks.report import EAGER
from tests.benchmarks.made_reports import RUNTIME, SIDES, made_report


@pytest.fixture(scope="module")
def report():
    return made_report()


def test_the_page_holds_all_that_it_shows(report, tmp_path):
    failed = report.cells[0].model_copy(update={"sides": (), "failed": "killed <by> SIGKILL"})
    noted = report.cells[1].conditions.model_copy(update={"notes": ("other processes kept 1.0 cores busy",)})
    cells = (failed, report.cells[1].model_copy(update={"conditions": noted}), *report.cells[2:])
    report = report.model_copy(update={"cells": cells, "title": "A & B"})
    slower = compared(made_report(), made_report(seed=1, slower={RUNTIME: 1.3}), 0.05)
    write_bench_page(report, tmp_path / "page.html", slower)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert not re.search(r"<(script|link|img)|src=|url\(http", page)
    assert "<h1>A &amp; B</h1>" in page
    assert "text encoder, batch 1: killed &lt;by&gt; SIGKILL" in page
    assert "text encoder, batch 8: other processes kept 1.0 cores busy" in page
    assert page.count(">regression<") == 8
    for name in (*SIDES, "generation, 4 steps", "made up", "160.0 GFLOP/s", "mi2rage-rt bench bundle --recipe micro"):
        assert name in page


def test_what_was_not_measured_has_no_figure(report, tmp_path):
    single = report.model_copy(update={"cells": report.cells[:1], "copy_gbps": 0.0})
    assert throughput_figure(single) is None
    assert roofline_figure(single) is None
    assert stages_figure(single) is None
    write_bench_page(single, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "Against an older report" not in page


def test_a_side_has_one_colour_and_figures_are_the_same_twice(report):
    colours = colours_of(report)
    assert list(colours) == list(SIDES)
    assert len(set(colours.values())) == len(SIDES)
    assert colours[EAGER] == "#a8afbb"
    assert throughput_figure(report) == throughput_figure(report)


def test_figures_have_three_digits_and_no_exponent():
    assert [short(value) for value in (0.01234, 4.567, 99.95, 1264.0, 0.0)] == ["0.0123", "4.57", "100", "1,260", "0"]


def test_a_verdict_says_how_well_it_is_known():
    def words(median, low, high):
        return told(Ratio.model_validate({"median": median, "low": low, "high": high, "windows": 7}))

    assert words(1.0, 0.99, 1.01) == "no difference to 1.0%"
    assert words(1.0, 0.5, 2.0) == "no difference found, known only to 100.0%"
    assert (words(2.0, 1.9, 2.1), words(2.0, None, None)) == ("faster", "not known: 7 windows")
