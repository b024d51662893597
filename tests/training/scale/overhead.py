"""What Ray costs beyond the work: workers of a local cluster against as many plain processes, on the same chains.

    OMP_NUM_THREADS=1 python -m tests.training.scale.overhead [--workers 2] [--rounds 5] [--samples 96]
        [--models embedded|waiting]

Both sides have the same models loaded in the same number of processes, one thread each, and have made something,
before the clock starts; a plain process makes every n-th shard of the samples into a store of its own. The sides take
turns. Prints the seconds of each round, and the ratio of the sides' medians. With `--models waiting` the models do
nothing but wait 0.1 s a call, as a GPU would have a CPU wait, so that the machine's cores do not matter. The cluster's
store is compared with that of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_training.chain_cluster import cluster_workers, make_by
from mi2rage_training.chain_config import ChainConfig
from mi2rage_training.chain_models import ChainModels, ModelChoice
from mi2rage_training.chain_run import RunOptions, make_here
from mi2rage_training.pairs import Pair
from mi2rage_training.store import MANIFEST_NAME
from tests.training.fakes import MeanCaptioner, NoiseGenerator, samples

_CONFIG = ChainConfig(links=2, shard_size=8)


class _Waiting(NoiseGenerator):
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        time.sleep(0.1)
        return super().generate(prompts, seeds)


@dataclasses.dataclass(frozen=True)
class WaitingChoice(ModelChoice):
    """Models that take time and no core."""

    def load(self) -> ChainModels:
        return ChainModels(_Waiting(), MeanCaptioner(), {})


def _plain(choice: ModelChoice, pairs: Sequence[Pair], out: Path, ready: Any, ends: Any) -> None:
    models = choice.load()
    make_here(pairs[:1], out / "warm-up", models.generator, models.captioner, _CONFIG, models.described)
    out = out / "store"
    ready.wait()
    begun = time.monotonic()
    make_here(pairs, out, models.generator, models.captioner, _CONFIG, models.described)
    ends.put((begun, time.monotonic()))


def plain_seconds(choice: ModelChoice, pairs: Sequence[Pair], folder: Path, processes: int) -> float:
    """From the first process's start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    ready, ends = context.Barrier(processes), context.Queue()
    shards = [pairs[start : start + _CONFIG.shard_size] for start in range(0, len(pairs), _CONFIG.shard_size)]
    shares = [[pair for shard in shards[part::processes] for pair in shard] for part in range(processes)]
    children = [
        context.Process(target=_plain, args=(choice, share, folder / str(part), ready, ends))
        for part, share in enumerate(shares)
    ]
    for child in children:
        child.start()
    times = [ends.get() for _ in children]
    for child in children:
        child.join()
    return max(end for _, end in times) - min(begun for begun, _ in times)


def _nothing(_: object, item: int) -> int:
    time.sleep(0.2)
    return item


def cluster_seconds(choice: ModelChoice, pairs: Sequence[Pair], out: Path, workers: int) -> float:
    """The same of the workers, all of which have started."""
    with contextlib.ExitStack() as ending, cluster_workers(choice, PoolOptions(workers=workers)) as pool:
        while pool.size < workers:
            list(pool.done(range(1), _nothing))
        warm_up = pairs[: 2 * workers * _CONFIG.shard_size]
        make_by(pool, warm_up, out.with_name(f"{out.name}-warm-up"), _CONFIG, RunOptions(), ending)
        begun = time.monotonic()
        make_by(pool, pairs, out, _CONFIG, RunOptions(), ending)
        return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--models", choices=["embedded", "waiting"], default="embedded")
    options = parser.parse_args()
    choice = ModelChoice(device="cpu") if options.models == "embedded" else WaitingChoice()
    pairs = [Pair(sample) for sample in samples(options.samples)]
    found: dict[str, list[float]] = {"plain": [], "cluster": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = choice.load()
        make_here(pairs, folder / "one", models.generator, models.captioner, _CONFIG, models.described)
        expected = (folder / "one" / MANIFEST_NAME).read_bytes()
        sides = {
            "plain": functools.partial(plain_seconds, processes=options.workers),
            "cluster": functools.partial(cluster_seconds, workers=options.workers),
        }
        for turn in range(options.rounds):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                out = folder / f"{side}-{turn}"
                found[side].append(sides[side](choice, pairs, out))
                print(f"{side} {found[side][-1]:.2f} s", file=sys.stderr, flush=True)
            if (folder / f"cluster-{turn}" / MANIFEST_NAME).read_bytes() != expected:
                raise AssertionError("the cluster's store is another than that of one process")
    ratio = statistics.median(found["cluster"]) / statistics.median(found["plain"])
    print(json.dumps({**vars(options), **found, "overhead": ratio - 1}, indent=2))


if __name__ == "__main__":
    main()
