"""The study's report from made-up runs: whole, self-contained, the same twice, and plain about what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mi2rage_training.metrics import relation_metrics
from mi2rage_training.statistics import paired_bootstrap
from mi2rage_training.study_report import study_numbers, write_study_report
from mi2rage_training.study_results import CellResult, Diagnostic, StudyResult
from tests.training.study_fakes import CELLS, made_up_study


@pytest.fixture(scope="module")
def study() -> StudyResult:
    return made_up_study()


@pytest.fixture(scope="module")
def folder(study: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    write_study_report(study, out)
    return out


def _row(numbers: dict[str, Any], cell: str, setting: str = "text") -> dict[str, Any]:
    return next(row for row in numbers["settings_found"][setting]["rows"] if row["name"] == cell)


def _only(study: StudyResult, keep: Any, **changes: Any) -> StudyResult:
    described = study.model_dump() | {"results": [run.model_dump() for run in study.results if keep(run)]}
    return StudyResult.model_validate(described | changes)


def test_numbers_are_those_of_the_metric_and_the_bootstrap(study: StudyResult) -> None:
    numbers = study_numbers(study)
    full = {run.seed: run for run in study.results if (run.setting, run.cell) == ("text", "full")}
    direct = {run.seed: run for run in study.results if (run.setting, run.cell) == ("text", "direct")}
    row = _row(numbers, "full")
    assert [seed["f1"] for seed in row["by_seed"]] == [relation_metrics(r.gold, r.predicted).f1 for r in full.values()]
    assert row["by_seed"][0]["measures"] == {"kept_share": 1 / 3}
    assert row["versus_direct"]["low"] == paired_bootstrap(full, direct).low
    assert row["share_of_gap"] is not None
    assert _row(numbers, "direct")["versus_direct"] is None
    assert numbers["settings_found"]["text"]["paper"]["method"] == CELLS["full"][0]


def test_the_json_holds_the_numbers_and_every_prediction(study: StudyResult, folder: Path) -> None:
    kept = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    runs = kept.pop("results")
    assert [CellResult.model_validate(run) for run in runs] == study.results
    assert kept == json.loads(json.dumps(study_numbers(study)))


def test_the_page_is_whole_and_self_contained(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    elsewhere = (
        page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    )
    assert "http://" not in elsewhere
    assert "https://" not in elsewhere
    assert page.count("<svg") == 8
    assert "what &lt;this&gt; row is" in page
    assert "no reproduction of the paper" in page
    assert page.rstrip().endswith("</html>")


def test_figures_take_the_colours_of_the_page(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    figures = page[page.index("<svg") :]
    assert "var(--green)" in figures
    assert "#1a7f4b" not in figures
    ids = [part.split('"', 1)[0] for part in page.split(' id="')[1:]]
    assert len({mark for mark in ids if "-axes_" in mark}) == 8
    assert {file.name for file in (folder / "figures").iterdir()} == {
        f"{name}.png"
        for setting in ("text", "image")
        for name in (
            f"f1_{setting}",
            f"differences_{setting}",
            f"diagnostic_{setting}_1_cue-rate",
            f"diagnostic_{setting}_2_calibration",
        )
    }


def test_the_same_result_gives_the_same_bytes(study: StudyResult, folder: Path, tmp_path: Path) -> None:
    write_study_report(study, tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_the_text_has_every_row_and_a_plain_answer(folder: Path) -> None:
    text = (folder / "study.md").read_text(encoding="utf-8")
    for title, *_ in CELLS.values():
        assert text.count(f"| {title} | 3 of 3 |") == 2
    assert "- Does the full method beat direct training? **" in text
    assert "| chain | – | 62 | 41 |" in text
    assert "26.42" in text
    assert "24.06" in text


def test_answers_say_yes_no_and_not_shown() -> None:
    study = made_up_study(rows=300)
    cells = [("real", "direct"), ("direct", "real"), ("direct", "direct")]
    asked = [{"setting": "text", "better": a, "worse": b, "question": "?"} for a, b in cells]
    answers = [
        found["answer"]
        for found in study_numbers(_only(study, lambda _: True, comparisons=asked))["settings_found"]["text"][
            "comparisons"
        ]
    ]
    assert answers[0].startswith("yes: +")
    assert answers[1].startswith("no: worse by ")
    assert answers[1].removeprefix("no: worse by ") == answers[0].removeprefix("yes: +")
    assert answers[2] == "no difference shown: +0.0 (0.0 to 0.0)"


def test_missing_runs_are_said_to_be(study: StudyResult, tmp_path: Path) -> None:
    def keep(run: CellResult) -> bool:
        lost = run.cell == "chain" or (run.cell == "full" and run.seed > 1) or (run.cell == "random" and run.seed != 1)
        return run.setting == "text" and not lost

    numbers = write_study_report(_only(study, keep), tmp_path)
    assert list(numbers["settings_found"]) == ["text"]
    assert _row(numbers, "full")["f1"]["count"] == 2
    assert _row(numbers, "full")["versus_direct"]["seeds"] == [0, 1]
    assert _row(numbers, "chain")["f1"] is None
    answers = [found["answer"] for found in numbers["settings_found"]["text"]["comparisons"]]
    assert "; 2 of 3 seeds" in answers[0]
    assert answers[1] == "not answered: no seed has both"
    assert answers[2].endswith("; 1 of 3 seeds; one seed, so the interval knows test rows only")
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "| chain of six | 0 of 3 |  | not run | | |" in text
    assert "not run" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_study_without_direct_upper_or_questions_is_reported(study: StudyResult, tmp_path: Path) -> None:
    cells = [cell.model_dump() for cell in study.cells if cell.name == "chain"]
    bare = _only(study, lambda run: run.cell == "chain", cells=cells, comparisons=[], diagnostics=[])
    numbers = write_study_report(bare, tmp_path)
    assert _row(numbers, "chain")["versus_direct"] is None
    assert "The questions" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_study_without_results_is_refused(study: StudyResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        write_study_report(_only(study, lambda _: False), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "results of seeds"),
        ({"cells": []}, "unknown cells"),
        ({"colour": "blue"}, "Extra inputs"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(study: StudyResult, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudyResult.model_validate(study.model_dump() | change)


def test_uneven_rows_are_refused(study: StudyResult) -> None:
    with pytest.raises(ValidationError, match="1 values for 2 columns"):
        Diagnostic(setting="text", name="d", title="d", unit="%", columns=["a", "b"], rows={"x": [1.0]})
    with pytest.raises(ValidationError, match="two results"):
        StudyResult.model_validate(study.model_dump() | {"results": [study.results[0].model_dump()] * 2})
    with pytest.raises(ValidationError, match="gold and 0 predicted"):
        CellResult.model_validate(study.results[0].model_dump() | {"predicted": []})
