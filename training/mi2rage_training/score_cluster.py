"""The candidates of a store scored by fitted teachers on the workers of a Ray cluster, a shard at a time."""

from __future__ import annotations

import dataclasses
import functools

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import Mi2rageError
from mi2rage_rt.progress import steps
from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_rt.worker_pool import WorkerPool
from mi2rage_training.store import StorePlace, read_manifest, read_shard
from mi2rage_training.store_files import absolute, files_at
from mi2rage_training.store_rows import batches_from, candidates_from
from mi2rage_training.teacher import Teachers
from mi2rage_training.teacher_sample import LogProbabilities, joined, score_some

__all__ = ["score_on_cluster"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    index: int
    name: str
    record: FileRecord


def _begin(teachers: Teachers, threads: int) -> Teachers:
    import torch

    torch.set_num_threads(threads)
    return teachers


def _score(place: StorePlace, teachers: Teachers, shard: _Shard) -> LogProbabilities:
    content = read_shard(files_at(place), shard.name, shard.record)
    return score_some(teachers, candidates_from(batches_from(content)))


def score_on_cluster(teachers: Teachers, place: StorePlace, pool: PoolOptions) -> LogProbabilities:
    """What the teachers say of every candidate of a store that all workers reach; the teachers are sent to them.

    Raises:
        MissingExtraError: Ray is not installed.
        DataError: a shard is missing or was changed.
        Mi2rageError: every worker that scored a shard died.
    """
    place = absolute(place)
    shards = [_Shard(index, *item) for index, item in enumerate(read_manifest(place).shards.items())]
    found: dict[int, LogProbabilities] = {}
    with (
        WorkerPool(pool, functools.partial(_begin, teachers, pool.threads)) as workers,
        steps("score", len(shards)) as bar,
    ):
        for done in workers.done(shards, functools.partial(_score, place)):
            if done.result is None:
                raise Mi2rageError(
                    f"{place}: every worker that scored {done.item.name} died; expected workers that have memory for a "
                    "shard and the teachers; give fewer workers, or more to each, and see Ray's logs"
                )
            found[done.item.index] = done.result
            bar.advance()
    return joined([found[index] for index in range(len(shards))])
