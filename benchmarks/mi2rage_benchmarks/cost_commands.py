"""The command `cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["cost"]


def cost(
    place: Annotated[
        Path | None, typer.Argument(help="A store that 'synthesize' made, or a bundle to measure the chain with.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Figures of another device: what --out wrote there; in place of a measurement.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Labelled sentences, JSONL or MNRE rows; by default made up.")
    ] = None,
    run: Annotated[int, typer.Option(min=1, help="Texts that are measured with.")] = 128,
    check: Annotated[
        int | None,
        typer.Option(min=1, metavar="TEXTS", help="Then run so many other texts, and say how far off it was."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Kept samples to plan for, e.g. 1000000.")] = None,
    devices: Annotated[int, typer.Option(help="Devices like the one measured, that share the work.")] = 1,
    price_per_hour: Annotated[float | None, typer.Option(help="Of a device, e.g. 2.50.")] = None,
    selected: Annotated[
        Path | None, typer.Option(help="A store that 'select' wrote: its share of kept candidates is planned with.")
    ] = None,
    kept_share: Annotated[
        float | None, typer.Option(help="That share as a number, e.g. 0.4; by default every candidate is kept.")
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Joules too, where nvidia-smi or RAPL can be read.")] = False,
    links: Annotated[int, typer.Option(help="Of the chain, as in 'synthesize'.")] = 3,
    width: Annotated[int, typer.Option(help="Children of a text at each link.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the bundle's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    decoding: Annotated[str, typer.Option(help="Of captions: nucleus, greedy or beam.")] = "nucleus",
    shard_size: Annotated[
        int, typer.Option(help="Texts a shard; smaller than that of 'synthesize', for a small run to have several.")
    ] = 8,
    image_format: Annotated[str, typer.Option(help="png or jpeg.")] = "png",
    jpeg_quality: Annotated[int | None, typer.Option(help="Of --image-format jpeg.")] = None,
    png_level: Annotated[int | None, typer.Option(help="0 to 9.")] = None,
    in_flight: Annotated[int, typer.Option(help="Shards in the making at a time; 0 is what suits the models.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the report, figures and all, to this JSON file.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Tell what a synthetic data set costs: samples an hour, time and money, joules."""
    from mi2rage_benchmarks.cost_report import lines_of
    from mi2rage_benchmarks.cost_request import CostRequest, cost_of
    from mi2rage_engines.errors import InputError
    from mi2rage_rt.files import atomic_text
    from mi2rage_training.chain_config import ChainConfig, Decoding, ImageFormat
    from mi2rage_training.choices import choice

    if (place is None) == (figures is None):
        came = "neither a store or bundle nor --figures" if place is None else f"{place} and --figures {figures}"
        raise InputError(f"cost: came {came}; expected one of them; give a store, a bundle, or --figures FILE")
    encoding: dict[str, Any] = {"jpeg_quality": jpeg_quality, "png_level": png_level}
    config = ChainConfig(
        links=links,
        width=width,
        seed=seed,
        shard_size=shard_size,
        image_format=choice(ImageFormat, image_format, "image format"),
        decoding=choice(Decoding, decoding, "decoding"),
        **{name: value for name, value in encoding.items() if value is not None},
    )
    report = cost_of(
        CostRequest(
            place=place,
            figures=figures,
            texts=texts,
            run=run,
            check=check,
            samples=samples,
            devices=devices,
            price_per_hour=price_per_hour,
            selected=selected,
            kept_share=kept_share,
            power=power,
            chain=config,
            steps=steps,
            guidance_scale=guidance,
            in_flight=in_flight,
            device=device,
        )
    )
    document = report.model_dump_json(indent=2)
    if out is not None:
        with atomic_text(out) as file:
            file.write(document + "\n")
    typer.echo(document if as_json else "\n".join(lines_of(report)))
