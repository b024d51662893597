"""Chained Cross-modal Generation into a store, shard by shard.

Du, Li, Guo, Li, *Training on Synthetic Data Beats Real Data in Multimodal Relation Extraction*. The number of links,
the prompts, the decoding and the judge inside the chain are our choices; `chain_links` says what is made from what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_training.chain_config import ChainConfig, Decoding, Given, ImageFormat
from mi2rage_training.chain_places import adds_too_little
from mi2rage_training.chain_run import make_here
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.stages import Overlap, usual_overlap
from mi2rage_training.store import StoreManifest, StorePlace, read_columns

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
    outcome = make_here(pairs, out, generator, captioner, config, models, judge, overlap)
    assert outcome.manifest is not None  # without a budget all shards are made
    return outcome.manifest


def children_not_made(store: StorePlace, config: ChainConfig) -> int:
    """How many children the chains of a finished store were spared by `config.least_added_nats`.

    Counted as if none of them had been given up, as a duplicate for instance.
    """
    if config.least_added_nats is None:
        return 0
    rows = (row for table in read_columns(store, ("link", "added_nats")) for row in table.to_pylist())
    return sum(config.links - row["link"] for row in rows if adds_too_little(row["added_nats"], config))
