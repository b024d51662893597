"""Many concurrent requests as few calls: the micro-batcher for services that embed the runtime.

Each batcher has one worker thread that calls the model, so a model is used from one thread alone. Requests come from
coroutines of any event loop (`submit`) and from any thread (`submit_sync`).
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

from mi2rage_engines.errors import EngineError
from mi2rage_rt.batch_errors import ClosedError, DeadlineError, QueueFullError
from mi2rage_rt.batch_queue import BatchOptions, BatchQueue, Ticket
from mi2rage_rt.batch_stats import BatchStats, Tally

__all__ = ["MicroBatcher"]

T = TypeVar("T")
R = TypeVar("R")

_UNKNOWN_RETRY_S = 1.0


class MicroBatcher(Generic[T, R]):
    """Calls a function of lists with the requests that came one by one.

    All methods may be called from any thread. Close it, or use it in a `with` or `async with` block: the block's end
    waits for what is queued, or, where the block ends by an error, fails it.

    Args:
        function: one result an item, in order; called from the worker thread alone. A result that is an exception
            fails its own request. Where the call itself raises, both halves of the batch are run again, and so on, so
            that only the requests that are at fault fail, each with its own error.
        options: sizes and waits.
        name: of the model, for messages and the thread.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        function: Callable[[list[T]], Sequence[R | Exception]],
        options: BatchOptions | None = None,
        *,
        name: str = "model",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.options = options or BatchOptions()
        self._function = function
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: BatchQueue[T] = BatchQueue(self.options)
        self._tally = Tally()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        self._thread.start()
        # A daemon thread that is inside a native call when the interpreter goes away can take the process down.
        atexit.register(self._close_at_exit)

    async def submit(self, item: T, *, key: Hashable = None, timeout_ms: float | None = None) -> R:
        """The result of one item.

        Cancelling the task withdraws a request that waits; of one that runs only the answer is lost.

        Args:
            item: what `function` takes a list of.
            key: only items of equal keys share a batch.
            timeout_ms: the request is dropped where it has not started by then; once started it is answered.

        Raises:
            QueueFullError: at once, where too many wait.
            DeadlineError: the time was over before it started.
            ClosedError: the batcher is closed.
            Exception: whatever `function` raised for this item.
        """
        future: asyncio.Future[R] = asyncio.wrap_future(self.submit_sync(item, key=key, timeout_ms=timeout_ms))
        if timeout_ms is None:
            return await future
        # The worker looks at deadlines between batches; the client is told at once.
        timer = asyncio.get_running_loop().call_later(max(timeout_ms, 0) / 1e3, self._drop_late)
        try:
            return await future
        finally:
            timer.cancel()

    def submit_sync(self, item: T, *, key: Hashable = None, timeout_ms: float | None = None) -> Future[R]:
        """As `submit`, for threads: the future of the result, which may be cancelled while it waits.

        The future's `result()` raises what `submit` raises later on; without a coroutine's timer the worker tells of a
        deadline when its batch ends.

        Raises:
            QueueFullError: too many wait.
            ClosedError: the batcher is closed.
        """
        now_s = self._clock()
        ticket = Ticket(item, key, now_s, math.inf if timeout_ms is None else now_s + timeout_ms / 1e3)
        self.check_room()
        with self._changed:
            self._refuse_unless_room()
            self._queue.add(ticket)
            self._changed.notify()
        # By number: a callback that held the ticket would keep the item as long as the future lives.
        ticket.future.add_done_callback(functools.partial(self._withdraw, ticket.key, ticket.number))
        return ticket.future

    def check_room(self, coming: int = 0) -> None:
        """Refuse now what `submit` would refuse, before a request is decoded in vain.

        Args:
            coming: requests that are being made ready, and count as waiting.

        Raises:
            QueueFullError: too many wait.
            ClosedError: the batcher is closed.
        """
        if len(self._queue) + coming >= self.options.max_queue:
            self._drop_late()
        with self._changed:
            self._refuse_unless_room(coming)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether requests are taken; False once it was closed, or its worker has died."""
        return self._thread.is_alive() and not self._closing

    def stats(self) -> BatchStats:
        """The counters as they are now."""
        with self._changed:
            return self._tally.snapshot(len(self._queue))

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and return when the worker has ended; a second call changes nothing.

        Args:
            drain: compute what is queued; off fails it with `ClosedError`. The batch that runs is finished either way.
        """
        self._stop(drain)
        self._thread.join()
        atexit.unregister(self._close_at_exit)

    async def aclose(self, *, drain: bool = True) -> None:
        """As `close`, without holding up the event loop."""
        self._stop(drain)
        await asyncio.to_thread(self.close, drain=drain)

    def __enter__(self) -> MicroBatcher[T, R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> MicroBatcher[T, R]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(drain=kind is None)

    def _refuse_unless_room(self, coming: int = 0) -> None:
        if self._closing:
            raise ClosedError(f"{self.name}: is closed and takes no more requests; open the model again")
        waiting = len(self._queue) + coming
        if waiting >= self.options.max_queue:
            self._tally.rejected += 1
            rate = self._tally.items_per_s
            retry_after_s = _UNKNOWN_RETRY_S if rate is None else waiting / rate
            raise QueueFullError(
                f"{self.name}: {waiting} requests are waiting already, expected fewer than {self.options.max_queue}; "
                f"try again in {retry_after_s:.1f} s",
                retry_after_s,
            )

    def _withdraw(self, key: Hashable, number: int, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._changed:
            if self._queue.remove(key, number):
                self._tally.cancelled += 1
                # Until then concurrent.futures.wait() does not count it as done.
                future.set_running_or_notify_cancel()

    def _drop_late(self) -> None:
        with self._changed:
            late = self._pop_late(self._clock())
        self._tell_late(late)

    def _pop_late(self, now_s: float) -> list[Ticket[T]]:
        late = self._started(self._queue.pop_late(now_s))
        self._tally.late += len(late)
        return late

    def _tell_late(self, late: Sequence[Ticket[T]]) -> None:
        for ticket in late:
            allowed_ms = max(0.0, ticket.deadline_s - ticket.arrived_s) * 1e3
            ticket.future.set_exception(
                DeadlineError(
                    f"{self.name}: the request was not started within its {allowed_ms:.0f} ms and was dropped; "
                    "give it more time, or send fewer at once"
                )
            )

    def _started(self, tickets: Sequence[Ticket[T]]) -> list[Ticket[T]]:
        """Those that were not cancelled, which cannot be cancelled from now on."""
        kept = [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]
        self._tally.cancelled += len(tickets) - len(kept)
        return kept

    def _stop(self, drain: bool) -> None:
        with self._changed:
            self._closing = True
            left = [] if drain else self._started(self._queue.pop_all())
            self._tally.failed += len(left)
            self._changed.notify_all()
        for ticket in left:
            ticket.future.set_exception(ClosedError(f"{self.name}: was closed before the request was computed"))

    def _close_at_exit(self) -> None:
        self.close(drain=False)

    def _work(self) -> None:
        try:
            while self._serve_batch():
                pass
        finally:
            # Where something that is no Exception ended the thread, nobody may be left waiting for it.
            self._stop(drain=False)

    def _serve_batch(self) -> bool:
        """Wait for a batch and run it; False at the end. What it held is free when it returns."""
        work = self._next_batch()
        if work is None:
            return False
        batch, late = work
        self._tell_late(late)
        if batch:
            self._run(batch)
        return True

    def _next_batch(self) -> tuple[list[Ticket[T]], list[Ticket[T]]] | None:
        """The next batch, begun, and the requests that came too late meanwhile; None once closed and done."""
        idle_since_s = self._clock()
        with self._changed:
            while True:
                now_s = self._clock()
                late = self._pop_late(now_s)
                due_s = self._queue.due_s(idle_since_s)
                if due_s is not None and (due_s <= now_s or self._closing):
                    batch = self._started(self._queue.pop_batch())
                    if batch:
                        self._tally.start([now_s - ticket.arrived_s for ticket in batch])
                    return batch, late
                if late:
                    return [], late
                if due_s is None and self._closing:
                    return None
                self._changed.wait(None if due_s is None else due_s - now_s)

    def _run(self, batch: list[Ticket[T]]) -> None:
        started_s = self._clock()
        answers: list[R | Exception] = []
        try:
            answers = self._answers([ticket.item for ticket in batch])
        finally:
            lost = ClosedError(f"{self.name}: the worker ended while the request was computed; open the model again")
            answers += [lost] * (len(batch) - len(answers))
            failed = sum(isinstance(answer, Exception) for answer in answers)
            with self._changed:
                self._tally.end(failed, self._clock() - started_s)
            for ticket, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    ticket.future.set_exception(answer)
                else:
                    ticket.future.set_result(answer)

    def _answers(self, items: list[T]) -> list[R | Exception]:
        try:
            answers = list(self._function(items))
        except Exception as error:  # whatever it is, it goes to the clients at fault
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._answers(items[:half]) + self._answers(items[half:])
        if len(answers) != len(items):
            message = f"{self.name}: gave {len(answers)} results for {len(items)} requests; expected one for each"
            return [EngineError(message) for _ in items]
        return answers
