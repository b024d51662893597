"""What a data set costs: the figures of a measured piece, and what is planned and checked by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mi2rage_engines.errors import DataError
from mi2rage_engines.validation import first_problem

__all__ = ["Check", "CostFigures", "CostReport", "Energy", "Plan", "read_figures"]

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Energy(_Record):
    """Joules of a run by what was read, e.g. `GPU 0 (nvidia-smi)`; empty where nothing could be, with the reason."""

    joules: dict[str, float] = {}
    missing: str | None = None

    @property
    def total_j(self) -> float | None:
        """Of all that was read; None where nothing was."""
        return sum(self.joules.values()) if self.joules else None


class CostFigures(_Record):
    """What it took to make some candidates on one device.

    Attributes:
        origin: where the figures come from.
        device: that it ran on.
        chain: what was made: links, width, steps and whatever else the cost depends on.
        texts, candidates: real samples, and what was made of them, in all.
        load_s: for the models to load; None where that is not known.
        fill_s: that the first shards took beyond the pace of the others, while the stages were not all at work yet.
        shards_s, shards_candidates: of each shard that came after those, from the one before, and what it held.
        pauses: gaps between shards that were left out, since the run had stood still.
        stages_s: seconds that each stage was at work in all, side by side with the others; empty where not known.
        energy: of the whole run; None where it was not asked for.
    """

    schema_version: int = SCHEMA_VERSION
    origin: str
    device: str
    chain: dict[str, Any]
    texts: int = Field(ge=1)
    candidates: int = Field(ge=1)
    load_s: float | None = None
    fill_s: float = Field(ge=0)
    shards_s: tuple[float, ...] = Field(min_length=1)
    shards_candidates: tuple[int, ...] = Field(min_length=1)
    pauses: int = 0
    stages_s: dict[str, float] = {}
    energy: Energy | None = None
    environment: dict[str, str] = {}

    @property
    def candidate_s(self) -> float:
        """Seconds a candidate, once all stages are at work."""
        return sum(self.shards_s) / sum(self.shards_candidates)

    @property
    def candidate_j(self) -> float | None:
        """Joules a candidate; None where they were not measured."""
        total = None if self.energy is None else self.energy.total_j
        return None if total is None else total / self.candidates


class Plan(_Record):
    """Time and money for a data set; the low and high ends are those of a 95% interval.

    Attributes:
        samples: kept ones that are wanted; candidates: that have to be made for them.
        texts: real samples that so many candidates take with the chains of the figures.
        devices: like the one of the figures, which share the work evenly.
        price_per_hour: of a device; None where it was not told, and then there is no money.
        joules: of all candidates; None where they were not measured.
    """

    samples: int
    candidates: int
    texts: int
    devices: int
    price_per_hour: float | None
    hours: float
    hours_low: float | None
    hours_high: float | None
    device_hours: float
    money: float | None
    money_low: float | None
    money_high: float | None
    joules: float | None


class Check(_Record):
    """A larger piece than the figures are from, planned and then run.

    Attributes:
        off: measured over planned, less 1.
        within: whether it was inside the plan's interval; None where there is none.
    """

    texts: int
    candidates: int
    planned_s: float
    planned_low_s: float | None
    planned_high_s: float | None
    measured_s: float
    off: float
    within: bool | None


class CostReport(_Record):
    """All of it.

    Attributes:
        kept_share: of the candidates that selection keeps; kept_from: where that is known from.
        kept_per_hour: samples that one device's run ends up with an hour, loading and filling left out.
    """

    schema_version: int = SCHEMA_VERSION
    figures: CostFigures
    kept_share: float
    kept_from: str
    kept_per_hour: float
    joules_per_kept: float | None
    plan: Plan | None = None
    check: Check | None = None


def read_figures(path: Path) -> CostFigures:
    """The figures in a report that `cost --out` wrote, on this machine or another.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected what 'cost --out' wrote") from error
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error}); expected what 'cost --out' wrote; write it again") from error
    try:
        return CostReport.model_validate(document).figures
    except ValidationError as error:
        raise DataError(
            f"{path}: is no report of 'cost' ({first_problem(error)}); expected what 'cost --out' wrote; write it again"
        ) from error
