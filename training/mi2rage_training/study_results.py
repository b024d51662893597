"""What a study stores: its rows, every training run's predictions, the questions asked, and small diagnostic tables."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["DIRECT", "CellResult", "CellSpec", "Comparison", "Diagnostic", "Group", "Setting", "StudyResult"]

Setting = Literal["text", "image"]
"""The modality that is given; the other one is made."""

Group = Literal["baseline", "control", "method", "upper"]
"""The first row of group "upper" is the one with real pairs; the last row of group "method" is the full method."""

DIRECT = "direct"
"""The name of the cell that every other one is compared with: one made sample for each given one, nothing selected."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellSpec(_Record):
    """A row of the table."""

    name: str
    title: str
    explanation: str
    group: Group


class CellResult(_Record):
    """One training run: a cell in one setting with one seed, and its predictions on the test rows."""

    setting: Setting
    cell: str
    seed: int
    pairs: int
    """Training pairs seen."""
    best_epoch: int
    seconds: float
    gold: list[str]
    predicted: list[str]
    """Label names, one a test row, in the same order for every cell and seed of a setting."""
    measures: dict[str, float] = {}
    """Numbers beside the score, such as the kept share or the cue rate."""

    @model_validator(mode="after")
    def _rows_agree(self) -> Self:
        if len(self.gold) != len(self.predicted) or not self.gold:
            raise ValueError(
                f"{self.setting} {self.cell} seed {self.seed}: {len(self.gold)} gold and {len(self.predicted)} "
                "predicted labels; expected equally many, at least one"
            )
        return self


class Comparison(_Record):
    """A question answered by the difference in F1, better minus worse, of two cells."""

    setting: Setting
    better: str
    worse: str
    question: str


class Diagnostic(_Record):
    """A small table: a value, or None, for every row and column; the mean over seeds is already taken."""

    setting: Setting
    name: str
    title: str
    unit: str
    columns: list[str]
    rows: dict[str, list[float | None]]

    @model_validator(mode="after")
    def _rows_are_full(self) -> Self:
        for row, values in self.rows.items():
            if len(values) != len(self.columns):
                raise ValueError(
                    f"diagnostic {self.name}, row {row}: {len(values)} values for {len(self.columns)} columns"
                )
        return self


class StudyResult(_Record):
    """All that a study found, as `write_study_report` takes it."""

    schema_version: int = 1
    recipe: str
    title: str
    command: str
    seeds: list[int]
    cells: list[CellSpec]
    results: list[CellResult]
    comparisons: list[Comparison]
    diagnostics: list[Diagnostic]
    settings: dict[str, Any]
    environment: dict[str, str]
    seconds: float

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [cell.name for cell in self.cells]
        if len(set(names)) != len(names):
            raise ValueError(f"study {self.recipe}: cell names are not unique: {names}")
        used = {result.cell for result in self.results}
        used |= {name for comparison in self.comparisons for name in (comparison.better, comparison.worse)}
        if unknown := sorted(used - set(names)):
            raise ValueError(f"study {self.recipe}: unknown cells {unknown}; expected names out of {names}")
        runs = [(result.setting, result.cell, result.seed) for result in self.results]
        if len(set(runs)) != len(runs):
            raise ValueError(f"study {self.recipe}: a cell has two results for the same setting and seed")
        if unplanned := sorted({result.seed for result in self.results} - set(self.seeds)):
            raise ValueError(f"study {self.recipe}: results of seeds {unplanned}; expected seeds out of {self.seeds}")
        return self
