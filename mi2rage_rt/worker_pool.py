"""Work spread over the processes of a Ray cluster, each of which loads its models once.

Ray places the workers, starts them where there is room, notices those that die, and carries calls and results; what is
here hands one item at a time to each worker. Neither `ray.util.ActorPool` nor Ray Data's `map_batches` does: both
retry an item on the worker that it was given to, and wait for that one to come back, even where its machine is gone;
neither says which item it was that killed its worker, and that has to be known to leave a bad row out.

- A worker has one item at a time, and takes the next when that is done: nothing piles up anywhere.
- An item whose worker dies is given to another; one that killed `tries` workers comes back as lost.
- Workers that Ray has no room for are waited for, and join when there is room (the autoscaler sees the demand).
- When nothing is left to begin, an item that has been in the making for long is made by an idle worker as well, and
  the first result counts. So items must be such that making one twice is no harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from mi2rage_engines.errors import Mi2rageError
from mi2rage_rt.ray_cluster import PoolOptions, connected, gpus_each, resources, room

__all__ = ["Done", "WorkerPool"]

logger = logging.getLogger(__name__)

_WAIT_S = 1.0
_STRAGGLES = 3.0
"""An item that takes so many times as long as half of them did is made by a second worker as well."""
_STARVED_S = 60.0

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, slots=True)
class Done(Generic[T, R]):
    """An item that is done: its result, or None where it is lost, because every worker that tried it died."""

    item: T
    result: R | None
    lost: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    item: Any
    begun_s: float = 0.0
    deaths: int = 0
    copies: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Outcome:
    """Of a call: its result, or the error it raised, or that its worker died."""

    result: Any = None
    error: Exception | None = None
    died: bool = False


class _Worker:
    """Lives in a process of its own; holds what `begin` returns there."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._held: Any = None

    def start(self) -> None:
        """Apart from `__init__`, whose errors Ray would report in its own words."""
        self._held = self._begin()

    def ping(self) -> None:
        """Show that it lives."""

    def run(self, call: Callable[..., Any], *items: Any) -> Any:
        return call(self._held, *items)


class WorkerPool:
    """Workers of one run; to be used in a `with` block.

    Args:
        options: where they are.
        begin: what each worker does first and keeps, e.g. load models; importable by name where the workers are.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: there is no cluster at the address, or no room for a single worker on this machine.
    """

    def __init__(self, options: PoolOptions, begin: Callable[[], Any]) -> None:
        self.options = options
        self._ray = connected(options)
        try:
            self._gpus = gpus_each(options, self._ray)
            self._most = options.workers or room(options, self._ray, self._gpus)
            self._begin = self._ray.put(begin)
        except BaseException:
            self._ray.shutdown()
            raise
        self._workers: set[Any] = set()
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, _Job]] = {}
        self._idle: list[Any] = []
        self._deaths_at_start = 0
        self._took_s: deque[float] = deque(maxlen=101)

    def __enter__(self) -> WorkerPool:
        try:
            for _ in range(self._most):
                self._start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No process is left behind; what a worker had in the making is given up."""
        self._leave()

    def _leave(self) -> None:
        try:
            for worker in list(self._workers):
                self._end(worker)
        finally:
            self._ray.shutdown()

    @property
    def size(self) -> int:
        """Workers that have started and are alive, as far as is known."""
        return len(self._workers) - len(self._starting)

    def ask(self, call: Callable[[Any], R]) -> R:
        """What `call`, given what a worker holds, returns in the first worker that is ready.

        Raises:
            what `begin` or `call` raised; Mi2rageError where the workers die.
        """
        for done in self.done([None], _Asked(call)):
            if done.lost:
                raise Mi2rageError("workers: died when they were asked about their models; see Ray's logs")
            return done.result  # type: ignore[return-value]
        raise AssertionError  # one item goes in, one comes out

    def done(self, items: Iterable[T], call: Callable[[Any, T], R]) -> Iterator[Done[T, R]]:
        """Have the workers `call` with every item, taken as workers become free, and yield each as it is done.

        Args:
            items: small, picklable.
            call: takes what a worker holds, and an item; importable by name; its result is small and picklable.

        Raises:
            what `begin` or `call` raised, as it was; the items in the making are given up then.
            Mi2rageError: the workers die while they start.
        """
        fresh, again, making = map(_Job, items), deque[_Job](), set[_Job]()
        exhausted = False
        self._took_s.clear()
        while True:
            while self._idle and (again or not exhausted):
                job = again.popleft() if again else next(fresh, None)
                if job is None:
                    exhausted = True
                else:
                    making.add(job)
                    self._hand(job, call)
            if exhausted and not again:
                if not making:
                    return
                self._double(making, call)
            for job, outcome in self._ended():
                if job not in making:
                    continue  # made by another worker meanwhile, or for an earlier caller
                if outcome.error is not None:
                    raise outcome.error
                if not outcome.died:
                    making.remove(job)
                    yield Done(job.item, outcome.result)
                elif job.deaths >= self.options.tries:
                    making.remove(job)
                    yield Done(job.item, None, lost=True)
                elif not job.copies:
                    again.append(job)

    def _hand(self, job: _Job, call: Callable[..., Any]) -> None:
        worker = self._idle.pop()
        job.begun_s, job.copies = time.monotonic(), job.copies + 1
        self._busy[worker.run.remote(call, job.item)] = worker, job

    def _double(self, making: set[_Job], call: Callable[..., Any]) -> None:
        """Give an item that takes long to a second worker, where one is idle."""
        if not self._idle or not self._took_s:
            return
        oldest = min((job for job in making if job.copies == 1), key=lambda job: job.begun_s, default=None)
        long_s = max(_WAIT_S, _STRAGGLES * statistics.median(self._took_s))
        if oldest is not None and time.monotonic() - oldest.begun_s > long_s:
            self._hand(oldest, call)

    def _ended(self) -> list[tuple[_Job, _Outcome]]:
        """Wait a little for anything to happen; the jobs that ended, and how."""
        since = time.monotonic()
        while not (ready := self._ray.wait([*self._busy, *self._starting], num_returns=1, timeout=_WAIT_S)[0]):
            if self.size:
                return []
            if time.monotonic() - since > _STARVED_S:
                since = time.monotonic()
                logger.warning(
                    "no worker has begun yet: each needs %g GPUs and %g CPUs, and the cluster has %s; waiting",
                    self._gpus,
                    self.options.cpus_per_worker,
                    resources(self._ray),
                )
        return [self._end_of(reference) for reference in ready if not self._has_started(reference)]

    def _end_of(self, reference: Any) -> tuple[_Job, _Outcome]:
        """Take note of a job's end: its worker is idle again, or replaced."""
        worker, job = self._busy.pop(reference)
        job.copies -= 1
        outcome = self._outcome(reference)
        if outcome.died:
            job.deaths += 1
            logger.info("a worker died; another takes its place")
            self._replace(worker)
            # Its machine may have gone: idle workers show that they live before they are given anything.
            self._starting |= {idle.ping.remote(): idle for idle in self._idle}
            self._idle.clear()
        else:
            self._idle.append(worker)
            self._took_s.append(time.monotonic() - job.begun_s)
        return job, outcome

    def _outcome(self, reference: Any) -> _Outcome:
        errors = self._ray.exceptions
        try:
            return _Outcome(self._ray.get(reference))
        except errors.RayTaskError as error:
            return _Outcome(error=error.cause if isinstance(error.cause, Exception) else error)
        except errors.RayError:  # of the worker, its machine, or the way to it
            logger.debug("a worker died", exc_info=True)
            return _Outcome(died=True)

    def _has_started(self, reference: Any) -> bool:
        """Whether this was about the start of a worker, of which note is taken.

        Raises:
            what `begin` raised; Mi2rageError where workers die again and again.
        """
        worker = self._starting.pop(reference, None)
        if worker is None:
            return False
        outcome = self._outcome(reference)
        if outcome.error is not None:
            raise outcome.error
        if not outcome.died:
            self._idle.append(worker)
            self._deaths_at_start = 0
            return True
        self._deaths_at_start += 1
        if self._deaths_at_start >= self.options.tries * self._most:
            raise Mi2rageError(
                f"workers: {self._deaths_at_start} died while they started, and none lived; expected models that fit "
                "beside each other; give fewer workers, or more of a GPU to each, and see Ray's logs"
            )
        self._replace(worker)
        return True

    def _start(self) -> None:
        actor = self._ray.remote(num_cpus=self.options.cpus_per_worker, num_gpus=self._gpus, max_restarts=0)(_Worker)
        worker = actor.remote(self._begin)
        self._workers.add(worker)
        self._starting[worker.start.remote()] = worker

    def _replace(self, worker: Any) -> None:
        self._end(worker)
        self._start()

    def _end(self, worker: Any) -> None:
        self._workers.discard(worker)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(worker)


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A call without an item."""

    call: Callable[[Any], Any]

    def __call__(self, held: Any, _: None) -> Any:
        return self.call(held)
