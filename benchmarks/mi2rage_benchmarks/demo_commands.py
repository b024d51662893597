"""The command `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    train: Annotated[int, typer.Option(help="Labelled sentences.")] = 1200,
    links: Annotated[int, typer.Option(help="Images made one after the other from each sentence.")] = 3,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Watch MI2RAGE happen on the embedded micro-world, from labelled text to a page about the result."""
    import dataclasses
    import json

    from mi2rage_engines.errors import require

    for package, extra in (
        ("torch", "train"),
        ("transformers", "train"),
        ("diffusers", "train"),
        ("onnx", "export"),
        ("onnxscript", "export"),
        ("onnxruntime", "cpu"),
        ("jinja2", "bench"),
        ("matplotlib", "bench"),
    ):
        require(package, extra)
    from mi2rage_benchmarks.demo import DemoConfig, run_demo, summary_from
    from mi2rage_benchmarks.demo_report import write_demo_report

    config = dataclasses.replace(DemoConfig(), train=train, links=links, seed=seed)
    result = run_demo(out, config, force=force)
    report = out / "report.html"
    write_demo_report(result, report)
    if as_json:
        typer.echo(json.dumps(summary_from(result), indent=2))
        return
    typer.echo("")
    for student in result.students:
        typer.echo(f"{student.name:>12}  F1 {100 * student.metrics.f1:5.1f}  {student.explanation}")
    checks = result.manifest.checks
    typer.echo(f"\nparity: {sum(check.passed for check in checks)} of {len(checks)} checks passed")
    typer.echo(f"report: {report}")
