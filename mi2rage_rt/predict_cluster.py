"""Predictions of many samples on the workers of a Ray cluster; see `worker_pool`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import Mi2rageError
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.classifier import RuntimeClassifier
from mi2rage_rt.jobs import ROWS_AT_ONCE, Skipped, nothing_left, predict_some
from mi2rage_rt.progress import steps
from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_rt.samples import Sample
from mi2rage_rt.worker_pool import WorkerPool

__all__ = ["ClassifierChoice", "predict_on_cluster"]

_WINDOWS = 8
"""Of rows that are batched together, in a piece of work: so batches are those of one process."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClassifierChoice:
    """Which classifier to load, in any process; see `Bundle.open`.

    Attributes:
        bundle: its folder, which every worker must reach.
        batch_size: samples run together at most.
    """

    bundle: Path
    backend: str = "auto"
    providers: tuple[str, ...] | None = None
    threads: int | None = None
    batch_size: int = 32

    def load(self) -> RuntimeClassifier:
        """The classifier of a bundle that stays open as long as the process lives; raises as `Bundle.open`."""
        bundle = Bundle.open(self.bundle, self.backend, providers=self.providers, threads=self.threads)
        return bundle.classifier(self.batch_size)


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    samples: tuple[Sample, ...]


def _begin(choice: ClassifierChoice) -> RuntimeClassifier:
    return choice.load()


def _predict(
    images: Path | None, skip_bad: bool, fast_jpeg: bool, classifier: RuntimeClassifier, piece: _Piece
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    skipped: list[Skipped] = []
    rows = predict_some(classifier, piece.samples, images, skip_bad=skip_bad, skipped=skipped, fast_jpeg=fast_jpeg)
    return rows, skipped


def predict_on_cluster(
    choice: ClassifierChoice,
    samples: Sequence[Sample],
    images: Path | None,
    pool: PoolOptions,
    *,
    skip_bad: bool = False,
    skipped: list[Skipped] | None = None,
    fast_jpeg: bool = False,
) -> list[dict[str, Any]]:
    """What `jobs.predict_samples` returns, computed by several workers; image files are read by them.

    Raises:
        what that and `WorkerPool` do; Mi2rageError where every worker that is given some samples dies.
    """
    choice = dataclasses.replace(choice, bundle=choice.bundle.absolute(), threads=choice.threads or pool.threads)
    size = _WINDOWS * max(ROWS_AT_ONCE, choice.batch_size)
    pieces = [_Piece(start, tuple(samples[start : start + size])) for start in range(0, len(samples), size)]
    work = functools.partial(_predict, None if images is None else images.absolute(), skip_bad, fast_jpeg)
    found: dict[int, tuple[list[dict[str, Any]], list[Skipped]]] = {}
    with (
        WorkerPool(pool, functools.partial(_begin, choice)) as workers,
        steps("predict", len(samples)) as bar,
    ):
        for done in workers.done(pieces, work):
            first, last = done.item.samples[0].id, done.item.samples[-1].id
            if done.result is None:
                raise Mi2rageError(
                    f"samples {first} to {last}: every worker that was given them died; expected workers that have "
                    "memory for a batch, and images that do no harm; give a smaller --batch-size, or more to each "
                    "worker, and see Ray's logs"
                )
            found[done.item.start] = done.result
            bar.advance(len(done.item.samples))
    rows = [row for start in sorted(found) for row in found[start][0]]
    if skipped is not None:
        skipped += [sample for start in sorted(found) for sample in found[start][1]]
    if not rows:
        raise nothing_left(len(samples))
    return rows
