"""`bench --brief`, and that the README's tables are what it prints of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mi2rage_benchmarks.bench_markdown import brief
from mi2rage_benchmarks.report import EAGER, read_report
from tests.benchmarks.made_reports import RUNTIME, SIDES, WORKS, made_report

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"`mi2rage-rt bench --report (?P<file>\S+) --brief`[^|]*?\n\n(?P<table>(?:\|.*\n)+)")


def test_brief_is_a_row_a_call_and_a_column_a_side() -> None:
    report = made_report()
    title, rule, *rows = brief(report).splitlines()
    assert [cell.strip() for cell in title.strip("|").split("|")] == ["call", "batch", "eager ms", *list(SIDES)[1:]]
    assert EAGER not in title and set(rule) <= set("|-: ")
    assert len(rows) == 2 * len(WORKS)
    first = next(side for side in report.cells[0].sides if side.name == RUNTIME)
    assert first.ratio is not None and f"{first.ratio.median:.2f} (" in rows[0]


def test_the_tables_in_the_readme_are_of_the_committed_reports() -> None:
    shown = list(SHOWN.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    if not shown:
        pytest.fail("the README shows no table of 'bench --report FILE --brief'")
    for match in shown:
        assert match["table"].strip() == brief(read_report(ROOT / match["file"])), match["file"]
