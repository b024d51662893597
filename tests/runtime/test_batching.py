from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import tracemalloc
import weakref
from collections.abc import Iterator

import pytest

from mi2rage_engines.errors import DataError, EngineError
from mi2rage_rt.batch_errors import ClosedError, DeadlineError, QueueFullError
from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.batching import MicroBatcher

LONG_S = 30.0
"""Only a test that fails waits for so long."""


class Model:
    """Gives `-item`; holds its first call until it is released, so that what comes meanwhile waits.

    Negative items are bad: they fail the call. 0 gives an exception as its result.
    """

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.threads: set[int] = set()
        self.entered = threading.Event()
        self.released = threading.Event()
        self.now_s = 100.0
        self.call_s = 0.0

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.calls.append(list(items))
        self.threads.add(threading.get_ident())
        self.now_s += self.call_s
        self.entered.set()
        assert self.released.wait(LONG_S)
        if min(items) < 0:
            raise DataError(f"{min(items)} is bad")
        return [-item if item else DataError("0 is bad") for item in items]

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    yield made
    made.released.set()


def held(model: Model, max_batch: int = 4, max_queue: int = 256) -> MicroBatcher[int, int]:
    """A batcher whose worker is inside the model, with the request 1000."""
    batcher = MicroBatcher(model, BatchOptions(max_batch, 0, max_queue), name="fake", clock=model.clock)
    batcher.submit_sync(1000)
    assert model.entered.wait(LONG_S)
    return batcher


def results(futures: list[concurrent.futures.Future[int]]) -> list[int]:
    return [future.result(LONG_S) for future in futures]


def test_what_comes_while_the_worker_is_busy_shares_batches(model: Model) -> None:
    with held(model) as batcher:
        futures = [batcher.submit_sync(item, key=item > 90) for item in [1, 2, 91, 3, 4, 5, 92]]
        assert (batcher.stats().queued, batcher.stats().running) == (7, 1)
        model.released.set()
        assert results(futures) == [-1, -2, -91, -3, -4, -5, -92]
    assert model.calls == [[1000], [1, 2, 3, 4], [91, 92], [5]]
    assert len(model.threads) == 1 and threading.get_ident() not in model.threads


def test_an_idle_worker_waits_for_as_many_as_before(model: Model) -> None:
    model.released.set()
    # Nothing here could end the wait but a whole batch: it is an hour.
    with MicroBatcher(model, BatchOptions(max_batch=8, max_wait_ms=3.6e6)) as batcher:
        assert batcher.submit_sync(1).result(LONG_S) == -1
        model.released.clear()
        model.entered.clear()
        futures = [batcher.submit_sync(2)]
        assert model.entered.wait(LONG_S)
        futures += [batcher.submit_sync(item) for item in (3, 4, 5)]
        model.released.set()
        results(futures)
        futures = [batcher.submit_sync(item) for item in (6, 7, 8)]
        assert results(futures) == [-6, -7, -8]
        left = batcher.submit_sync(9)
    assert left.result(0) == -9  # and closing ends every wait
    assert model.calls == [[1], [2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(model: Model) -> None:
    model.call_s = 0.5
    with held(model, max_batch=1, max_queue=3) as batcher:
        waiting = [batcher.submit_sync(item) for item in (1, 2, 3)]
        with pytest.raises(
            QueueFullError, match="fake: 3 requests are waiting already, expected fewer than 3"
        ) as caught:
            batcher.submit_sync(4)
        assert caught.value.retry_after_s == 1.0  # nothing is measured yet
        model.released.set()
        results(waiting)
        model.released.clear()
        model.entered.clear()
        waiting = [batcher.submit_sync(5)]
        assert model.entered.wait(LONG_S)
        waiting += [batcher.submit_sync(item) for item in (6, 7)]
        batcher.check_room()
        with pytest.raises(QueueFullError) as caught:
            batcher.check_room(coming=1)
        assert caught.value.retry_after_s == pytest.approx(3 / 2)  # three at two a second
        assert batcher.stats().rejected == 2
        model.released.set()
        results(waiting)


def test_a_request_whose_deadline_passed_is_not_computed(model: Model) -> None:
    with held(model) as batcher:
        late, in_time = batcher.submit_sync(1, timeout_ms=500), batcher.submit_sync(2, timeout_ms=1500)
        gone = batcher.submit_sync(3, timeout_ms=-1)
        model.now_s += 1
        model.released.set()
        for future, allowed in ((late, "500 ms"), (gone, "0 ms")):
            with pytest.raises(DeadlineError, match=f"fake: the request was not started within its {allowed}"):
                future.result(LONG_S)
        assert in_time.result(LONG_S) == -2
    assert model.calls == [[1000], [2]]
    assert batcher.stats().late == 2


def test_late_requests_give_their_places_to_new_ones(model: Model) -> None:
    with held(model, max_queue=1) as batcher:
        late = batcher.submit_sync(1, timeout_ms=500)
        model.now_s += 1
        kept = batcher.submit_sync(2)
        assert isinstance(late.exception(0), DeadlineError)
        model.released.set()
        assert kept.result(LONG_S) == -2


def test_a_coroutine_is_told_of_its_deadline_while_the_worker_is_busy(model: Model) -> None:
    async def main() -> None:
        batcher = MicroBatcher(model, BatchOptions(max_wait_ms=0))
        running = asyncio.create_task(batcher.submit(1, timeout_ms=LONG_S * 1e3))
        await asyncio.to_thread(model.entered.wait, LONG_S)
        with pytest.raises(DeadlineError):
            await batcher.submit(2, timeout_ms=1)
        model.released.set()
        assert await running == -1  # what has started is answered
        await batcher.aclose()

    asyncio.run(main())
    assert model.calls == [[1]]


def test_cancelling_withdraws_what_waits_and_loses_the_answer_of_what_runs(model: Model) -> None:
    async def main() -> None:
        batcher = MicroBatcher(model, BatchOptions(max_wait_ms=0, max_queue=2))
        running = asyncio.create_task(batcher.submit(1))
        await asyncio.to_thread(model.entered.wait, LONG_S)
        waiting = asyncio.create_task(batcher.submit(2))
        other = asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        assert batcher.stats().queued == 2
        running.cancel()
        waiting.cancel()
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert batcher.stats().queued == 1  # its place is free at once
        model.released.set()
        assert await other == -3
        await batcher.aclose()
        stats = batcher.stats()
        assert (stats.cancelled, stats.answered, stats.failed) == (1, 2, 0)

    asyncio.run(main())
    assert model.calls == [[1], [3]]


def test_a_cancelled_future_is_done_for_those_who_wait_for_it(model: Model) -> None:
    with held(model) as batcher:
        future = batcher.submit_sync(1)
        assert future.cancel()
        done, _ = concurrent.futures.wait([future], timeout=LONG_S)
        assert done == {future} and batcher.stats().queued == 0
        model.released.set()


def test_only_the_requests_at_fault_fail(model: Model) -> None:
    with held(model, max_batch=8) as batcher:
        futures = [batcher.submit_sync(item) for item in (1, 2, -3, 4, 5, 6, 0, -8)]
        model.released.set()
        answers = [future.exception(LONG_S) or future.result() for future in futures]
    assert [str(answer) for answer in answers] == ["-1", "-2", "-3 is bad", "-4", "-5", "-6", "0 is bad", "-8 is bad"]
    # Halved until what fails is one request.
    expected = [[1, 2, -3, 4, 5, 6, 0, -8], [1, 2, -3, 4], [1, 2], [-3, 4], [-3], [4], [5, 6, 0, -8], [5, 6], [0, -8]]
    assert model.calls[1:] == [*expected, [0], [-8]]
    assert (batcher.stats().answered, batcher.stats().failed) == (6, 3)


def test_results_that_are_too_few_fail_the_batch() -> None:
    with MicroBatcher(lambda items: items[1:], BatchOptions(max_wait_ms=0), name="fake") as batcher:
        error = batcher.submit_sync(1).exception(LONG_S)
    assert isinstance(error, EngineError) and "fake: gave 0 results for 1 requests" in str(error)


def test_closing_computes_what_is_queued(model: Model) -> None:
    batcher = held(model)
    future = batcher.submit_sync(1)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    while batcher.alive:  # the closer thread has not begun
        threading.Event().wait(0.001)
    with pytest.raises(ClosedError, match="fake: is closed"):
        batcher.submit_sync(2)
    model.released.set()
    closer.join(LONG_S)
    assert future.result(0) == -1
    batcher.close()


def test_an_error_in_the_block_fails_what_is_queued(model: Model) -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            async with MicroBatcher(model, BatchOptions(max_wait_ms=0)) as batcher:
                running = asyncio.create_task(batcher.submit(1))
                await asyncio.to_thread(model.entered.wait, LONG_S)
                waiting = asyncio.create_task(batcher.submit(2))
                await asyncio.sleep(0)
                threading.Timer(0.01, model.released.set).start()
                raise KeyError
        assert await running == -1
        with pytest.raises(ClosedError, match="closed before the request was computed"):
            await waiting
        assert not batcher.alive and batcher.stats().failed == 1

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_worker_that_has_died(model: Model) -> None:
    def dying(items: list[int]) -> list[int]:
        model(items)
        raise SystemExit

    batcher = MicroBatcher(dying, BatchOptions(max_wait_ms=0), name="fake")
    running = batcher.submit_sync(1)
    assert model.entered.wait(LONG_S)
    waiting = batcher.submit_sync(2)
    model.released.set()
    assert isinstance(running.exception(LONG_S), ClosedError)
    assert isinstance(waiting.exception(LONG_S), ClosedError)
    batcher.close()
    assert not batcher.alive and batcher.stats().failed == 2
    with pytest.raises(ClosedError):
        batcher.submit_sync(3)


def test_requests_from_several_event_loops_and_threads(model: Model) -> None:
    model.released.set()

    async def many(batcher: MicroBatcher[int, int], start: int) -> list[int]:
        return await asyncio.gather(*(batcher.submit(item) for item in range(start, start + 50)))

    with (
        MicroBatcher(model, BatchOptions(max_batch=8, max_wait_ms=0)) as batcher,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        starts = (1, 101, 201, 301)
        answers = list(pool.map(lambda start: asyncio.run(many(batcher, start)), starts))
    assert answers == [[-item for item in range(start, start + 50)] for start in starts]
    assert len(model.threads) == 1 and max(map(len, model.calls)) <= 8


def test_counters_add_up(model: Model) -> None:
    model.call_s = 0.25
    with held(model) as batcher:
        for item in (1, 2, -3):
            batcher.submit_sync(item)
        model.now_s += 2
        model.released.set()
    stats = batcher.stats()
    assert (stats.queued, stats.running, stats.answered, stats.failed) == (0, 0, 3, 1)
    assert (stats.batch_sizes.count, stats.batch_sizes.total) == (2, 4)
    assert stats.batch_sizes.counts[:3] == (1, 0, 1)  # 1, 2, 3 to 4
    assert (stats.wait_ms.count, stats.wait_ms.total) == (4, 3 * 2000)
    # One call, and after two seconds the batch in five calls: all, the first, the others, and each of them.
    assert (stats.compute_ms.count, stats.compute_ms.total) == (2, 2250 + 5 * 250)
    assert stats.items_per_s == pytest.approx((0.9 * 1 + 3) / (0.9 * 2.25 + 5 * 0.25))


def test_an_idle_batcher_holds_neither_items_nor_results() -> None:
    class Thing:
        pass

    with MicroBatcher(lambda items: [Thing() for _ in items], BatchOptions(max_wait_ms=0)) as batcher:
        item = Thing()
        future = batcher.submit_sync(item)
        refs = [weakref.ref(item), weakref.ref(future.result(LONG_S))]
        del item
        futures = [future]  # nor does a future hold its item
        del future
        for _ in range(300):  # the worker may still be on its way out of the batch
            gc.collect()
            if refs[0]() is None:
                futures.clear()
            if refs[1]() is None:
                break
            threading.Event().wait(0.001)
        assert [ref() for ref in refs] == [None, None]


def test_memory_stays_flat() -> None:
    async def rounds(batcher: MicroBatcher[bytes, bytes], count: int) -> None:
        for _ in range(count):
            tasks = [asyncio.create_task(batcher.submit(bytes(10_000), key=n % 3)) for n in range(20)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def main() -> int:
        async with MicroBatcher(lambda items: [item[:5000] + b"x" for item in items], BatchOptions()) as batcher:
            await rounds(batcher, 10)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            await rounds(batcher, 100)  # 2,000 requests, 20 MB of items, 10 MB of results
            gc.collect()
            return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        assert asyncio.run(main()) < 50_000
    finally:
        tracemalloc.stop()
