"""The command `synthesize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mi2rage_rt.pool_option import CpusOption, GpusOption, RayOption, WorkersOption

__all__ = ["synthesize"]


def synthesize(
    samples: Annotated[Path, typer.Argument(help="Labelled sentences, or sentences with images: JSONL, or MNRE rows.")],
    out: Annotated[
        str,
        typer.Argument(help="Store to write, a folder or an address (s3://...); with the same settings it goes on."),
    ],
    given: Annotated[
        str, typer.Option(help="The modality that is real: text (makes images) or image (texts).")
    ] = "text",
    images: Annotated[Path | None, typer.Option(help="Folder of the given images; by default the file's own.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="embedded (the default), a diffusers folder, or a hub id.")
    ] = None,
    captioner: Annotated[str | None, typer.Option(help="embedded (the default), a BLIP folder, or a hub id.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Both models from a folder that 'export' wrote, run without PyTorch.")
    ] = None,
    links: Annotated[
        int, typer.Option(help="Samples made one after the other in a chain; 1 is direct generation.")
    ] = 3,
    width: Annotated[int, typer.Option(help="Children of a real sample at each link.")] = 1,
    judge: Annotated[
        Path | None, typer.Option(help="Teachers ('select --teachers'): bad children hardly have children.")
    ] = None,
    sharpness: Annotated[float, typer.Option(help="Power of the judge's likelihood ratio.")] = 1.0,
    select_online: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Make no children of a child that adds less; needs --judge, draws nothing."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    feature_cache: Annotated[
        int, typer.Option(min=1, help="With --bundle: the whole UNet at every N-th step only; 1 is off.")
    ] = 1,
    first_prompt: Annotated[
        str, typer.Option(help="What the first image is drawn from: {sentence} {head} {tail} {label}.")
    ] = "{sentence}",
    next_prompt: Annotated[str, typer.Option(help="The same for later links, with {caption}.")] = "{caption}",
    prefix: Annotated[
        list[str] | None, typer.Option(help="What captions begin with: {head} {tail} {label}; may be repeated.")
    ] = None,
    decoding: Annotated[str, typer.Option(help="Of captions: nucleus, greedy or beam.")] = "nucleus",
    beams: Annotated[int, typer.Option(help="Of the beam search.")] = 4,
    top_p: Annotated[float, typer.Option(help="Share of the nucleus.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Of nucleus sampling.")] = 1.0,
    attempts: Annotated[int, typer.Option(help="How often a caption that a sibling has is drawn again.")] = 3,
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Then leave the child out.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples.")] = None,
    shard_size: Annotated[int, typer.Option(help="Real samples a shard; the unit of commit and resume.")] = 32,
    image_format: Annotated[str, typer.Option(help="png (lossless) or jpeg.")] = "png",
    jpeg_quality: Annotated[int | None, typer.Option(help="1 to 95, of --image-format jpeg; by default 90.")] = None,
    png_level: Annotated[
        int | None, typer.Option(help="0 to 9; by default 6; 1 is fast, and files are larger.")
    ] = None,
    in_flight: Annotated[
        int,
        typer.Option(min=0, help="Shards in the making at a time, which changes no byte; 0 is what suits the models."),
    ] = 0,
    ray: RayOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    tries: Annotated[
        int,
        typer.Option(min=0, help="Of a shard that fails; then samples at fault are left out; 0 stops at an error."),
    ] = 3,
    stop_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop between shards after 2h, 90m, ...; run again to go on.")
    ] = None,
    stop_at_kept: Annotated[
        int | None, typer.Option(metavar="N", help="Stop with so many candidates kept by --select-online, or made.")
    ] = None,
    stop_at_cost: Annotated[
        float | None, typer.Option(metavar="COST", help="Stop when this run has cost so much, at --cost-per-hour.")
    ] = None,
    cost_per_hour: Annotated[float | None, typer.Option(metavar="COST", help="Of all that runs, together.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="HTML page of samples that grows while they are made.")] = None,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Begin anew; a store that is there is renamed to OUT.1, OUT.2, ...")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing the file.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Make the missing images or texts of labelled data by Chained Cross-modal Generation."""
    from mi2rage_engines.errors import InputError, Mi2rageError
    from mi2rage_rt.pool_option import pool_options
    from mi2rage_rt.samples import BadRow
    from mi2rage_training.budget import Budget, seconds_from
    from mi2rage_training.chain import ChainConfig, Decoding, Given, ImageFormat, children_not_made
    from mi2rage_training.chain_cluster import make_wherever
    from mi2rage_training.chain_models import ModelChoice, Sampling, check_sources
    from mi2rage_training.chain_run import RunOptions
    from mi2rage_training.choices import choice
    from mi2rage_training.commands import print_summary
    from mi2rage_training.pairs import Modality, load_pairs
    from mi2rage_training.pytorch_captioner import CaptionDecoding
    from mi2rage_training.shard_work import explain_left_out
    from mi2rage_training.store import set_aside

    kind = choice(Given, given, "given modality")
    search = choice(Decoding, decoding, "decoding")
    if select_online is not None and judge is None:
        raise InputError(
            f"--select-online: came {select_online} without --judge; expected the teachers of an earlier selection, "
            "which say what a child adds; give them ('select --teachers'), or leave it out"
        )
    check_sources(bundle, generator, captioner, feature_cache)
    pool = pool_options(ray, workers, gpus_per_worker, cpus_per_worker, tries)
    seconds = None if stop_after is None else seconds_from(stop_after)
    options = RunOptions(tries, Budget(seconds, stop_at_kept, stop_at_cost, cost_per_hour), gallery)
    encoding: dict[str, Any] = {"jpeg_quality": jpeg_quality, "png_level": png_level}
    config = ChainConfig(
        given=kind,
        links=links,
        width=width,
        seed=seed,
        shard_size=shard_size,
        image_format=choice(ImageFormat, image_format, "image format"),
        first_prompt=first_prompt,
        next_prompt=next_prompt,
        prefixes=tuple(prefix or ()),
        decoding=search,
        attempts=attempts,
        drop_duplicates=drop_duplicates,
        sharpness=sharpness,
        least_added_nats=select_online,
        **{name: value for name, value in encoding.items() if value is not None},
    )
    decoded = CaptionDecoding(beams if search is Decoding.BEAM else 1, top_p, temperature)
    bad_rows: list[BadRow] = []
    shown = Modality.TEXT if kind is Given.TEXT else Modality.BOTH
    pairs = load_pairs(samples, images=images, modality=shown, skip_bad=skip_bad, bad_rows=bad_rows)[:limit]
    wanted = ModelChoice(bundle, generator, captioner, Sampling(steps, guidance, decoded, feature_cache), judge, device)
    if new_run and (aside := set_aside(out)) is not None:
        typer.echo(f"the earlier store is now {aside}", err=True)
    outcome = make_wherever(pairs, out, wanted, config, options, pool, in_flight)
    summary: dict[str, Any] = {"store": out, "given": kind.value, "samples": len(pairs), "skipped_rows": len(bad_rows)}
    summary |= outcome.figures(config, 0 if outcome.manifest is None else children_not_made(out, config))
    print_summary(summary, as_json)
    if outcome.stopped is not None:
        typer.echo(outcome.explain_stop(), err=True)
    if outcome.left_out and not skip_bad:
        raise Mi2rageError(explain_left_out(out, outcome.left_out))
