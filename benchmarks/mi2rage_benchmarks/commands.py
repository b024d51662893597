"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mi2rage_benchmarks.compare import Comparison
    from mi2rage_benchmarks.report import BenchReport

__all__ = ["bench"]


def bench(
    bundle: Annotated[Path | None, typer.Argument(help="The exported models; with --recipe the recipe's.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A further bundle of the same models, e.g. int8; may be repeated.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="The classifier that it was exported from; else what the bundle says.")
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="The same of the generator: embedded, a folder, a hub id.")
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="The same of the captioner: embedded, a folder, a hub id.")
    ] = None,
    random_weights: Annotated[
        list[str] | None, typer.Option(help="An architecture with random weights, drawn by --seed; may be repeated.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="micro, real-cpu, or a TOML file; options that are given stand before its own.")
    ] = None,
    bundles: Annotated[Path, typer.Option(help="Folder that a recipe's bundles are in.")] = Path(),
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="classifier, unet, text-encoder, vae-decoder (graph calls), classify, generate, caption, chain (whole "
            "calls), or all; may be repeated. Default classifier and unet."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="What runs the bundle: ort-cpu (default), ort-cuda, ort-tensorrt, tensorrt, tensorrt-rtx or auto; may "
            "be repeated, each is a side."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of PyTorch's sides: cpu (default), cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of PyTorch's sides: fp32 (default), fp16 or bf16; answers are held against fp32."),
    ] = None,
    compile_too: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile as a side too.")
    ] = None,
    again: Annotated[
        bool | None, typer.Option("--against-itself", help="The first bundle as a side twice: what no difference is.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Rows a call; may be repeated. Default 1 and 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the bundle's own.")] = None,
    feature_cache: Annotated[
        int | None,
        typer.Option(
            help="Generations once more, by bundles with the whole UNet at every N-th step only.", metavar="N"
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of a caption at most. Default 20.")] = None,
    texts: Annotated[int | None, typer.Option(help="Real samples of the chain. Default 64.")] = None,
    links: Annotated[int | None, typer.Option(help="Links of the chain. Default 2.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every side; by default every core.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed calls a side: so many, or with --budget at least so many.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Timed at most so long a cell, and less where every side is steady to 3% and every ratio known to 2%. "
            "Default 20, without --repeats.",
            metavar="SECONDS",
        ),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="All cells in this process: sooner done, and a crash ends them all.")
    ] = False,
    memory: Annotated[
        bool | None,
        typer.Option("--memory", help="Peaks of memory too: whole calls, each side in a process of its own."),
    ] = None,
    soak: Annotated[
        int | None, typer.Option(help="Memory after so many classifications too.", metavar="REQUESTS")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Measure nothing, and show or compare this JSON report.", metavar="FILE")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Say what changed since this JSON report, and whether it is noise.", metavar="OLD"),
    ] = None,
    fail_slower: Annotated[
        str | None,
        typer.Option(help="With --compare: exit 1 where a side is so much slower against eager.", metavar="5%"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report with its raw samples to this JSON file.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the report with figures to this HTML file.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of reports, and measure nothing.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs. Default 0.")] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Print one row a call, the ratios to eager, instead of all tables.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Compare the bundle's speed on ONNX Runtime with PyTorch, in one run."""
    from mi2rage_benchmarks.compare import share_from
    from mi2rage_benchmarks.report import BenchReport, read_report
    from mi2rage_engines.errors import InputError, require

    if schema:
        import json

        typer.echo(json.dumps(BenchReport.model_json_schema(), indent=2))
        return
    bound = None if fail_slower is None else share_from(fail_slower)
    if bound is not None and compare is None:
        raise InputError("--fail-slower: slower than what is not said; expected --compare OLD.json beside it")
    # Before the measuring, so that what is missing or damaged is said in time.
    old = None if compare is None else read_report(compare)
    if page is not None:
        for package in ("jinja2", "matplotlib"):
            require(package, "bench")
    if report is not None:
        if bundle is not None or recipe is not None:
            raise InputError("--report: measures nothing; leave BUNDLE and --recipe out")
        found = read_report(report)
    else:
        asked = {
            "also": also,
            "generator": generator,
            "captioner": captioner,
            "classifier": classifier,
            "random_weights": random_weights,
            "backends": backend,
            "device": device,
            "precision": dtype,
            "subjects": subject,
            "compile": compile_too,
            "again": again,
            "batch_sizes": batch_size,
            "steps": steps,
            "feature_cache": feature_cache,
            "tokens": tokens,
            "texts": texts,
            "links": links,
            "threads": threads,
            "repeats": repeats,
            "budget_seconds": budget,
            "memory": memory,
            "soak": soak,
            "seed": seed,
        }
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in asked.items()
            if value is not None and value != []
        }
        found = _measured(bundle, recipe, bundles, given | {"isolated": not in_process})
    _show(found, old, bound, out, page, brief=brief, as_json=as_json)


def _measured(bundle: Path | None, recipe: str | None, bundles: Path, given: dict[str, Any]) -> BenchReport:
    import shlex
    import sys

    from mi2rage_benchmarks.bench import BenchRequest, run_bench
    from mi2rage_benchmarks.recipes import read_recipe, run_recipe
    from mi2rage_engines.errors import InputError

    command = shlex.join(["mi2rage-rt", *sys.argv[1:]])
    if recipe is not None:
        return run_recipe(read_recipe(recipe), bundles, given, bundle=bundle, command=command)
    if bundle is None:
        raise InputError("no bundle: expected BUNDLE, the folder that 'mi2rage-rt export' wrote, or --recipe")
    return run_bench(bundle, BenchRequest(**given), command=command)


def _show(
    report: BenchReport,
    old: BenchReport | None,
    bound: float | None,
    out: Path | None,
    page: Path | None,
    *,
    brief: bool,
    as_json: bool,
) -> None:
    import json

    from mi2rage_benchmarks import bench_markdown
    from mi2rage_benchmarks.compare import compared, comparison_markdown
    from mi2rage_rt.files import atomic_text

    comparison = None if old is None else compared(old, report, bound)
    if out is not None:
        with atomic_text(out) as file:
            file.write(report.model_dump_json(indent=2) + "\n")
    if page is not None:
        from mi2rage_benchmarks.bench_page import write_bench_page

        write_bench_page(report, page, comparison)
    if as_json:
        document = report.model_dump(mode="json")
        if comparison is not None:
            document = {"report": document, "comparison": comparison.model_dump(mode="json")}
        typer.echo(json.dumps(document, indent=2))
    else:
        typer.echo(bench_markdown.brief(report) if brief else bench_markdown.markdown(report))
        if comparison is not None:
            typer.echo("\n" + comparison_markdown(comparison))
    _judge(report, comparison)


def _judge(report: BenchReport, comparison: Comparison | None) -> None:
    """End with what failed: a cell of which nothing was measured, or a regression."""
    from mi2rage_engines.errors import Mi2rageError

    if comparison is not None and comparison.regressions:
        raise Mi2rageError(f"slower than before: {'; '.join(comparison.regressions)}")
    if failed := [f"{cell.title}: {cell.failed}" for cell in report.cells if cell.failed]:
        raise Mi2rageError(f"not measured: {'; '.join(failed)}")
