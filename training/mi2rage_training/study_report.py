"""A study as numbers (`study.json`), as text (`study.md`), and as one self-contained page (`report.html`)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import require
from mi2rage_rt.files import atomic_bytes, atomic_text
from mi2rage_training import statistics
from mi2rage_training.metrics import relation_metrics
from mi2rage_training.statistics import PairedDifference
from mi2rage_training.study_figures import (
    DotRow,
    Drawing,
    ForestRow,
    Verdict,
    diagnostic_figure,
    differences_figure,
    f1_figure,
)
from mi2rage_training.study_results import DIRECT, CellResult, CellSpec, Comparison, Setting, StudyResult

__all__ = ["SETTING_TITLES", "study_numbers", "write_study_report"]

SETTING_TITLES: dict[Setting, str] = {"text": "text given, images made", "image": "images given, texts made"}

PAPER_GAINS: dict[Setting, float] = {"text": 26.42, "image": 24.06}
"""F1 points over direct training on synthetic images and texts, as the MI2RAGE paper states them for MNRE-2."""

_Runs = dict[int, CellResult]


def _runs(result: StudyResult, setting: Setting, cell: str) -> _Runs:
    return {run.seed: run for run in result.results if (run.setting, run.cell) == (setting, cell)}


def _common(*cells: _Runs) -> list[_Runs]:
    """The runs of the seeds that all cells have."""
    seeds = set(cells[0]).intersection(*cells[1:])
    return [{seed: runs[seed] for seed in sorted(seeds)} for runs in cells]


def _verdict(difference: PairedDifference) -> Verdict:
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < 0 else "not shown"


def _difference(better: _Runs, worse: _Runs) -> dict[str, Any] | None:
    better, worse = _common(better, worse)
    if not better:
        return None
    found = statistics.paired_bootstrap(better, worse)
    described = dataclasses.asdict(found) | {"verdict": _verdict(found), "seeds": list(found.by_seed)}
    return described | {"by_seed": list(found.by_seed.values())}


def _share(method: _Runs, direct: _Runs, real: _Runs) -> dict[str, float] | None:
    method, direct, real = _common(method, direct, real)
    share = statistics.share_of_gap_closed(method, direct, real) if method else None
    return None if share is None else dataclasses.asdict(share)


def _row(result: StudyResult, setting: Setting, cell: CellSpec, upper: str | None) -> dict[str, Any]:
    runs = _runs(result, setting, cell.name)
    by_seed = []
    for seed in sorted(runs):
        run = runs[seed]
        scores = relation_metrics(run.gold, run.predicted)
        kept = run.model_dump(include={"seed", "pairs", "best_epoch", "seconds", "measures"})
        found = {name: getattr(scores, name) for name in ("f1", "precision", "recall", "accuracy", "rows")}
        by_seed.append(kept | found)
    direct = _runs(result, setting, DIRECT)
    compared = bool(runs) and cell.name != DIRECT
    shared = compared and upper is not None and cell.group in ("control", "method")
    means = {
        name: dataclasses.asdict(statistics.summary([seed[name] for seed in by_seed])) if by_seed else None
        for name in ("f1", "precision", "recall", "pairs")
    }
    return cell.model_dump() | means | {
        "versus_direct": _difference(runs, direct) if compared else None,
        "share_of_gap": _share(runs, direct, _runs(result, setting, upper)) if shared and upper else None,
        "by_seed": by_seed,
    }  # fmt: skip


def _answer(difference: Mapping[str, Any] | None, planned: int) -> str:
    """The comparison's answer in plain words, in points of F1."""
    if difference is None:
        return "not answered: no seed has both"
    low, high = difference["low"], difference["high"]
    if difference["verdict"] == "no":
        said = f"no: worse by {_points(-difference['mean'])} ({_points(-high)} to {_points(-low)})"
    else:
        said = "yes: " if difference["verdict"] == "yes" else "no difference shown: "
        said += f"{_signed(difference['mean'])} ({_points(low)} to {_points(high)})"
    count, interval = len(difference["seeds"]), difference["t_interval"]
    if count < planned:
        said += f"; {count} of {planned} seeds"
    if count == 1:
        return said + "; one seed, so the interval knows test rows only"
    if difference["verdict"] != "not shown" and interval[0] <= 0 <= interval[1]:
        said += f"; over the seeds alone, {_points(interval[0])} to {_points(interval[1])}, it reaches 0"
    return said


def _question(result: StudyResult, comparison: Comparison) -> dict[str, Any]:
    runs = [_runs(result, comparison.setting, name) for name in (comparison.better, comparison.worse)]
    difference = _difference(*runs)
    answer = _answer(difference, len(result.seeds))
    return comparison.model_dump() | {"difference": difference, "answer": answer}


def _setting_numbers(result: StudyResult, setting: Setting) -> dict[str, Any]:
    uppers = [cell.name for cell in result.cells if cell.group == "upper"]
    upper = uppers[0] if uppers else None
    full = [cell.name for cell in result.cells if cell.group == "method" and _runs(result, setting, cell.name)]
    method = _runs(result, setting, full[-1]) if full else {}
    titles = {cell.name: cell.title for cell in result.cells}
    return {
        "title": SETTING_TITLES[setting],
        "rows": [_row(result, setting, cell, upper) for cell in result.cells],
        "comparisons": [_question(result, asked) for asked in result.comparisons if asked.setting == setting],
        "diagnostics": [table.model_dump() for table in result.diagnostics if table.setting == setting],
        "paper": {
            "method": titles[full[-1]] if full else None,
            "paper_gain_points": PAPER_GAINS[setting],
            "versus_direct": _difference(method, _runs(result, setting, DIRECT)),
            "versus_real": _difference(method, _runs(result, setting, upper)) if upper else None,
        },
    }


def study_numbers(result: StudyResult) -> dict[str, Any]:
    """All that the report shows, F1 and its like in 0 to 1; only settings that have results.

    Raises:
        ValueError: runs of the same setting and seed have different gold labels.
    """
    present = [setting for setting in SETTING_TITLES if any(run.setting == setting for run in result.results)]
    described = result.model_dump(exclude={"cells", "results", "comparisons", "diagnostics"})
    return described | {"settings_found": {setting: _setting_numbers(result, setting) for setting in present}}


def _points(value: float) -> str:
    return f"{100 * value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-0.0", "+0.0").replace("-", "−")


def _interval(pair: tuple[float, float]) -> tuple[float, float]:
    return 100 * pair[0], 100 * pair[1]


def _partly(count: int, planned: int) -> str:
    return f" ({count} of {planned})" if count < planned else ""


def _drawings(result: StudyResult, numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each setting: `f1`, `differences` (None where nothing was asked), `diagnostics`."""
    return {setting: _setting_drawings(result, setting, found) for setting, found in numbers.items()}


def _setting_drawings(result: StudyResult, setting: str, found: Mapping[str, Any]) -> dict[str, Any]:
    dots = [
        DotRow(
            title=row["title"] + _partly(len(row["by_seed"]), len(result.seeds)),
            group=row["group"],
            values=tuple(100 * seed["f1"] for seed in row["by_seed"]),
            mean=100 * row["f1"]["mean"],
            interval=_interval(row["f1"]["t_interval"]) if row["f1"]["t_interval"] else None,
        )
        for row in found["rows"]
        if row["by_seed"]
    ]
    means = {row["name"]: 100 * row["f1"]["mean"] for row in found["rows"] if row["by_seed"]}
    forest = [
        ForestRow(
            question=asked["question"],
            mean=100 * asked["difference"]["mean"],
            interval=_interval((asked["difference"]["low"], asked["difference"]["high"])),
            t_interval=_interval(asked["difference"]["t_interval"]) if asked["difference"]["t_interval"] else None,
            verdict=asked["difference"]["verdict"],
        )
        for asked in found["comparisons"]
        if asked["difference"]
    ]
    tables = [table for table in result.diagnostics if table.setting == setting]
    return {
        "f1": f1_figure(f"f1_{setting}", found["title"], dots, means.get(DIRECT)),
        "differences": differences_figure(f"differences_{setting}", found["title"], forest) if forest else None,
        "diagnostics": [
            diagnostic_figure(f"diagnostic_{setting}_{index}_{re.sub('[^A-Za-z0-9]+', '-', table.name)}", table)
            for index, table in enumerate(tables, start=1)
        ],
    }


def _render(name: str, **context: Any) -> str:
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mi2rage_training"),
        autoescape=lambda template: template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        points=_points,
        signed=_signed,
        percent=lambda share: f"{100 * share:.0f}".replace("-0", "0").replace("-", "−"),
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
        plain=lambda setting: setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False),
        value=lambda number: "–" if number is None else f"{number:.3g}".replace("-", "−"),
    )
    return str(environment.get_template(name).render(**context))


def _json_text(numbers: Mapping[str, Any], result: StudyResult) -> str:
    """The numbers indented; the runs with their predictions one a line, or a study would be a million lines."""
    runs = ",\n".join("    " + json.dumps(run.model_dump(), ensure_ascii=False) for run in result.results)
    head = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    return f'{head[:-2]},\n  "results": [\n{runs}\n  ]\n}}\n'


def write_study_report(result: StudyResult, folder: Path) -> dict[str, Any]:
    """Write `study.json`, `study.md`, `report.html` and `figures/*.png`; the same result gives the same bytes.

    Runs that are missing are said to be; differences are taken over the seeds that both sides have.

    Returns:
        What stands in `study.json`, less the runs' predictions.

    Raises:
        ValueError: there are no results, or runs of one setting and seed have different gold labels.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if not result.results:
        raise ValueError(f"study {result.recipe}: no results; expected at least one run")
    numbers = study_numbers(result)
    drawings = _drawings(result, numbers["settings_found"])
    drawn: list[Drawing] = []
    for figures in drawings.values():
        drawn += [figure for figure in (figures["f1"], figures["differences"], *figures["diagnostics"]) if figure]
    for figure in drawn:
        atomic_bytes(folder / "figures" / f"{figure.name}.png", figure.png)
    titles = {cell.name: cell.title for cell in result.cells}
    texts = {
        "report.html": _render("study.html.j2", study=numbers, drawings=drawings, titles=titles),
        "study.md": _render("study.md.j2", study=numbers),
        "study.json": _json_text(numbers, result),
    }
    for name, text in texts.items():
        with atomic_text(folder / name) as file:
            file.write(text)
    return numbers
