"""The runtime's commands: generate, caption, predict, inspect, doctor. Heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mi2rage_rt.backend_option import BackendOption
from mi2rage_rt.pool_option import CpusOption, GpusOption, RayOption, WorkersOption

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
_FastJpeg = Annotated[
    bool,
    typer.Option("--fast-jpeg", help="Decode large JPEGs at half their size or less; the answers may differ a little."),
]
_BATCH_SIZE = 8


def generate(
    bundle: _Bundle,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one image each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and manifest.jsonl.")] = Path("generated"),
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the bundle has schedules for some.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the bundle's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the bundle's own.")] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(help="Shares of the steps that are guided, e.g. 0:0.5; by default all.", metavar="FIRST:LAST"),
    ] = None,
    feature_cache: Annotated[
        int,
        typer.Option(help="The whole UNet runs at every N-th step, its outer layers at the others; 1 is off.", min=1),
    ] = 1,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Images made together, or auto to measure which number is fastest; by default 8, or as many as "
            "--memory holds.",
            metavar="N|auto",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory in use at most, weights too, e.g. 4GB.", metavar="SIZE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    backend: BackendOption = "auto",
    provider: _Provider = None,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Make images for prompts from a bundle."""
    from mi2rage_engines.errors import InputError
    from mi2rage_engines.plan_cache import bytes_from_text
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.generator import GenerateOptions
    from mi2rage_rt.jobs import generate_files, read_prompts
    from mi2rage_rt.schedule import interval_from_text

    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise InputError("no prompt was given; expected PROMPT... or --prompts-file")
    options = GenerateOptions(
        steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        guidance_interval=(0.0, 1.0) if guidance_interval is None else interval_from_text(guidance_interval),
        batch_size=_batch_size_from_text(batch_size, len(wanted) if memory else _BATCH_SIZE),
        memory_bytes=bytes_from_text(memory) if memory else None,
        feature_cache=feature_cache,
    )
    with Bundle.open(bundle, backend, providers=provider, threads=threads) as opened:
        rows = generate_files(opened.generator(options), wanted, out, seed=seed, options=options, force=force)
    if as_json:
        write_json({"out": str(out), "images": rows})
    else:
        write_table(("file", "prompt"), [(str(out / row["file"]), row["prompt"]) for row in rows])


def _batch_size_from_text(text: str | None, default: int) -> int | Literal["auto"]:
    from mi2rage_engines.errors import InputError

    if text is None:
        return default
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"batch size {text!r}: expected a number from 1 on, or auto; give one of them")
    return int(text)


def caption(
    bundle: _Bundle,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    prefix: Annotated[str, typer.Option(help="What every caption begins with.")] = "",
    sample: Annotated[bool, typer.Option("--sample", help="Nucleus sampling instead of greedy decoding.")] = False,
    top_p: Annotated[float, typer.Option(help="The nucleus's share of probability.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Above 1 more varied, below 1 less.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Of a beam search; 1 is greedy decoding.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default the bundle's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions written together; each beam is one.")] = 16,
    fast_jpeg: _FastJpeg = False,
    backend: BackendOption = "auto",
    provider: _Provider = None,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Describe images in words, from a bundle."""
    from mi2rage_engines.errors import InputError
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.captioner import CaptionOptions
    from mi2rage_rt.console import write_json, write_table
    from mi2rage_rt.jobs import caption_files

    if sample and beams > 1:
        raise InputError(
            f"--beams {beams}: came with --sample; expected one of them, for a beam search draws nothing; leave one out"
        )
    options = CaptionOptions(max_new_tokens, top_p, temperature, batch_size, beams)
    with Bundle.open(bundle, backend, providers=provider, threads=threads) as opened:
        captioner = opened.captioner(options)
        rows = caption_files(captioner, images, prefix=prefix, seed=seed if sample else None, fast_jpeg=fast_jpeg)
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
    fast_jpeg: _FastJpeg = False,
    backend: BackendOption = "auto",
    provider: _Provider = None,
    threads: _Threads = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
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
    from mi2rage_rt.pool_option import pool_options
    from mi2rage_rt.predict_cluster import ClassifierChoice, predict_on_cluster
    from mi2rage_rt.samples import BadRow, read_samples

    if out is not None and out.exists() and not force:
        raise InputError(f"{out}: exists; give another file, or --force to replace it")
    bad_rows: list[BadRow] = []
    skipped: list[Skipped] = []
    pool = pool_options(ray, workers, gpus_per_worker, cpus_per_worker)
    rows = read_samples(samples, skip_bad=skip_bad, bad_rows=bad_rows)
    folder = None if text_only else images or samples.parent
    manner: Any = {"skip_bad": skip_bad, "skipped": skipped, "fast_jpeg": fast_jpeg}
    if pool is not None:
        choice = ClassifierChoice(bundle, backend, None if provider is None else tuple(provider), threads, batch_size)
        predictions = predict_on_cluster(choice, rows, folder, pool, **manner)
    else:
        with Bundle.open(bundle, backend, providers=provider, threads=threads) as opened:
            predictions = predict_samples(opened.classifier(batch_size), rows, folder, **manner)
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
