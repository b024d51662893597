"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder.")],
    generator: Annotated[
        str | None, typer.Option(help="Stable Diffusion folder, hub id, or embedded.", metavar="MODEL")
    ] = None,
    captioner: Annotated[str | None, typer.Option(help="BLIP folder, hub id, or embedded.", metavar="MODEL")] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a classifier, from 'mi2rage-rt train'.", metavar="FOLDER")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Sampler in place of the generator's own: ddim, euler, euler-ancestral, lcm.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs of the parity checks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest on stdout.")] = False,
) -> None:
    """Export models to ONNX, checked against PyTorch, as one bundle."""
    from mi2rage_engines.errors import require

    require("torch", "export")
    from mi2rage_export.bundle_writer import export_bundle

    manifest = export_bundle(
        out,
        generator=generator,
        captioner=captioner,
        classifier=classifier,
        scheduler=scheduler,
        force=force,
        seed=seed,
    )
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    size = sum(record.bytes for record in manifest.files.values())
    typer.echo(f"{out}: {len(manifest.files)} files, {size / 1e6:.1f} MB, {manifest.precision}")
    for record in manifest.parity:
        typer.echo(f"  {record.subject:<24} {record.measure} {record.value:.2g} (bound {record.threshold:.2g})")
