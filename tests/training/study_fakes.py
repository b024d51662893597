"""A made-up study: predictions drawn to a wished accuracy, with seeds and test rows in common."""

from collections.abc import Iterable

import numpy as np

from mi2rage_training.study_results import (
    CellResult,
    CellSpec,
    Comparison,
    Diagnostic,
    Group,
    Setting,
    StudyResult,
)

LABELS = ("None", "couple", "member_of", "place_of_birth")
CELLS: dict[str, tuple[str, Group, float, int]] = {  # name: title, group, share of rows that are right, pairs
    "given only": ("given modality only", "baseline", 0.70, 400),
    "direct": ("direct, one each", "baseline", 0.75, 400),
    "independent": ("six independent each", "control", 0.76, 2400),
    "independent, kept": ("six independent, teacher's best two", "control", 0.77, 800),
    "random": ("chain, two at random", "control", 0.73, 800),
    "chain": ("chain of six", "method", 0.73, 2400),
    "full": ("chain, teacher's best two", "method", 0.79, 800),
    "real": ("real pairs", "upper", 0.88, 400),
}
QUESTIONS = {
    "Does the full method beat direct training?": ("full", "direct"),
    "Does a chain beat as many independent samples?": ("chain", "independent"),
    "Does the teacher choose better than chance?": ("full", "random"),
}


def _runs(setting: Setting, rows: int, seed: int) -> Iterable[CellResult]:
    rng = np.random.default_rng([seed, len(setting)])
    gold = np.random.default_rng(len(setting)).choice(LABELS, rows, p=[0.4, 0.3, 0.2, 0.1])
    luck = rng.random(rows)
    for index, (name, (_, _, right, pairs)) in enumerate(CELLS.items()):
        own = np.where(rng.random(rows) < 0.3, rng.random(rows), luck)
        guess = np.where(own < right + rng.normal(0, 0.01), gold, rng.choice(LABELS, rows))
        yield CellResult(
            setting=setting, cell=name, seed=seed, pairs=pairs, best_epoch=index, seconds=9.5,
            gold=gold.tolist(), predicted=guess.tolist(), measures={"kept_share": 1 / 3} if name == "full" else {},
        )  # fmt: skip


def made_up_study(seeds: tuple[int, ...] = (0, 1, 2), rows: int = 120) -> StudyResult:
    """Eight rows, both settings, three questions and two diagnostics each."""
    settings: tuple[Setting, ...] = ("text", "image")
    links = [f"link {link}" for link in range(1, 7)]
    rates: dict[str, list[float | None]] = {
        "real samples": [93.0, None, None, None, None, None, None],
        "chain": [None, 62.0, 41.0, 33.0, 28.0, 25.0, 22.0],
        "chain, kept": [None, 74.0, 59.0, 52.5, 47.0, 44.0, 41.0],
    }
    return StudyResult(
        recipe="made-up",
        title="Does the chain with its teacher help?",
        command="mi2rage-rt study --recipe made-up --out study",
        seeds=list(seeds),
        cells=[
            CellSpec(name=name, title=title, explanation="what <this> row is", group=group)
            for name, (title, group, _, _) in CELLS.items()
        ],
        results=[run for setting in settings for seed in seeds for run in _runs(setting, rows, seed)],
        comparisons=[
            Comparison(setting=setting, better=better, worse=worse, question=question)
            for setting in settings
            for question, (better, worse) in QUESTIONS.items()
        ],
        diagnostics=[
            table
            for setting in settings
            for table in (
                Diagnostic(
                    setting=setting, name="cue rate", title="Samples that show the deciding object", unit="%",
                    columns=["real", *links], rows=rates,
                ),
                Diagnostic(
                    setting=setting, name="calibration", title="Calibration error of the teacher", unit="%",
                    columns=["before", "after"], rows={"text": [9.1, 3.2], "text and image": [11.0, 2.9]},
                ),
            )
        ],
        settings={"links": 6, "teacher": {"folds": 4}},
        environment={"python": "3.12", "torch": "2.9"},
        seconds=1234.5,
    )  # fmt: skip
