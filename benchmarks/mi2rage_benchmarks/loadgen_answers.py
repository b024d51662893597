"""What answers LoadGen: a system, called query by query, in pieces, or through the micro-batcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import Any, Generic, TypeVar

from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.batching import MicroBatcher

logger = logging.getLogger(__name__)

__all__ = ["Answering", "System"]

T = TypeVar("T")

_PIECE = 4
"""Batches of one call where everything is there from the start."""
_UNBOUNDED = 2**62
"""Requests that may wait: LoadGen sends what it has scheduled, and a refused query would count as a fast one."""


@dataclasses.dataclass(frozen=True, slots=True)
class System(Generic[T]):
    """What is put to the test.

    Attributes:
        name: of it.
        library: samples that LoadGen chooses from, 1 or more.
        request: the item for a sample of the library, by its index, and the number of the request: no two requests
            should be alike, since what is alike may be computed once.
        call: a sequence of one result an item, in order.
        batch_size: items computed together at most.
    """

    name: str
    library: int
    request: Callable[[int, int], T]
    call: Callable[[list[T]], Any]
    batch_size: int


class Answering(Generic[T]):
    """Answers LoadGen's queries during one run; an error, or Ctrl-C, comes out at the end of the `with` block.

    An exception may not leave a callback: LoadGen takes the process down with it. So it is kept, whatever comes after
    it is answered at once and in vain, and it comes out when LoadGen has sent its queries, at the latest when the run
    would have ended anyway. A second Ctrl-C ends the process at once.

    Args:
        lg: the package `mlperf_loadgen`.
        item: the next request for a sample of the library, by its index.
        system: what computes.
    """

    def __init__(self, lg: Any, item: Callable[[int], T], system: System[T]) -> None:
        self._lg = lg
        self._item = item
        self._system = system
        self._error: BaseException | None = None
        self._end = contextlib.ExitStack()

    def __enter__(self) -> Answering[T]:
        self._end.enter_context(_interruption_noted(self._fail))
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def one_by_one(self, queries: Sequence[Any]) -> None:
        """Each sample a call of its own, in LoadGen's thread."""
        self._answer(queries, 1)

    def in_pieces(self, queries: Sequence[Any]) -> None:
        """Calls of several batches, in LoadGen's thread."""
        self._answer(queries, _PIECE * self._system.batch_size)

    def _answer(self, queries: Sequence[Any], size: int) -> None:
        for start in range(0, len(queries), size):
            piece = queries[start : start + size]
            if self._error is None:
                try:
                    self._system.call([self._item(query.index) for query in piece])
                except BaseException as error:
                    self._fail(error)
            self._complete([query.id for query in piece])

    def batched(self, max_wait_ms: float) -> Callable[[Sequence[Any]], None]:
        """What hands queries to a micro-batcher, which is closed at the block's end."""
        options = BatchOptions(self._system.batch_size, max_wait_ms, _UNBOUNDED)
        batcher: MicroBatcher[T, Any] = MicroBatcher(self._system.call, options, name=self._system.name)
        self._end.callback(batcher.close, drain=False)

        def answer(queries: Sequence[Any]) -> None:
            for query in queries:
                if self._error is not None:
                    self._complete([query.id])
                    continue
                try:
                    future = batcher.submit_sync(self._item(query.index))
                except BaseException as error:
                    self._fail(error)
                    self._complete([query.id])
                else:
                    future.add_done_callback(functools.partial(self._done, query.id))

        return answer

    def _done(self, number: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._fail(error)
        self._complete([number])

    def _complete(self, numbers: Sequence[int]) -> None:
        response = self._lg.QuerySampleResponse
        self._lg.QuerySamplesComplete([response(number, 0, 0) for number in numbers])


@contextlib.contextmanager
def _interruption_noted(note: Callable[[BaseException], None]) -> Iterator[None]:
    """In the block Ctrl-C is told to `note` rather than raised anywhere; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        note(KeyboardInterrupt())
        logger.warning("stopping when LoadGen, which cannot be interrupted, has sent its queries; Ctrl-C ends at once")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
