"""The command `synthesize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["synthesize"]


def synthesize(
    samples: Annotated[Path, typer.Argument(help="Labelled sentences, or sentences with images: JSONL, or MNRE rows.")],
    out: Annotated[Path, typer.Argument(help="Store to write; an unfinished one of the same settings goes on.")],
    given: Annotated[
        str, typer.Option(help="The modality that is real: text (makes images) or image (texts).")
    ] = "text",
    images: Annotated[Path | None, typer.Option(help="Folder of the given images; by default the file's own.")] = None,
    generator: Annotated[str, typer.Option(help="embedded, a diffusers folder, or a hub id.")] = "embedded",
    captioner: Annotated[str, typer.Option(help="embedded, a BLIP folder, or a hub id.")] = "embedded",
    links: Annotated[
        int, typer.Option(help="Samples made one after the other in a chain; 1 is direct generation.")
    ] = 3,
    width: Annotated[int, typer.Option(help="Children of a real sample at each link.")] = 1,
    judge: Annotated[
        Path | None, typer.Option(help="Teachers ('select --teachers'): bad children have no children.")
    ] = None,
    sharpness: Annotated[float, typer.Option(help="Power of the judge's likelihood ratio.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
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
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing the file.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Make the missing images or texts of labelled data by Chained Cross-modal Generation."""
    import dataclasses

    from mi2rage_rt.samples import BadRow
    from mi2rage_training.chain import ChainConfig, Decoding, Given, ImageFormat
    from mi2rage_training.chain import synthesize as run
    from mi2rage_training.choices import choice
    from mi2rage_training.commands import print_summary
    from mi2rage_training.devices import device_from
    from mi2rage_training.pairs import Modality, load_pairs
    from mi2rage_training.pytorch_captioner import CaptionDecoding, TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator
    from mi2rage_training.teacher_folder import load_teachers

    kind = choice(Given, given, "given modality")
    search = choice(Decoding, decoding, "decoding")
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
    )
    decoded = CaptionDecoding(beams if search is Decoding.BEAM else 1, top_p, temperature)
    bad_rows: list[BadRow] = []
    shown = Modality.TEXT if kind is Given.TEXT else Modality.BOTH
    pairs = load_pairs(samples, images=images, modality=shown, skip_bad=skip_bad, bad_rows=bad_rows)[:limit]
    place = device_from(device)
    text_to_image = TorchGenerator.from_folder(generator, device=place, steps=steps, guidance_scale=guidance)
    image_to_text = TorchCaptioner.from_folder(captioner, device=place, decoding=decoded)
    if kind is Given.IMAGE and not config.prefixes:
        config = dataclasses.replace(config, prefixes=image_to_text.text_prefixes)
    models = {
        "generator_source": generator,
        "captioner_source": captioner,
        **dataclasses.asdict(text_to_image.settings),
        "decoding": dataclasses.asdict(decoded),
    }
    teachers = None if judge is None else load_teachers(judge, place)
    manifest = run(pairs, out, text_to_image, image_to_text, config, models, teachers)
    summary = {"store": str(out), "given": kind.value, "samples": len(pairs), "skipped_rows": len(bad_rows)}
    most = links * width * len(pairs)
    summary |= {"candidates": manifest.rows, "dropped": most - manifest.rows, "shards": len(manifest.shards)}
    print_summary(summary, as_json)
