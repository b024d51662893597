"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mi2rage_benchmarks.bench import BenchReport

__all__ = ["bench"]


def bench(
    bundle: Annotated[Path, typer.Argument(help="The exported models.")],
    classifier: Annotated[
        Path | None, typer.Option(help="The classifier that the bundle was exported from.", metavar="FOLDER")
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="The generator that it was exported from; embedded, a folder, or a hub id.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Rows a call; may be repeated. Default 1 and 8.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of either side; by default every core.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls a side.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Write the report with its raw samples to this JSON file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Compare the bundle's speed on ONNX Runtime with PyTorch eager, in one run."""
    from mi2rage_benchmarks.bench import run_bench
    from mi2rage_rt.files import atomic_text

    report = run_bench(
        bundle,
        classifier=classifier,
        generator=generator,
        batch_sizes=tuple(batch_size or (1, 8)),
        threads=threads,
        repeats=repeats,
        seed=seed,
    )
    document = report.model_dump_json(indent=2)
    if out is not None:
        with atomic_text(out) as file:
            file.write(document + "\n")
    if as_json:
        typer.echo(document)
    else:
        _print_table(report)


def _print_table(report: BenchReport) -> None:
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(box=MARKDOWN)
    table.add_column("call")
    for title in ("batch", "PyTorch ms (quartiles)", "ONNX Runtime ms (quartiles)", "ratio (quartiles)"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in report.cells:
        sides = (
            f"{side.median_ms:.3g} ({side.p25_ms:.3g}-{side.p75_ms:.3g})" for side in (cell.pytorch, cell.onnxruntime)
        )
        ratio = f"{cell.ratio.median:.2f} ({cell.ratio.p25:.2f}-{cell.ratio.p75:.2f})"
        table.add_row(cell.name, str(cell.batch_size), *sides, ratio)
    Console(width=120).print(table)
    typer.echo("; ".join(f"{name} {value}" for name, value in report.environment.items()))
