"""The command `triton`. Heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["triton"]


def triton(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the model repository.")],
    models: Annotated[
        str | None,
        typer.Option(help="Services, joined by commas: classifier,captioner,generator; by default all that are there."),
    ] = None,
    platform: Annotated[
        Literal["onnxruntime", "tensorrt"],
        typer.Option(help="tensorrt takes the bundle's plans, and ONNX Runtime for graphs that have none."),
    ] = "onnxruntime",
    target: Annotated[str | None, typer.Option(help="Whose plans, e.g. sm89, where there are several.")] = None,
    kind: Annotated[Literal["cpu", "gpu"], typer.Option(help="Where the graphs compute.")] = "cpu",
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of a request, and rows put together.")] = 8,
    queue_delay: Annotated[
        int, typer.Option(min=0, help="Microseconds that a request waits for others.", metavar="US")
    ] = 2000,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused at once.")] = 128,
    instances: Annotated[int, typer.Option(min=1, help="Processes of each service.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one operator.")] = None,
    model_version: Annotated[int, typer.Option(min=1, help="Number of the version folders.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write a bundle as a Triton model repository."""
    import dataclasses

    from mi2rage_engines.errors import InputError
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.serve.tensors import MODELS
    from mi2rage_rt.triton_config import TritonOptions
    from mi2rage_rt.triton_repository import write_repository

    wanted = tuple(dict.fromkeys(name.strip() for name in models.split(","))) if models is not None else ()
    unknown = [name for name in wanted if name not in MODELS]
    if unknown:
        raise InputError(f"--models {models}: no model {unknown[0]!r}; expected some of {', '.join(MODELS)}")
    options = TritonOptions(
        platform=platform,
        target=target,
        kind=kind,
        models=wanted,
        max_batch=max_batch,
        queue_delay_us=queue_delay,
        max_queue=max_queue,
        instances=instances,
        threads=threads,
        version=model_version,
    )
    written = write_repository(bundle, out, options, force=force)
    if as_json:
        write_json({"out": str(out), "models": [dataclasses.asdict(model) for model in written]})
        return
    columns = ("model", "runs on", "max batch", "from")
    write_table(columns, [(model.name, model.runs_on, str(model.max_batch), model.source) for model in written], 80)
    typer.echo(f"\n{out}/README.md has the command that serves it")
