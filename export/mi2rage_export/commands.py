"""The commands `export` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mi2rage_rt.backend_option import BackendOption

if TYPE_CHECKING:
    from mi2rage_engines.bundle import ParityRecord

__all__ = ["export", "verify"]

_Images = Annotated[Path | None, typer.Option(help="Folder of the samples' images; by default the file's own.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")]


def export(
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder.")],
    generator: Annotated[
        str | None, typer.Option(help="Stable Diffusion folder, hub id, or embedded.", metavar="MODEL")
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="Captioner's folder, hub id, or embedded.", metavar="MODEL")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a classifier, from 'mi2rage-rt train'.", metavar="FOLDER")
    ] = None,
    random_weights: Annotated[
        list[str] | None,
        typer.Option(help="A real architecture with random weights, to measure with; repeatable.", metavar="NAME"),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Sampler in place of the generator's own: ddim, euler, euler-ancestral, lcm.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16, bf16, int8-weights, int8-dynamic or int8-qdq; for one graph or component as "
            "GRAPH=PRECISION; repeatable.",
            metavar="[GRAPH=]PRECISION",
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None, typer.Option(help="A part that stays in fp32; repeatable.", metavar="GRAPH=PART")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Samples that int8-qdq takes its scales from.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Samples to measure F1, captions and images on, before and after.")
    ] = None,
    images: _Images = None,
    limit: _Limit = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 25.")] = 20,
    preprocess_in_graph: Annotated[
        bool, typer.Option("--preprocess-in-graph", help="Resize the captioner's images in its graph.")
    ] = False,
    static_cache: Annotated[
        bool, typer.Option("--static-cache", help="Also write the captioner's decoder with a cache of fixed length.")
    ] = False,
    feature_cache: Annotated[
        bool, typer.Option("--feature-cache", help="Also write the generator's graphs for 'generate --feature-cache'.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights and of the inputs of the parity checks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest on stdout.")] = False,
) -> None:
    """Export models to ONNX, checked against PyTorch, as one bundle."""
    from mi2rage_engines.errors import require

    require("torch", "export")
    from mi2rage_export.bundle_writer import export_bundle
    from mi2rage_export.destination import destination
    from mi2rage_export.memory import naming_lack_of_memory
    from mi2rage_export.parity import FiguresError
    from mi2rage_export.request import ExportRequest, parts_from_options, precisions_from_options

    request = ExportRequest(
        generator=generator,
        captioner=captioner,
        classifier=classifier,
        random_weights=tuple(random_weights or ()),
        scheduler=scheduler,
        precisions=precisions_from_options(precision or ()),
        keep_fp32=parts_from_options(keep_fp32 or ()),
        opset=opset,
        preprocess_in_graph=preprocess_in_graph,
        static_cache=static_cache,
        feature_cache=feature_cache,
        verify=verify,
        calibration=calibration,
        images=images,
        limit=limit,
        seed=seed,
    )
    with destination(out, force=force) as place, naming_lack_of_memory(str(out)):
        try:
            manifest = export_bundle(place, request, force=force)
        except FiguresError as error:
            _print_parity(error.records, to_stderr=True)
            raise
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    size = sum(record.bytes for record in manifest.files.values())
    typer.echo(f"{out}: {len(manifest.files)} files, {size / 1e6:.1f} MB, {manifest.precision}")
    _print_parity(manifest.parity)
    for name, graph in manifest.graphs.items():
        if graph.kept_fp32:
            typer.echo(f"  {name} keeps in fp32: {', '.join(graph.kept_fp32)}")


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")],
    data: Annotated[
        Path | None, typer.Option(help="The samples that it was exported with (--verify), to measure on again.")
    ] = None,
    images: _Images = None,
    limit: _Limit = None,
    component: Annotated[
        list[str] | None, typer.Option(help="generator, captioner or classifier; by default all; repeatable.")
    ] = None,
    backend: BackendOption = "auto",
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="ONNX Runtime provider, in order of preference; repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of one operator.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Check a bundle on this machine against the answers that PyTorch gave when it was exported."""
    from mi2rage_export import parity
    from mi2rage_export.verify import check_in_process
    from mi2rage_rt.console import write_json

    checks = check_in_process(
        bundle,
        components=component or (),
        backend=backend,
        providers=provider,
        threads=threads,
        data=data,
        images=images,
        limit=limit,
    )
    records = checks.records
    if as_json:
        found = [record.model_dump() for record in records]
        write_json({"bundle": str(bundle), "ran_on": checks.ran_on, "left_out": checks.left_out, "parity": found})
    else:
        typer.echo(
            f"{bundle}: {sum(record.passed for record in records)} of {len(records)} figures hold, "
            f"on {', '.join(sorted(set(checks.ran_on.values())))}"
        )
        _print_parity(records)
        for name, why in checks.left_out.items():
            typer.echo(f"  {name}: left out: {why}")
    parity.demand(records)


def _print_parity(records: Sequence[ParityRecord], *, to_stderr: bool = False) -> None:
    from mi2rage_export.parity import written

    for record in records:
        value, bound = f"{record.value:.4g}", ""
        if record.threshold is not None:
            value, threshold = written(record.value, record.threshold)
            bound = f" (bound {threshold})"
        failed = "" if record.passed else "  FAILED"
        typer.echo(f"  {record.subject:<24} {record.measure:<19} {value}{bound}{failed}", err=to_stderr)
