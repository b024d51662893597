"""Loading ahead in threads: what comes next is read and decoded while what came last is computed with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Loaded", "prefetch"]

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded(Generic[T, R]):
    """An item, and what was or is still being loaded for it."""

    item: T
    future: Future[R]

    def get(self) -> R:
        """What was loaded, waited for where it must be; raises what loading it raised."""
        return self.future.result()


def _in_order(items: Iterable[T], load: Callable[[T], R], ahead: int, pool: Executor) -> Iterator[Loaded[T, R]]:
    window: deque[Loaded[T, R]] = deque()
    for item in items:
        same = next((other.future for other in reversed(window) if other.item == item), None)
        window.append(Loaded(item, pool.submit(load, item) if same is None else same))
        if len(window) > ahead:
            yield window.popleft()
    while window:
        yield window.popleft()


@contextlib.contextmanager
def prefetch(
    items: Iterable[T], load: Callable[[T], R], *, ahead: int, workers: int
) -> Iterator[Iterator[Loaded[T, R]]]:
    """Load items in threads, and hand them out in their order.

    Items that are equal and no further apart than `ahead` are loaded once, and share the object that was loaded.
    Leaving the block, by an error or Ctrl-C too, drops what has not been begun and waits for what has.

    Args:
        items: what is to be loaded; gone through in the thread of the caller, never more than `ahead` in advance.
        load: called in the threads with one item.
        ahead: items that are loaded, or being loaded, beyond the last one handed out.
        workers: threads.

    Yields:
        The items in their order. What `load` raised is raised by `get` of the item it belongs to, and the following
        ones can still be had.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        yield _in_order(items, load, ahead, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
