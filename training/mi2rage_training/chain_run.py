"""A run of the chain over all shards that are missing, wherever they are made: what it is made of, what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import steps
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_rt.samples import json_from_sample
from mi2rage_training.budget import Budget
from mi2rage_training.chain_config import ChainConfig, Given
from mi2rage_training.chain_links import Links
from mi2rage_training.chain_places import adds_too_little
from mi2rage_training.gallery import Gallery, check_gallery
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.shard_work import LeftOut, MadeShard, Shard, ShardWork, left_out_of
from mi2rage_training.stages import Overlap, Stages, usual_overlap
from mi2rage_training.store import StoreManifest, StorePlace, StoreWriter, shard_name
from mi2rage_training.store_rows import table_from
from mi2rage_training.tally import Tally

__all__ = ["Outcome", "RunOptions", "check_pairs", "follow", "make_here", "settings_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run goes; none of it changes what is made.

    Attributes:
        tries: of a shard whose making fails, before the samples at fault are left out; 0 stops at the first error.
        budget: when it stops of itself.
        gallery: HTML file that shows samples, and grows while the run goes on.
        begun_s: `time.monotonic()` at the start of what the budget counts.
    """

    tries: int = 0
    budget: Budget = dataclasses.field(default_factory=Budget)
    gallery: Path | None = None
    begun_s: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        manifest: of the shards that are there, from the first on; None where there are none.
        shards, samples: of the whole store; real samples.
        tally: of what this run made.
        left_out: samples that the store lacks because nothing could be made of them.
        stopped: which limit was reached before all was made, in words.
    """

    manifest: StoreManifest | None
    shards: int
    samples: int
    tally: Tally
    left_out: tuple[LeftOut, ...] = ()
    stopped: str | None = None

    def figures(self, config: ChainConfig, not_made: int) -> dict[str, Any]:
        """What is in the store, and what is not, as JSON values.

        Args:
            not_made: children that the judge spared, see `chain.children_not_made`.
        """
        rows, shards = (0, 0) if self.manifest is None else (self.manifest.rows, len(self.manifest.shards))
        tried = min(shards * config.shard_size, self.samples) - len(self.left_out)
        dropped = config.links * config.width * tried - rows - not_made
        found: dict[str, Any] = {"candidates": rows, "dropped": dropped, "shards": shards}
        if config.least_added_nats is not None:
            found["not_made"] = not_made
        if self.left_out:
            found["left_out"] = len(self.left_out)
        if self.stopped is not None:
            found["stopped"] = self.stopped
        return found

    def explain_stop(self) -> str:
        """A message on a run that stopped of itself."""
        made = 0 if self.manifest is None else len(self.manifest.shards)
        usable = " and can be used as they are" if made else ""
        return (
            f"stopped: {self.stopped}; {made} of {self.shards} shards are made{usable}; give the same command again to "
            "go on"
        )


def settings_of(
    pairs: Sequence[Pair], config: ChainConfig, names: dict[str, str], models: dict[str, Any]
) -> dict[str, Any]:
    """What decides what is in a store, as JSON values.

    Args:
        names: of the models, by their part in the chain.
        models: how they are used.
    """
    fingerprint = seed_from(*(json_from_sample(pair.sample) for pair in pairs))
    return {
        "step": "synthesize",
        "chain": config.described(),
        **names,
        "models": models,
        "samples": len(pairs),
        "samples_fingerprint": f"{fingerprint:016x}",
    }


def check_pairs(pairs: Sequence[Pair], config: ChainConfig, *, judged: bool) -> None:
    """Refuse what no chain can be made of.

    Raises:
        DataError: a sample has no label, or no image where images are given.
        InputError: `config` asks for a judge, and there is none.
    """
    if config.least_added_nats is not None and not judged:
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


def follow(
    pairs: Sequence[Pair],
    writer: StoreWriter,
    config: ChainConfig,
    options: RunOptions,
    making: Callable[[Iterable[Shard]], Iterator[MadeShard]],
) -> Outcome:
    """Have every missing shard made, in order, within the budget; show how it goes; write the manifest.

    Args:
        making: takes shards as it is ready to make them, and yields each that is made and written.
    """
    starts = range(0, len(pairs), config.shard_size)
    missing = writer.missing(len(starts))
    there = sorted(set(range(len(starts))) - set(missing))
    tally, before = Tally(), _kept_before(writer, there, config) if options.budget.kept is not None else 0
    gallery = None if options.gallery is None else Gallery(options.gallery, judged=config.least_added_nats is not None)
    stopped: str | None = None

    def wanted() -> Iterator[Shard]:
        nonlocal stopped
        for index in missing:
            stopped = options.budget.reached(time.monotonic() - options.begun_s, before + tally.kept)
            if stopped is not None:
                return
            shown = tuple(pairs[starts[index] : starts[index] + config.shard_size])
            yield Shard(index, shown, proven=bool(there) or tally.rows > 0)

    with steps("synthesize", len(pairs)) as bar:
        bar.advance(sum(len(pairs[starts[index] : starts[index] + config.shard_size]) for index in there))
        for made in making(wanted()):
            writer.take_over(made.index, made.record, made.tally.rows)
            tally += made.tally
            bar.advance(made.tally.samples + len(made.left_out))
            bar.note(tally.described(judged=config.least_added_nats is not None))
            if gallery is not None:
                kept = [not adds_too_little(row.added_nats, config) for row in made.shown]
                gallery.add(made.shown, tally, kept)
    if gallery is not None:
        gallery.write(tally)
    # Shards are begun in order, and what was begun is finished: what is there is the first of them.
    done = min(writer.missing(len(starts)), default=len(starts)) if stopped else len(starts)
    manifest = writer.finish(done) if done or not starts else None
    return Outcome(manifest, len(starts), len(pairs), tally, tuple(left_out_of(writer.files)), stopped)


def _kept_before(writer: StoreWriter, there: Sequence[int], config: ChainConfig) -> int:
    names = ("label", "link", "added_nats")
    tally = Tally()
    for index in there:
        with writer.files.open(shard_name(index)) as file:
            columns = [table_from(file, names)[name].to_pylist() for name in names]
        tally += Tally.of_scores(zip(*columns, strict=True), 0, config)
    return tally.kept


def make_here(
    pairs: Sequence[Pair],
    out: StorePlace,
    generator: TextToImage,
    captioner: ImageToText,
    config: ChainConfig,
    models: dict[str, Any] | None = None,
    judge: Judge | None = None,
    overlap: Overlap | None = None,
    options: RunOptions | None = None,
) -> Outcome:
    """Make the candidates of every real sample in this process; see `chain.synthesize`."""
    options = options or RunOptions()
    check_pairs(pairs, config, judged=judge is not None)
    check_gallery(options.gallery)
    with Stages(overlap or usual_overlap(generator, captioner)) as stages:
        shared = None if judge is None else stages.judge(judge)
        links = Links(stages.generator(generator), stages.captioner(captioner), config, shared, stages.encoders)
        writer = StoreWriter(out, settings_of(pairs, config, links.models, models or {}))
        work = ShardWork(links, writer, options.tries, lambda: stages.given_up, options.gallery is not None)

        def making(shards: Iterable[Shard]) -> Iterator[MadeShard]:
            made: dict[int, MadeShard] = {}

            def make(shard: Shard) -> None:
                made[shard.index] = work.make(shard)

            for shard in stages.done(shards, make):
                yield made.pop(shard.index)

        return follow(pairs, writer, config, options, making)
