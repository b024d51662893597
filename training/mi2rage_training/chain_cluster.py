"""The chain on the workers of a Ray cluster: the same store, to the byte, as one process makes.

A worker loads the models once, is given whole shards, and writes them into the store itself; only a shard's number,
its real samples and a few figures travel. The store must be where all can reach it: a shared folder, or an address.
Bytes are the same where the workers compute as the one process does: the same kind of device, and as many threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import InputError, Mi2rageError
from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_rt.worker_pool import WorkerPool
from mi2rage_training.chain_config import ChainConfig, Given
from mi2rage_training.chain_links import Links
from mi2rage_training.chain_models import ChainModels, ModelChoice
from mi2rage_training.chain_run import Outcome, RunOptions, check_pairs, follow, make_here, settings_of
from mi2rage_training.gallery import check_gallery
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.shard_work import LeftOut, MadeShard, Shard, ShardWork
from mi2rage_training.store import StorePlace, StoreWriter
from mi2rage_training.store_files import absolute

__all__ = ["cluster_workers", "make_by", "make_on_cluster", "make_wherever"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What a worker keeps."""

    models: ChainModels
    judge: Judge | None
    encoders: Executor

    def links(self, config: ChainConfig) -> Links:
        return Links(self.models.generator, self.models.captioner, config, self.judge, self.encoders)


@dataclasses.dataclass(frozen=True, slots=True)
class _About:
    """What the run needs to know of the models, and has no need to load them for."""

    names: dict[str, str]
    described: dict[str, Any]
    text_prefixes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """What a worker does with a shard, or with one sample of it."""

    out: StorePlace
    settings: dict[str, Any]
    config: ChainConfig
    tries: int
    showing: bool

    def work(self, loaded: _Loaded) -> ShardWork:
        writer = StoreWriter(self.out, self.settings)
        return ShardWork(loaded.links(self.config), writer, self.tries, showing=self.showing)


def _begin(choice: ModelChoice) -> _Loaded:
    if choice.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(choice.threads)
    encoders = ThreadPoolExecutor(choice.threads, thread_name_prefix="chain-encoder")
    return _Loaded(choice.load(), choice.load_judge(), encoders)


def _about(loaded: _Loaded) -> _About:
    links = loaded.links(ChainConfig())
    return _About(links.models, loaded.models.described, loaded.models.text_prefixes)


def _make(task: _Task, loaded: _Loaded, shard: Shard) -> MadeShard:
    return task.work(loaded).make(shard)


def _try_out(task: _Task, loaded: _Loaded, pair: Pair) -> LeftOut | None:
    return task.work(loaded).try_out(pair)


def make_wherever(
    pairs: Sequence[Pair],
    out: StorePlace,
    choice: ModelChoice,
    config: ChainConfig,
    options: RunOptions,
    pool: PoolOptions | None = None,
    in_flight: int = 0,
) -> Outcome:
    """Make the candidates of every real sample on a cluster, or where there are no `pool` options in this process.

    Args:
        in_flight: shards in the making at a time, in this process; 0 is what suits the models.

    Raises:
        InputError: `in_flight` came with `pool`; and what `make_on_cluster` or `make_here` raises.
    """
    if pool is not None:
        if in_flight:
            raise InputError(
                f"--in-flight {in_flight}: came with --ray; expected it without, for a worker makes one shard at a "
                "time; have several workers share a GPU instead, e.g. --gpus-per-worker 0.5"
            )
        return make_on_cluster(pairs, out, choice, config, pool, options)
    models = choice.load()
    if config.given is Given.IMAGE and not config.prefixes:
        config = dataclasses.replace(config, prefixes=models.text_prefixes)
    overlap = models.overlap_of(in_flight)
    judge = choice.load_judge()
    return make_here(pairs, out, models.generator, models.captioner, config, models.described, judge, overlap, options)


def make_on_cluster(
    pairs: Sequence[Pair],
    out: StorePlace,
    choice: ModelChoice,
    config: ChainConfig,
    pool: PoolOptions,
    options: RunOptions | None = None,
) -> Outcome:
    """Make the candidates of every real sample on a cluster; goes on where an earlier run, of any kind, stopped.

    Args:
        pairs, config: as for `chain.synthesize`. Image files are read by the workers, where they are.
        out: a folder that all machines share, or an address.
        choice: the models, which every worker loads.
        pool: the workers.

    Raises:
        what `synthesize` does, and MissingExtraError where Ray is not installed.
    """
    options = options or RunOptions()
    check_pairs(pairs, config, judged=choice.judge is not None)
    check_gallery(options.gallery)
    with contextlib.ExitStack() as ending, cluster_workers(choice, pool) as workers:
        return make_by(workers, pairs, out, config, options, ending)


def cluster_workers(choice: ModelChoice, pool: PoolOptions) -> WorkerPool:
    """Workers that load the models; raises as `WorkerPool`."""
    bundle, judge = (None if folder is None else folder.absolute() for folder in (choice.bundle, choice.judge))
    choice = dataclasses.replace(choice, bundle=bundle, judge=judge, threads=pool.threads)
    return WorkerPool(pool, functools.partial(_begin, choice))


def make_by(
    workers: WorkerPool,
    pairs: Sequence[Pair],
    out: StorePlace,
    config: ChainConfig,
    options: RunOptions,
    ending: contextlib.ExitStack,
) -> Outcome:
    """Make the candidates by workers that are there already; see `make_on_cluster`.

    Args:
        workers: of `cluster_workers`.
        ending: is closed when the workers are gone, and removes what they had begun to write.
    """
    about = workers.ask(_about)
    if config.given is Given.IMAGE and not config.prefixes:
        config = dataclasses.replace(config, prefixes=about.text_prefixes)
    settings = settings_of(pairs, config, about.names, about.described)
    place = absolute(out)
    task = _Task(place, settings, config, options.tries, options.gallery is not None)
    pairs = [_anywhere(pair) for pair in pairs]
    writer = StoreWriter(place, settings)
    ending.callback(writer.discard_drafts)

    def making(shards: Iterable[Shard]) -> Iterator[MadeShard]:
        lost: list[Shard] = []
        for done in workers.done(shards, functools.partial(_make, task)):
            if done.result is None:
                lost.append(done.item)
            else:
                yield done.result
        if lost:
            yield from _without_killers(workers, task, lost)

    return follow(pairs, writer, config, options, making)


def _anywhere(pair: Pair) -> Pair:
    """The pair as a process in another folder finds it."""
    return dataclasses.replace(pair, image=pair.image.absolute()) if isinstance(pair.image, Path) else pair


def _without_killers(workers: WorkerPool, task: _Task, lost: Sequence[Shard]) -> Iterator[MadeShard]:
    """Shards that killed worker after worker, without the samples that do so when they are made alone."""
    if not task.tries:
        raise _every_worker_died(task, lost[0], "expected models and samples that kill no process")
    logger.warning(
        "%s: every worker that made %s died; making their samples one by one",
        task.out,
        ", ".join(f"shard {shard.index}" for shard in lost),
    )
    killers: dict[str, LeftOut] = {}
    pairs = [pair for shard in lost for pair in shard.pairs]
    for tried in workers.done(pairs, functools.partial(_try_out, task)):
        if tried.lost:
            identity = tried.item.sample.id
            killers[identity] = LeftOut(identity, "every worker that made it died")
    if len(killers) == len(pairs) and not any(shard.proven for shard in lost):
        raise _every_worker_died(task, lost[0], "nothing was ever made; expected models that fit into a worker")
    shards = [
        dataclasses.replace(
            shard, left_out=tuple(killers[pair.sample.id] for pair in shard.pairs if pair.sample.id in killers)
        )
        for shard in lost
    ]
    for done in workers.done(shards, functools.partial(_make, task)):
        if done.result is None:
            raise _every_worker_died(
                task, done.item, "no sample of it alone is at fault; expected workers that have memory for a shard"
            )
        yield done.result


def _every_worker_died(task: _Task, shard: Shard, why: str) -> Mi2rageError:
    return Mi2rageError(
        f"{task.out}: every worker that made shard {shard.index} died; {why}; give a smaller --shard-size, or more "
        "memory to each worker, and see Ray's logs"
    )
