"""The runtime's commands: generate, caption, predict, inspect, doctor. Heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["caption", "doctor", "generate", "inspect", "predict"]

_Bundle = Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
_Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; by default all this process may use.")
]
_Provider = Annotated[
    list[str] | None, typer.Option("--provider", help="ONNX Runtime provider, in order of preference; repeatable.")
]


def generate(
    bundle: _Bundle,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one image each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and manifest.jsonl.")] = Path("generated"),
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the bundle has schedules for some.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the bundle's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the bundle's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made together.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    provider: _Provider = None,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Make images for prompts from a bundle."""
    from mi2rage_engines.errors import InputError
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.generator import GenerateOptions
    from mi2rage_rt.jobs import generate_files, read_prompts

    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise InputError("no prompt was given; expected PROMPT... or --prompts-file")
    options = GenerateOptions(steps=steps, guidance_scale=guidance, height=height, width=width, batch_size=batch_size)
    with Bundle.open(bundle, providers=provider, threads=threads) as opened:
        rows = generate_files(opened.generator(), wanted, out, seed=seed, options=options, force=force)
    if as_json:
        write_json({"out": str(out), "images": rows})
    else:
        write_table(("file", "prompt"), [(str(out / row["file"]), row["prompt"]) for row in rows])


def caption(
    bundle: _Bundle,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    prefix: Annotated[str, typer.Option(help="What every caption begins with.")] = "",
    sample: Annotated[bool, typer.Option("--sample", help="Nucleus sampling instead of greedy decoding.")] = False,
    top_p: Annotated[float, typer.Option(help="The nucleus's share of probability.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Above 1 more varied, below 1 less.")] = 1.0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default the bundle's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned together.")] = 16,
    provider: _Provider = None,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Describe images in words, from a bundle."""
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.captioner import CaptionOptions
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.jobs import caption_files

    options = CaptionOptions(max_new_tokens, top_p, temperature, batch_size)
    with Bundle.open(bundle, providers=provider, threads=threads) as opened:
        rows = caption_files(opened.captioner(options), images, prefix=prefix, seed=seed if sample else None)
    if as_json:
        write_json({"captions": rows})
    else:
        write_table(("image", "caption"), [(row["image"], row["caption"]) for row in rows], widest=120)


def predict(
    bundle: _Bundle,
    samples: Annotated[Path, typer.Argument(help="Sentences with their mentions: JSONL, or MNRE rows.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images; by default the samples' own.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the images out.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the predictions to this JSONL file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing all.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples run together.")] = 32,
    provider: _Provider = None,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Predict the relation of each sample's entity pair, from a bundle."""
    import dataclasses
    import json

    from mi2rage_engines.errors import InputError
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.files import atomic_text
    from mi2rage_rt.jobs import Skipped, predict_samples
    from mi2rage_rt.samples import BadRow, read_samples

    if out is not None and out.exists() and not force:
        raise InputError(f"{out}: exists; give another file, or --force to replace it")
    bad_rows: list[BadRow] = []
    skipped: list[Skipped] = []
    rows = read_samples(samples, skip_bad=skip_bad, bad_rows=bad_rows)
    with Bundle.open(bundle, providers=provider, threads=threads) as opened:
        classifier = opened.classifier(batch_size)
        folder = None if text_only else images or samples.parent
        predictions = predict_samples(classifier, rows, folder, skip_bad=skip_bad, skipped=skipped)
    if out is not None:
        with atomic_text(out) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    left_out = [*map(dataclasses.asdict, bad_rows), *map(dataclasses.asdict, skipped)]
    if as_json:
        write_json({"out": str(out) if out else None, "predictions": predictions, "skipped": left_out})
    elif out is not None:
        typer.echo(f"{len(predictions)} predictions in {out}, {len(left_out)} rows skipped")
    else:
        columns = ("id", "head", "tail", "relation", "probability")
        write_table(
            columns, [[f"{row[c]:.3f}" if c == "probability" else row[c] for c in columns] for row in predictions]
        )


def inspect(bundle: _Bundle, as_json: _Json = False) -> None:
    """Show what is in a bundle: sizes, precisions, axes, parity, plans, sources and licences."""
    from mi2rage_engines.bundle import open_manifest
    from mi2rage_rt.bundle_page import page_from_manifest
    from mi2rage_rt.console import write_json

    manifest = open_manifest(bundle)
    if as_json:
        write_json(manifest.model_dump(mode="json"))
    else:
        typer.echo(page_from_manifest(bundle, manifest))


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle to check as well.")] = None,
    as_json: _Json = False,
) -> None:
    """Show versions, devices and extras, what is missing, and the command that adds it."""
    from mi2rage_engines.errors import BundleError
    from mi2rage_rt.console import write_json
    from mi2rage_rt.doctor import examine, examine_bundle, text_from_findings

    findings = examine()
    if bundle is not None:
        findings["bundle"] = examine_bundle(bundle)
    if as_json:
        write_json(findings)
    else:
        typer.echo(text_from_findings(findings))
    if bundle is not None and not findings["bundle"]["whole"]:
        raise BundleError(findings["bundle"]["error"])
