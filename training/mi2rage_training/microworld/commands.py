"""The commands `world` and `pretrain`: thin shells over one library call each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pretrain", "world"]


def world(
    out: Annotated[Path, typer.Argument(help="Folder to write the labelled world to.")],
    seed: Annotated[int, typer.Option(help="The same seed and counts give the same bytes.")] = 0,
    train: Annotated[int, typer.Option(help="Training rows.")] = 900,
    validation: Annotated[int, typer.Option(help="Validation rows.")] = 300,
    test: Annotated[int, typer.Option(help="Test rows.")] = 600,
    gallery: Annotated[Path | None, typer.Option(help="Also write a page of samples to this HTML file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Draw a labelled micro-world: small scenes, tweets, relations that only both together tell."""
    import json

    from mi2rage_rt.progress import steps
    from mi2rage_training.microworld import build_world, write_gallery

    with steps("rows", train + validation + test) as bar:
        summary = build_world(
            out,
            seed=seed,
            train=train,
            validation=validation,
            test=test,
            force=force,
            progress=lambda _done, _all: bar.advance(),
        )
    if gallery is not None:
        write_gallery(out, gallery)
    if as_json:
        described = {"folder": str(out), "seed": seed, "splits": summary.splits, "labels": summary.labels}
        typer.echo(json.dumps(described | {"gallery": str(gallery) if gallery else None}))
        return
    typer.echo(f"{out}: " + ", ".join(f"{count} {split}" for split, count in summary.splits.items()) + " rows")
    for label, count in summary.labels.items():
        typer.echo(f"  {count:6d}  {label}")
    if gallery is not None:
        typer.echo(f"samples to look at: {gallery}")


def pretrain(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the models to.")] = None,
    seed: Annotated[int, typer.Option(help="Keys the corpus, the weights and every draw.")] = 0,
    scale: Annotated[float, typer.Option(help="Times the steps of the full pretraining.")] = 1.0,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the models once they are made.")] = False,
    measure_only: Annotated[
        Path | None, typer.Option(help="Only measure the models in this folder; makes nothing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Make the embedded generator, captioner and encoders from nothing, or measure such a folder."""
    import json

    from mi2rage_engines.errors import InputError, require
    from mi2rage_training.microworld import models_folder

    if (out is None) == (measure_only is None):
        raise InputError(
            f"pretrain got {'neither' if out is None else 'both'} --out and --measure-only; expected one of them: "
            f"--out DIR makes models, --measure-only {models_folder()} measures the embedded ones"
        )
    for package in ("torch", "transformers", "diffusers"):
        require(package, "train")
    from mi2rage_training import pretrain as library

    if out is None:
        assert measure_only is not None
        typer.echo(json.dumps(library.measure_models(measure_only, seed=seed), indent=None if as_json else 1))
        return
    summary = library.pretrain(out, seed=seed, scale=scale, measure=measure, force=force)
    described = {
        "folder": str(out),
        "seed": seed,
        "seconds": summary.seconds,
        "size_bytes": summary.size_bytes,
        "measured": summary.measured,
    }
    if as_json:
        typer.echo(json.dumps(described))
        return
    typer.echo(f"{out}: {summary.size_bytes / 1e6:.1f} MB of models in {summary.seconds:.0f} s")
    if summary.measured is not None:
        typer.echo(json.dumps(summary.measured, indent=1))
