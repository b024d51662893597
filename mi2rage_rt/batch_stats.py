"""What a micro-batcher counts, for metrics."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

__all__ = ["BatchStats", "Histogram", "Tally"]

_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TIMES_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 3e4, 6e4)
_DECAY = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by size, of constant memory whatever is counted.

    Attributes:
        bounds: upper bounds of the buckets, ascending, each inclusive; the last bucket has none.
        counts: values in each bucket, not summed up; one more than bounds.
        total: sum of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchStats:
    """A batcher's state and what it has counted since it was made.

    Every request that was taken is queued, running, answered, failed, cancelled or late.

    Attributes:
        queued, running: requests now.
        answered: requests with a result, cancelled while they ran or not.
        failed: requests that ended in an error of the model, or of a batcher that was closed.
        cancelled: requests withdrawn before they ran.
        late: requests whose deadline passed before they ran.
        rejected: requests that were not taken, the queue being full.
        items_per_s: requests that the worker gets done a second while it works, later batches counting more; None
            before the first.
        batch_sizes: requests of a batch.
        wait_ms: of each request that ran, from its arrival to the start of its batch.
        compute_ms: of each batch.
    """

    queued: int
    running: int
    answered: int
    failed: int
    cancelled: int
    late: int
    rejected: int
    items_per_s: float | None
    batch_sizes: Histogram
    wait_ms: Histogram
    compute_ms: Histogram


class _Counts:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def frozen(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


class Tally:
    """The counters behind `BatchStats`. Not safe in threads: the batcher holds its lock around every call."""

    def __init__(self) -> None:
        self.running = 0
        self.answered = 0
        self.failed = 0
        self.cancelled = 0
        self.late = 0
        self.rejected = 0
        self._sizes = _Counts(_SIZES)
        self._wait_ms = _Counts(_TIMES_MS)
        self._compute_ms = _Counts(_TIMES_MS)
        self._recent_items = 0.0
        self._recent_s = 0.0

    @property
    def items_per_s(self) -> float | None:
        """See `BatchStats`."""
        return self._recent_items / self._recent_s if self._recent_s > 0 else None

    def start(self, waits_s: Sequence[float]) -> None:
        """A batch starts; each of its requests waited as long as this."""
        self.running = len(waits_s)
        self._sizes.add(len(waits_s))
        for wait_s in waits_s:
            self._wait_ms.add(wait_s * 1e3)

    def end(self, failed: int, compute_s: float) -> None:
        """The running batch ends, with `failed` requests in error."""
        self._recent_items = _DECAY * self._recent_items + self.running
        self._recent_s = _DECAY * self._recent_s + compute_s
        self._compute_ms.add(compute_s * 1e3)
        self.answered += self.running - failed
        self.failed += failed
        self.running = 0

    def snapshot(self, queued: int) -> BatchStats:
        """All of it, frozen."""
        return BatchStats(
            queued=queued,
            running=self.running,
            answered=self.answered,
            failed=self.failed,
            cancelled=self.cancelled,
            late=self.late,
            rejected=self.rejected,
            items_per_s=self.items_per_s,
            batch_sizes=self._sizes.frozen(),
            wait_ms=self._wait_ms.frozen(),
            compute_ms=self._compute_ms.frozen(),
        )
