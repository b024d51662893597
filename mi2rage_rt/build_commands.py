"""The command `build`. Heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mi2rage_engines.plan import PlanRecord

__all__ = ["build"]


def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute capability to build for, e.g. sm89, or 'this' for the GPU that is here (the default); "
            "repeatable; sm80+sm89 puts both into one plan."
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="tensorrt, or tensorrt-rtx, which builds ahead of time and needs no GPU.")
    ] = None,
    graph: Annotated[
        list[str] | None, typer.Option(help="Graph to build, e.g. unet; repeatable; by default all.")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Ranges of dynamic axes, e.g. batch=1:4:16,height=64; repeatable, one profile each; by default the "
            "graphs' own."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of built plans; by default $MI2RAGE_CACHE, or in the user's cache.")
    ] = None,
    cache_limit: Annotated[str, typer.Option(help="Size that the cache is kept to.")] = "20GB",
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 gives the fastest plan; TensorRT only.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Most scratch memory that a kernel may ask for, e.g. 2GB.")
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let fp32 graphs compute in TF32: faster, and three digits less exact.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace plans that are there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Build TensorRT plans for a bundle's graphs, each attested and recorded."""
    from mi2rage_engines.plan_cache import bytes_from_text
    from mi2rage_rt.build import BuildSettings, build_bundle
    from mi2rage_rt.console import write_json, write_table

    settings = BuildSettings(
        targets=tuple(target or ("this",)),
        backend=backend,
        graphs=tuple(graph or ()),
        profiles=tuple(profile or ()),
        cache=cache,
        cache_limit_bytes=bytes_from_text(cache_limit),
        optimization_level=optimization_level,
        workspace_bytes=None if workspace is None else bytes_from_text(workspace),
        tf32=tf32,
        force=force,
    )
    results = build_bundle(bundle, settings)
    if as_json:
        rows = [
            {"path": str(r.path), "target": r.target, "how": r.how, "record": r.record.model_dump(mode="json")}
            for r in results
        ]
        write_json({"bundle": str(bundle), "plans": rows})
        return
    columns = ("graph", "target", "", "MB", "seconds", "precision", "plan")
    write_table(columns, [_row(result.record, result.target, result.how, result.path) for result in results], 120)


def _row(record: PlanRecord, target: str, how: str, path: Path) -> tuple[str, ...]:
    attestation = record.attestation
    precision = f"{attestation.share:.0%} {attestation.asked} ({attestation.source})"
    megabytes = f"{record.plan_bytes / 1e6:.1f}"
    return (record.graph, target, how, megabytes, f"{record.build_seconds:.1f}", precision, str(path))
