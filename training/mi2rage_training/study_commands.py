"""The command `study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["study"]


def study(
    recipe: Annotated[str, typer.Option(help="micro, micro-quick, mnre-text, mnre-image, or a TOML file.")] = "micro",
    out: Annotated[
        Path | None, typer.Option(help="Folder of everything; goes on where it stopped. Default: runs/study-RECIPE.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder that the recipe's files are in.")] = Path(),
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: KEY=VALUE, e.g. seeds=[0,1]; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; 0 is one for each core, or 1 where there is a GPU.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print study.json on stdout.")] = False,
) -> None:
    """Compare MI2RAGE with its baselines and controls, from one recipe, over several seeds; resumable."""
    import os
    import shlex
    import sys

    from mi2rage_training.devices import device_from
    from mi2rage_training.study_recipe import read_recipe
    from mi2rage_training.study_run import StudyConfig, run_study

    chosen = read_recipe(recipe, tuple(change or ()))
    place = device_from(device)
    folder = out or Path("runs") / f"study-{chosen.name}"
    workers = jobs or (1 if place != "cpu" else os.cpu_count() or 1)
    command = shlex.join(["mi2rage-rt", *sys.argv[1:]])
    run_study(chosen, StudyConfig(folder, data, place, workers, command))
    if as_json:
        typer.echo((folder / "study.json").read_text(encoding="utf-8"))
        return
    typer.echo((folder / "study.md").read_text(encoding="utf-8"))
    typer.echo(f"page: {folder / 'report.html'}")
