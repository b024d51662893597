"""The README's table of the study says what the committed report says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mi2rage_training.study_recipe import read_recipe

ROOT = Path(__file__).parents[2]
SETTINGS = ("Text given, images made", "Images given, texts made")


def table_after(text: str, mark: str) -> list[list[str]]:
    """The rows, without head and rule, of the first table behind `mark`."""
    found = re.search(r"(?:^\|.*\n)+", text[text.index(mark) :], re.MULTILINE)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()[2:]]


def test_the_readmes_table_is_the_reports() -> None:
    readme = table_after((ROOT / "README.md").read_text(encoding="utf-8"), "training/results/study-micro.md")
    report = (ROOT / "training" / "results" / "study-micro.md").read_text(encoding="utf-8")
    settings = [table_after(report, f"## {setting}") for setting in SETTINGS]
    names = [[row[0] for row in rows] for rows in settings]
    assert names[0] == names[1] == [row[0] for row in readme]
    for row, *both in zip(readme, *settings, strict=True):
        assert row[1:] == [both[0][3], both[0][4], both[1][3], both[1][4]], row[0]


def test_the_report_is_of_the_recipe_as_it_is() -> None:
    report = (ROOT / "training" / "results" / "study-micro.md").read_text(encoding="utf-8").splitlines()
    assert re.match(r"Recipe `micro`, seeds 0, 1, 2, 3, 4.*: `mi2rage-rt study --recipe micro[ `]", report[2])
    for name, setting in read_recipe("micro").model_dump(mode="json").items():
        said = setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)
        assert f"- {name}: {said}" in report
