"""The command `loadgen`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["loadgen"]

_BOUNDS_MS = {"classifier": 100.0, "captioner": 1000.0, "generator": 20_000.0}


def loadgen(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")],
    model: Annotated[str, typer.Option(help="classifier, captioner or generator.")] = "classifier",
    scenario: Annotated[
        str,
        typer.Option(help="single-stream (p90 of one query after the other), offline (samples/s), server (queries/s)."),
    ] = "single-stream",
    target_p99_ms: Annotated[
        float | None,
        typer.Option(help="The server's bound; by default 100 (classifier), 1000 (captioner), 20000 (generator)."),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="JSONL or MNRE rows to ask with; by default sentences and pictures made up.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of their images; by default the file's own.")] = None,
    library: Annotated[int, typer.Option(min=1, help="Samples that LoadGen chooses from, at most.")] = 64,
    seconds: Annotated[float, typer.Option(help="Least duration of a run; MLPerf's rules ask for 600.")] = 10.0,
    queries: Annotated[
        int | None, typer.Option(help="Least queries of a run; by default 100 (single-stream), 1000 (server).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Queries/s that the server's search begins with.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of the server's search, at most.")] = 16,
    precision: Annotated[float, typer.Option(help="How close the search comes, e.g. 0.05.")] = 0.05,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples computed together at most, by default 32, 16 or 8 by model.")
    ] = None,
    max_wait_ms: Annotated[float, typer.Option(help="How long a batch of the server waits for more.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the bundle's own.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of a caption at most; by default the bundle's own.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="ONNX Runtime provider, in order of preference; repeatable.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default all this process may use.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="LoadGen's own logs go to a new folder in this one.")] = Path(
        "loadgen-logs"
    ),
    out: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Measure a bundle's model by MLPerf LoadGen: single stream, offline or server."""
    from mi2rage_benchmarks.loadgen import LoadGenSettings, Scenario, loadgen_module
    from mi2rage_benchmarks.loadgen_run import LoadGenRequest, run_loadgen
    from mi2rage_benchmarks.loadgen_systems import ROLES, SystemOptions
    from mi2rage_engines.errors import InputError
    from mi2rage_rt.files import atomic_text
    from mi2rage_training.choices import choice

    loadgen_module()
    if model not in ROLES:
        raise InputError(f"model {model!r}: expected one of {', '.join(ROLES)}; choose one")
    kind = choice(Scenario, scenario, "scenario")
    if target_p99_ms is not None and kind is not Scenario.SERVER:
        raise InputError(
            f"--target-p99-ms: came {target_p99_ms} with the scenario {kind.value}; expected it with server only, "
            "which alone has a bound; leave it out, or take --scenario server"
        )
    settings = LoadGenSettings(
        min_seconds=seconds,
        min_queries=queries,
        target_p99_ms=_BOUNDS_MS[model] if target_p99_ms is None else target_p99_ms,
        start_rate=rate,
        max_runs=runs,
        precision=precision,
        max_wait_ms=max_wait_ms,
        seed=seed,
    )
    options = SystemOptions(samples, images, library, batch_size, steps, tokens, seed)
    request = LoadGenRequest(model, kind, settings, options, logs, tuple(provider or ()), threads)
    report = run_loadgen(bundle, request)
    document = report.model_dump_json(indent=2)
    if out is not None:
        with atomic_text(out) as file:
            file.write(document + "\n")
    if as_json:
        typer.echo(document)
    else:
        from mi2rage_benchmarks.loadgen_report import write_report

        write_report(report)
    if not report.valid:
        raise typer.Exit(1)
