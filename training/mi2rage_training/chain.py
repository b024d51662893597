"""Chained Cross-modal Generation into a store, shard by shard.

Du, Li, Guo, Li, *Training on Synthetic Data Beats Real Data in Multimodal Relation Extraction*. The number of links,
the prompts, the decoding and the judge inside the chain are our choices; `chain_links` says what is made from what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import steps
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_rt.samples import json_from_sample
from mi2rage_training.chain_config import ChainConfig, Decoding, Given, ImageFormat
from mi2rage_training.chain_links import Links
from mi2rage_training.chain_places import adds_too_little
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.stages import Overlap, Stages, usual_overlap
from mi2rage_training.store import StoreManifest, StorePlace, StoreWriter, read_columns

__all__ = [
    "ChainConfig",
    "Decoding",
    "Given",
    "ImageFormat",
    "Overlap",
    "children_not_made",
    "synthesize",
    "usual_overlap",
]


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
    out: StorePlace,
    generator: TextToImage,
    captioner: ImageToText,
    config: ChainConfig,
    models: dict[str, Any] | None = None,
    judge: Judge | None = None,
    overlap: Overlap | None = None,
) -> StoreManifest:
    """Make the candidates of every real sample into the store `out`; goes on where an earlier run stopped.

    Args:
        out: a folder or an address, see `store_files`. A damaged shard is made again, of a finished store too.
        pairs: labelled; with images where `config.given` is `image`, without one used where it is `text`.
        models: what else decides what is made, as JSON values (source, denoising steps, guidance scale, ...); kept in
            the store's settings, so that an unfinished store is never gone on with by other means.
        judge: scores children before they have children.
        overlap: what is done at a time; by default what suits the models, see `usual_overlap`. It changes no byte.

    Raises:
        DataError: a sample has no label, or no image where images are given.
        InputError: `out` was begun with other settings, or is something else; or `config` asks for a judge, and there
            is none.
        what a model or the disk raised, as it was: then, as after Ctrl-C, the finished shards are there, whole.
    """
    _check(pairs, config, judge)
    starts = range(0, len(pairs), config.shard_size)
    with steps("synthesize", len(starts)) as bar, Stages(overlap or usual_overlap(generator, captioner)) as stages:
        shared = None if judge is None else stages.judge(judge)
        links = Links(stages.generator(generator), stages.captioner(captioner), config, shared, stages.encoders)
        writer = StoreWriter(out, _settings(pairs, links, models or {}))

        def make(index: int) -> None:
            start = starts[index]
            writer.write(index, links.make(pairs[start : start + config.shard_size]))

        missing = writer.missing(len(starts))
        bar.advance(len(starts) - len(missing))
        for _ in stages.done(missing, make):
            bar.advance()
        return writer.finish(len(starts))


def _check(pairs: Sequence[Pair], config: ChainConfig, judge: Judge | None) -> None:
    if config.least_added_nats is not None and judge is None:
        raise InputError(
            f"least added nats: came {config.least_added_nats} without a judge; expected one, which says what a child "
            "adds; give the teachers of an earlier selection (--judge), or leave it out"
        )
    for pair in pairs:
        if pair.sample.label is None:
            raise DataError(
                f"sample {pair.sample.id}: has no label; expected one, for its children take it over; add it"
            )
        if config.given is Given.IMAGE and pair.image is None:
            raise DataError(
                f"sample {pair.sample.id}: has no image; expected one, since images are given; add it, or give texts"
            )


def children_not_made(store: StorePlace, config: ChainConfig) -> int:
    """How many children the chains of a finished store were spared by `config.least_added_nats`.

    Counted as if none of them had been given up, as a duplicate for instance.
    """
    if config.least_added_nats is None:
        return 0
    rows = (row for table in read_columns(store, ("link", "added_nats")) for row in table.to_pylist())
    return sum(config.links - row["link"] for row in rows if adds_too_little(row["added_nats"], config))
