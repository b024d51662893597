"""Chained Cross-modal Generation, text setting: sentence T0 -> image I1 -> caption C1 -> image I2 -> ...

Each (T0, Ik) is a candidate pair with T0's label (Du, Li, Guo, Li, *Training on Synthetic Data Beats Real Data in
Multimodal Relation Extraction*). The number of links, the prompts and the decoding are our choices: the sentence
itself is the first prompt, the caption alone the next, captions are sampled from the nucleus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.images import encode_image
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import track
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_rt.samples import Provenance, Sample, json_from_sample
from mi2rage_training.store import Candidate, StoreManifest, StoreWriter

__all__ = ["ChainConfig", "ImageFormat", "candidates_from_samples", "synthesize"]


class ImageFormat(StrEnum):
    """How images are encoded in the store: `png` keeps every pixel, `jpeg` is smaller and faster."""

    PNG = "png"
    JPEG = "jpeg"


@dataclasses.dataclass(frozen=True, slots=True)
class ChainConfig:
    """How long and how wide the chains are.

    Attributes:
        links: images made one after the other from each sentence, 1 or more (1 is direct generation).
        width: independent chains a sentence, 1 or more.
        seed: of the whole run.
        shard_size: sentences a shard; part of the settings, since a batch's shape can change its last bits.
        image_format: of the images in the store.
    """

    links: int = 3
    width: int = 1
    seed: int = 0
    shard_size: int = 32
    image_format: ImageFormat = ImageFormat.PNG

    def __post_init__(self) -> None:
        for name in ("links", "width", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 1 or more")


def candidates_from_samples(
    samples: Sequence[Sample], generator: TextToImage, captioner: ImageToText, config: ChainConfig
) -> list[Candidate]:
    """Run the chains of some sentences, all of a link in one batch.

    The noise of a child is keyed by (run seed, sample id, link, child) alone: other samples do not change it.

    Returns:
        `links * width` candidates for each sample, ordered by sample, child and link.
    """
    keys = [(sample, child) for sample in samples for child in range(config.width)]
    prompts = [sample.text for sample, _ in keys]
    models = {"generator": generator.name, "captioner": captioner.name}
    chains: list[list[Candidate]] = [[] for _ in keys]
    for link in range(1, config.links + 1):
        seeds = [seed_from(config.seed, sample.id, link, child, "image") for sample, child in keys]
        images = generator.generate(prompts, seeds)
        captions: list[str] | list[None] = [None] * len(keys)
        if link < config.links:
            draws = [seed_from(config.seed, sample.id, link, child, "caption") for sample, child in keys]
            captions = captioner.caption(list(images), seeds=draws)
        for row, (sample, child) in enumerate(keys):
            identity = f"{sample.id}/{child}.{link}"
            made = dataclasses.replace(
                sample,
                id=identity,
                image=f"{identity.replace('/', '-')}.{config.image_format}",
                provenance=Provenance(sample.id, link, child, seeds[row], models),
            )
            encoded = encode_image(images[row], config.image_format.value)
            chains[row].append(Candidate(made, encoded, prompts[row], captions[row]))
        prompts = [caption or prompt for caption, prompt in zip(captions, prompts, strict=True)]
    return [candidate for chain in chains for candidate in chain]


def _settings(
    samples: Sequence[Sample],
    config: ChainConfig,
    generator: TextToImage,
    captioner: ImageToText,
    models: dict[str, Any],
) -> dict[str, Any]:
    fingerprint = seed_from(*(json_from_sample(sample) for sample in samples))
    return {
        "step": "synthesize",
        "chain": dataclasses.asdict(config),
        "generator": generator.name,
        "captioner": captioner.name,
        "models": models,
        "samples": len(samples),
        "samples_fingerprint": f"{fingerprint:016x}",
    }


def synthesize(
    samples: Sequence[Sample],
    out: Path,
    generator: TextToImage,
    captioner: ImageToText,
    config: ChainConfig,
    models: dict[str, Any] | None = None,
) -> StoreManifest:
    """Make the candidates of every sample into the store `out`; goes on where an earlier run stopped.

    Args:
        models: what else decides the images, as JSON values (source, denoising steps, guidance scale, ...); kept in the
            store's settings, so that an unfinished store is never gone on with by other means.

    Raises:
        DataError: a sample has no label.
        InputError: `out` was begun with other settings, or is something else.
    """
    for sample in samples:
        if sample.label is None:
            raise DataError(f"sample {sample.id}: has no label; the text setting needs labelled sentences")
    writer = StoreWriter(out, _settings(samples, config, generator, captioner, models or {}))
    starts = range(0, len(samples), config.shard_size)
    for index, start in enumerate(track(starts, "synthesize", total=len(starts))):
        if not writer.has(index):
            shard = samples[start : start + config.shard_size]
            writer.write(index, candidates_from_samples(shard, generator, captioner, config))
    return writer.finish(len(starts))
