"""The recipe of a bench: bundles, what they are to do, and how long; a TOML file."""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mi2rage_benchmarks.baselines import TorchPrecision
from mi2rage_benchmarks.bench import BenchRequest, run_bench
from mi2rage_benchmarks.report import BenchCell, BenchReport
from mi2rage_engines.errors import InputError, Mi2rageError
from mi2rage_engines.validation import first_problem

logger = logging.getLogger(__name__)

__all__ = ["BenchRecipe", "PartRecipe", "read_recipe", "recipe_names", "run_recipe"]

_FOLDER = Path(__file__).parent / "recipes"


class PartRecipe(BaseModel):
    """One bundle and its request; see `BenchRequest`, whose own values stand for what is None.

    Attributes:
        name: what its cells are told apart by.
        bundle, also: relative to the folder that the run is told.
        made_by: the commands that make them, for whoever has not got them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bundle: Path
    also: tuple[Path, ...] = ()
    made_by: str = ""
    generator: str | None = None
    captioner: str | None = None
    classifier: str | None = None
    random_weights: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    device: str | None = None
    precision: TorchPrecision | None = None
    subjects: tuple[str, ...] | None = None
    compile: bool | None = None
    batch_sizes: tuple[int, ...] | None = None
    steps: int | None = None
    feature_cache: int | None = None
    tokens: int | None = None
    texts: int | None = None
    links: int | None = None
    repeats: int | None = None
    budget_seconds: float | None = None
    again: bool | None = None
    memory: bool | None = None
    soak: int | None = None

    def request(self, folder: Path, changes: Mapping[str, Any]) -> BenchRequest:
        """What to ask of `run_bench`.

        Args:
            changes: fields of `BenchRequest` in place of the recipe's.

        Raises:
            InputError: a number is out of range.
        """
        own = self.model_dump(exclude={"name", "bundle", "made_by"}, exclude_none=True)
        own["also"] = tuple(folder / path for path in self.also)
        return BenchRequest(**{**own, **changes})


class BenchRecipe(BaseModel):
    """A report's title and its parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    parts: tuple[PartRecipe, ...]

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"parts are named {', '.join(names) or 'nothing'}; expected at least one, no two alike")
        return self


def recipe_names() -> list[str]:
    """The recipes in the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def read_recipe(name: str) -> BenchRecipe:
    """A recipe of the package by its name, or one's own by its file.

    Raises:
        InputError: there is no such recipe, or it is none; the message names the fault.
    """
    path = _FOLDER / f"{name}.toml" if name in recipe_names() else Path(name)
    try:
        return BenchRecipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"recipe {name!r}: not found; expected {', '.join(recipe_names())}, or a TOML file like them in {_FOLDER}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML ({error}); expected a recipe like those in {_FOLDER}") from error
    except ValidationError as error:
        raise InputError(
            f"{path}: {first_problem(error)}; expected the keys of {', '.join(recipe_names())} in {_FOLDER}"
        ) from error


def run_recipe(
    recipe: BenchRecipe,
    folder: Path,
    changes: Mapping[str, Any],
    *,
    bundle: Path | None = None,
    command: str | None = None,
) -> BenchReport:
    """Run a recipe's parts one after the other; a part that fails is a row that says why.

    Args:
        folder: that bundles are relative to.
        changes: fields of `BenchRequest`, in place of the recipe's in every part.
        bundle: in place of the only part's.
        command: what the report says it was made by.

    Raises:
        InputError: a bundle is missing, `bundle` is given and there are several parts, or a number is out of range.
    """
    start = time.monotonic()
    parts = [(part, part.request(folder, changes), folder / part.bundle) for part in recipe.parts]
    if bundle is not None:
        if len(parts) > 1:
            raise InputError(
                f"{bundle}: this recipe has a bundle for each of its {len(parts)} parts; leave BUNDLE out, and name "
                "the folder that they are in by --bundles"
            )
        parts = [(parts[0][0], parts[0][1], bundle)]
    for part, request, place in parts:
        for needed in (place, *request.also):
            if not needed.is_dir():
                raise InputError(f"{needed}: no such folder; expected a bundle; make it:\n{part.made_by.strip()}")
    reports = [_part(part, request, place, command) for part, request, place in parts]
    return _merged(reports, recipe.title, time.monotonic() - start)


def _part(part: PartRecipe, request: BenchRequest, bundle: Path, command: str | None) -> BenchReport:
    try:
        report = run_bench(bundle, request, command=command)
    except Mi2rageError as error:
        logger.warning("%s failed: %s", part.name, error)
        cell = BenchCell(
            subject=", ".join(part.subjects or ()) or "usual",
            title=part.name,
            kind="whole",
            batch_size=0,
            sizes={},
            items=0,
            flop=0,
            sides=(),
            failed=" ".join(str(error).split()),
        )
        report = BenchReport(cells=(cell,), environment={}, seed=request.seed, command=command)
    return report.model_copy(
        update={"cells": tuple(cell.model_copy(update={"part": part.name}) for cell in report.cells)}
    )


def _merged(reports: list[BenchReport], title: str, seconds: float) -> BenchReport:
    """One report of all; the environment is that of the first part that ran."""
    first = next((report for report in reports if report.environment), reports[0])
    return first.model_copy(
        update={
            "title": title,
            "cells": tuple(cell for report in reports for cell in report.cells),
            "memory": tuple(row for report in reports for row in report.memory),
            "soak": tuple(soak for report in reports for soak in report.soak),
            "gemm_gflops": max(report.gemm_gflops for report in reports),
            "copy_gbps": max(report.copy_gbps for report in reports),
            "isolated": any(report.isolated for report in reports),
            "seconds": seconds,
        }
    )
