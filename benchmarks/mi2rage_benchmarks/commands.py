"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    bundle: Annotated[Path, typer.Argument(help="The exported models.")],
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
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="classifier, unet, text-encoder, vae-decoder (graph calls), classify, generate, caption, chain (whole "
            "calls), or all; may be repeated. Default classifier and unet."
        ),
    ] = None,
    compile_too: Annotated[bool, typer.Option("--compile", help="torch.compile as a side too.")] = False,
    batch_size: Annotated[list[int] | None, typer.Option(help="Rows a call; may be repeated. Default 1 and 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the bundle's own.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of a caption at most.")] = 20,
    texts: Annotated[int, typer.Option(help="Real samples of the chain.")] = 64,
    links: Annotated[int, typer.Option(help="Links of the chain.")] = 2,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every side; by default every core.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls a side.")] = 30,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peaks of memory too: whole calls, each side in a process of its own.")
    ] = False,
    soak: Annotated[
        int | None, typer.Option(help="Memory after so many classifications too.", metavar="REQUESTS")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report with its raw samples to this JSON file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Compare the bundle's speed on ONNX Runtime with PyTorch, in one run."""
    from mi2rage_benchmarks.bench import BenchRequest, run_bench
    from mi2rage_benchmarks.report import markdown
    from mi2rage_rt.files import atomic_text

    request = BenchRequest(
        also=tuple(also or ()),
        generator=generator,
        captioner=captioner,
        classifier=classifier,
        random_weights=tuple(random_weights or ()),
        subjects=tuple(subject or ()),
        compile=compile_too,
        batch_sizes=tuple(batch_size or (1, 8)),
        steps=steps,
        tokens=tokens,
        texts=texts,
        links=links,
        threads=threads,
        repeats=repeats,
        memory=memory,
        soak=soak,
        seed=seed,
    )
    report = run_bench(bundle, request)
    document = report.model_dump_json(indent=2)
    if out is not None:
        with atomic_text(out) as file:
            file.write(document + "\n")
    typer.echo(document if as_json else markdown(report))
