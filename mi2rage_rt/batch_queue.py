"""Which requests run together, and when: the micro-batcher's queue, without threads and without a clock of its own."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from mi2rage_engines.errors import InputError

__all__ = ["BatchOptions", "BatchQueue", "Ticket"]

T = TypeVar("T")

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class BatchOptions:
    """How requests are put together.

    Attributes:
        max_batch: requests of a batch at most.
        max_wait_ms: how long a free worker waits for more at most, where more are likely to come (see
            `BatchQueue.due_s`); a full batch and the requests of a lone client start at once. 0 never waits.
        max_queue: requests that may wait, those that run not counted.

    Raises:
        InputError: a number is out of range.
    """

    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 256

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not (self.max_wait_ms >= 0 and math.isfinite(self.max_wait_ms)):
            raise InputError(f"max_wait_ms {self.max_wait_ms}: expected 0 or more milliseconds, e.g. 5")


@dataclasses.dataclass(eq=False, slots=True)
class Ticket(Generic[T]):
    """One request that waits.

    Attributes:
        item: what is to be computed.
        key: only requests of equal keys share a batch.
        arrived_s: when it came, on the batcher's clock.
        deadline_s: from then on it is not computed any more.
        future: takes the answer.
        number: by arrival.
    """

    item: T
    key: Hashable
    arrived_s: float
    deadline_s: float = math.inf
    future: Future[Any] = dataclasses.field(default_factory=Future)
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))


class BatchQueue(Generic[T]):
    """First come, first served, by key. Not safe in threads: the batcher holds its lock around every call.

    Its bound is the batcher's to keep.
    """

    def __init__(self, options: BatchOptions) -> None:
        self._max_batch = options.max_batch
        self._max_wait_s = options.max_wait_ms / 1e3
        self._groups: dict[Hashable, collections.OrderedDict[int, Ticket[T]]] = {}
        self._length = 0
        self._sizes: collections.deque[int] = collections.deque([1], maxlen=2)
        self._next_deadline_s = math.inf

    def __len__(self) -> int:
        return self._length

    def add(self, ticket: Ticket[T]) -> None:
        """Put a request at the end."""
        self._groups.setdefault(ticket.key, collections.OrderedDict())[ticket.number] = ticket
        self._length += 1
        self._next_deadline_s = min(self._next_deadline_s, ticket.deadline_s)

    def remove(self, key: Hashable, number: int) -> bool:
        """Take one request out; False where it does not wait any more."""
        group = self._groups.get(key)
        if group is None or group.pop(number, None) is None:
            return False
        self._length -= 1
        if not group:
            del self._groups[key]
        return True

    def pop_late(self, now_s: float) -> list[Ticket[T]]:
        """Take out the requests whose deadline has passed."""
        if now_s < self._next_deadline_s:
            return []
        waiting = [ticket for group in self._groups.values() for ticket in group.values()]
        late = [ticket for ticket in waiting if ticket.deadline_s <= now_s]
        for ticket in late:
            self.remove(ticket.key, ticket.number)
        self._next_deadline_s = min(
            (ticket.deadline_s for ticket in waiting if ticket.deadline_s > now_s), default=math.inf
        )
        return late

    def pop_all(self) -> list[Ticket[T]]:
        """Take out all requests."""
        waiting = [ticket for group in self._groups.values() for ticket in group.values()]
        self._groups.clear()
        self._length = 0
        return waiting

    def due_s(self, idle_since_s: float) -> float | None:
        """When the next batch should start, which may be in the past; None while nothing waits.

        Waiting pays only where more requests are likely to come, and the batches before tell: a batch waits until it
        is as large as the larger of the last two. So the requests of a lone client start at once, and those of eight
        that answer each other's batches start when all eight are there. Nothing is waited for where requests of
        another key could run meanwhile, or where one of the batch would be late.

        Args:
            idle_since_s: when the worker became free; the wait is counted from then, or from the arrival.
        """
        if not self._groups:
            return None
        group = self._oldest()
        first = next(iter(group.values()))
        start_s = max(first.arrived_s, idle_since_s)
        if len(self._groups) > 1 or len(group) >= min(self._max_batch, max(self._sizes)):
            return start_s
        due_s = start_s + self._max_wait_s
        if any(ticket.deadline_s <= due_s for ticket in group.values()):
            return start_s
        return due_s

    def pop_batch(self) -> list[Ticket[T]]:
        """Take out the requests that run next: the oldest one, and those after it that have its key."""
        group = self._oldest()
        batch = list(itertools.islice(group.values(), self._max_batch))
        for ticket in batch:
            self.remove(ticket.key, ticket.number)
        self._sizes.append(len(batch))
        return batch

    def _oldest(self) -> collections.OrderedDict[int, Ticket[T]]:
        return min(self._groups.values(), key=lambda group: next(iter(group)))
