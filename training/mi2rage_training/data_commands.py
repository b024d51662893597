"""The command about data sets: check-data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["check_data"]


def check_data(
    train: Annotated[Path, typer.Argument(help="The training rows: JSONL, or MNRE rows.")],
    validation: Annotated[Path | None, typer.Option(help="The validation rows.")] = None,
    test: Annotated[Path | None, typer.Option(help="The test rows.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images; by default no file is looked at.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of refusing the file.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where there is a leak or an error.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds, fits and bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Look for leaks, contradictions, duplicates and faults in a data set before training on it."""
    from mi2rage_rt.console import write_json
    from mi2rage_training.data_check.check import CheckConfig, check_data_set
    from mi2rage_training.data_check.report import document_from, write_report

    report = check_data_set(CheckConfig(train, validation, test, images, skip_bad, seed))
    if as_json:
        write_json(document_from(report))
    else:
        write_report(report)
    if strict and not report.is_sound:
        raise typer.Exit(1)
