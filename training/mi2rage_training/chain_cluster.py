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
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import InputError, Mi2rageError
from mi2rage_rt.worker_pool import PoolOptions, WorkerPool
from mi2rage_training.chain_config import ChainConfig, Given
from mi2rage_training.chain_links import Links
from mi2rage_training.chain_models import ChainModels, Sampling, models_from
from mi2rage_training.chain_run import Outcome, RunOptions, check_pairs, follow, settings_of
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.shard_work import LeftOut, MadeShard, Shard, ShardWork
from mi2rage_training.store import StorePlace, StoreWriter

__all__ = ["ModelChoice", "cluster_options", "make_on_cluster"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which models to load, in this process or in any other; see `chain_models.models_from`.

    Attributes:
        judge: folder of teachers.
        threads: of the models on a CPU; None leaves it to them.
    """

    bundle: Path | None = None
    generator: str | None = None
    captioner: str | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    judge: Path | None = None
    device: str = "auto"
    threads: int | None = None

    def load(self) -> ChainModels:
        """Raises as `models_from`."""
        return models_from(self.bundle, self.generator, self.captioner, self.sampling, self.device, self.threads)

    def load_judge(self) -> Judge | None:
        """The teachers, None where there are none; raises as `load_teachers`."""
        if self.judge is None:
            return None
        from mi2rage_training.devices import device_from
        from mi2rage_training.teacher_folder import load_teachers

        return load_teachers(self.judge, device_from(self.device))


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What a worker keeps."""

    models: ChainModels
    judge: Judge | None

    def links(self, config: ChainConfig) -> Links:
        return Links(self.models.generator, self.models.captioner, config, self.judge)


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
    return _Loaded(choice.load(), choice.load_judge())


def _about(loaded: _Loaded) -> _About:
    links = loaded.links(ChainConfig())
    return _About(links.models, loaded.models.described, loaded.models.text_prefixes)


def _make(task: _Task, loaded: _Loaded, shard: Shard) -> MadeShard:
    return task.work(loaded).make(shard)


def _try_out(task: _Task, loaded: _Loaded, pair: Pair) -> LeftOut | None:
    return task.work(loaded).try_out(pair)


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
    choice = dataclasses.replace(choice, threads=pool.threads)
    with contextlib.ExitStack() as ending, WorkerPool(pool, functools.partial(_begin, choice)) as workers:
        about = workers.ask(_about)
        if config.given is Given.IMAGE and not config.prefixes:
            config = dataclasses.replace(config, prefixes=about.text_prefixes)
        settings = settings_of(pairs, config, about.names, about.described)
        place = out if isinstance(out, str) and "://" in out else Path(out).absolute()
        task = _Task(place, settings, config, options.tries, options.gallery is not None)
        writer = StoreWriter(place, settings)
        ending.callback(writer.discard_drafts)  # when the workers are gone

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


def cluster_options(
    address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    cpus_per_worker: float,
    tries: int,
    in_flight: int = 0,
) -> PoolOptions | None:
    """The options of `--ray`; None where there is no address.

    Raises:
        InputError: one that has no effect with, or without, an address.
    """
    if address is None:
        names = {"--workers": workers, "--gpus-per-worker": gpus_per_worker}
        alone = [f"{name} {value:g}" for name, value in names.items() if value is not None]
        if alone:
            raise InputError(
                f"{alone[0]}: came without --ray; expected the cluster that has the workers; give --ray local for this "
                "machine, or leave it out"
            )
        return None
    if in_flight:
        raise InputError(
            f"--in-flight {in_flight}: came with --ray; expected it without, for a worker makes one shard at a time; "
            "have several workers share a GPU instead, e.g. --gpus-per-worker 0.5"
        )
    return PoolOptions(address, workers, gpus_per_worker, cpus_per_worker, max(tries, 1))


def _without_killers(workers: WorkerPool, task: _Task, lost: Sequence[Shard]) -> Iterator[MadeShard]:
    """Shards that killed worker after worker, without the samples that do so when they are made alone."""
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
    shards = [
        dataclasses.replace(
            shard, left_out=tuple(killers[pair.sample.id] for pair in shard.pairs if pair.sample.id in killers)
        )
        for shard in lost
    ]
    for done in workers.done(shards, functools.partial(_make, task)):
        if done.result is None:
            raise Mi2rageError(
                f"{task.out}: every worker that made shard {done.item.index} died, and no sample of it alone is at "
                "fault; expected workers that have memory for a shard; give a smaller --shard-size, or more memory to "
                "each worker, and see Ray's logs"
            )
        yield done.result
