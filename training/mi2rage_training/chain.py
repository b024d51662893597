"""Chained Cross-modal Generation into a store, shard by shard.

Du, Li, Guo, Li, *Training on Synthetic Data Beats Real Data in Multimodal Relation Extraction*. The number of links,
the prompts, the decoding and the judge inside the chain are our choices; `chain_links` says what is made from what.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import DataError
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import track
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_rt.samples import json_from_sample
from mi2rage_training.chain_config import ChainConfig, Decoding, Given, ImageFormat
from mi2rage_training.chain_links import Links
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.store import StoreManifest, StoreWriter

__all__ = ["ChainConfig", "Decoding", "Given", "ImageFormat", "synthesize"]


def _settings(pairs: Sequence[Pair], links: Links, models: dict[str, Any]) -> dict[str, Any]:
    fingerprint = seed_from(*(json_from_sample(pair.sample) for pair in pairs))
    return {
        "step": "synthesize",
        "chain": links.config.described(),
        **links.models,
        "models": models,
        "samples": len(pairs),
        "samples_fingerprint": f"{fingerprint:016x}",
    }


def synthesize(
    pairs: Sequence[Pair],
    out: Path,
    generator: TextToImage,
    captioner: ImageToText,
    config: ChainConfig,
    models: dict[str, Any] | None = None,
    judge: Judge | None = None,
) -> StoreManifest:
    """Make the candidates of every real sample into the store `out`; goes on where an earlier run stopped.

    Args:
        pairs: labelled; with images where `config.given` is `image`, without one used where it is `text`.
        models: what else decides what is made, as JSON values (source, denoising steps, guidance scale, ...); kept in
            the store's settings, so that an unfinished store is never gone on with by other means.
        judge: scores children before they have children.

    Raises:
        DataError: a sample has no label, or no image where images are given.
        InputError: `out` was begun with other settings, or is something else.
    """
    for pair in pairs:
        if pair.sample.label is None:
            raise DataError(
                f"sample {pair.sample.id}: has no label; expected one, for its children take it over; add it"
            )
        if config.given is Given.IMAGE and pair.image is None:
            raise DataError(
                f"sample {pair.sample.id}: has no image; expected one, since images are given; add it, or give texts"
            )
    links = Links(generator, captioner, config, judge)
    writer = StoreWriter(out, _settings(pairs, links, models or {}))
    starts = range(0, len(pairs), config.shard_size)
    for index, start in enumerate(track(starts, "synthesize", total=len(starts))):
        if not writer.has(index):
            writer.write(index, links.make(pairs[start : start + config.shard_size]))
    return writer.finish(len(starts))
