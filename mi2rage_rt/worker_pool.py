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
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from mi2rage_engines.errors import InputError, Mi2rageError, require

__all__ = ["Done", "PoolOptions", "WorkerPool"]

logger = logging.getLogger(__name__)

LOCAL = "local"
_OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a local cluster; items and results are small."""
_WAIT_S = 1.0
_STRAGGLES = 3.0
"""An item that takes so many times as long as half of them did is made by a second worker as well."""
_STARVED_S = 60.0

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, slots=True)
class PoolOptions:
    """Where the workers are, and what each has.

    Attributes:
        address: `local` starts a cluster on this machine for the time of the run; else that of a running cluster, e.g.
            `auto` or `10.0.0.1:6379`.
        workers: the most at a time, 1 or more; None takes as many as the cluster has room for at the start.
        gpus_per_worker: of each, 0 or more; a part of 1 has several workers share a GPU. None is 1 where the cluster
            has GPUs, else 0.
        cpus_per_worker: of each, above 0: what Ray keeps free for it, and (rounded, at least 1) the threads that its
            models use on a CPU.
        tries: workers that an item may kill before it counts as lost, 1 or more.
    """

    address: str = LOCAL
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    tries: int = 3

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(
                f"workers: came {self.workers}; expected 1 or more, or none for all that there is room for"
            )
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise InputError(
                f"GPUs per worker: came {self.gpus_per_worker}; expected 0 (a CPU), a part of 1 (a GPU is shared), or "
                "whole ones"
            )
        if self.cpus_per_worker <= 0:
            raise InputError(f"CPUs per worker: came {self.cpus_per_worker}; expected a number above 0, e.g. 1")
        if self.tries < 1:
            raise InputError(f"tries: came {self.tries}; expected 1 or more")

    @property
    def threads(self) -> int:
        """CPU threads of each worker's models."""
        return max(1, round(self.cpus_per_worker))


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
    done: bool = False


class _Worker:
    """Lives in a process of its own; holds what `begin` returns there."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._held: Any = None

    def start(self) -> None:
        """Apart from `__init__`, whose errors Ray would report in its own words."""
        self._held = self._begin()

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
        self._ray = _connected(options)
        try:
            self._gpus = self._gpus_each()
            self._most = options.workers or self._room()
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
        for _ in range(self._most):
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No process is left behind; what a worker had in the making is given up."""
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
            for job, result in self._finished():
                if job not in making:
                    continue  # made by another worker meanwhile, or for an earlier caller
                if result is not _DIED:
                    making.remove(job)
                    yield Done(job.item, result)
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

    def _finished(self) -> list[tuple[_Job, Any]]:
        """Wait a little for anything to happen; the jobs that ended, each with its result or `_DIED`."""
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
                    _resources(self._ray),
                )
        ended = []
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
                continue
            worker, job = self._busy.pop(reference)
            job.copies -= 1
            result = self._result(reference)
            if result is _DIED:
                job.deaths += 1
                logger.info("a worker died; another takes its place")
                self._replace(worker)
            else:
                self._idle.append(worker)
                self._took_s.append(time.monotonic() - job.begun_s)
            ended.append((job, result))
        return ended

    def _result(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError:  # of the worker, its machine, or the way to it
            logger.debug("a worker died", exc_info=True)
            return _DIED

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        if self._result(reference) is not _DIED:
            self._idle.append(worker)
            self._deaths_at_start = 0
            return
        self._deaths_at_start += 1
        if self._deaths_at_start >= self.options.tries * self._most:
            raise Mi2rageError(
                f"workers: {self._deaths_at_start} died while they started, and none lived; expected models that fit "
                "beside each other; give fewer workers, or more of a GPU to each, and see Ray's logs"
            )
        self._replace(worker)

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

    def _gpus_each(self) -> float:
        wanted, there = self.options.gpus_per_worker, self._ray.cluster_resources().get("GPU", 0.0)
        if wanted is None:
            return 1.0 if there else 0.0
        if self.options.address == LOCAL and wanted > there:
            raise InputError(
                f"GPUs per worker: came {wanted:g}, and Ray finds {there:g} GPUs on this machine; expected no more; "
                "give less, or 0 to run on the CPU"
            )
        return wanted

    def _room(self) -> int:
        has = self._ray.cluster_resources()
        room = has.get("CPU", 0.0) // self.options.cpus_per_worker
        if self._gpus:
            room = min(room, has.get("GPU", 0.0) // self._gpus if self._gpus >= 1 else self._shared(has))
        return max(1, int(room))

    def _shared(self, has: dict[str, float]) -> float:
        return has.get("GPU", 0.0) * (1 // self._gpus)


_DIED = object()


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A call without an item."""

    call: Callable[[Any], Any]

    def __call__(self, held: Any, _: None) -> Any:
        return self.call(held)


def _resources(ray: Any) -> str:
    has = ray.cluster_resources()
    return f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs"


def _connected(options: PoolOptions) -> Any:
    """Ray, started on this machine or connected to its cluster; it prints nothing."""
    # Read when ray is imported: it prints what happens to workers on stdout, where our results go.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    ray: Any = require("ray", "scale")
    manners = {"log_to_driver": False, "logging_level": logging.ERROR}
    if options.address == LOCAL:
        from mi2rage_engines.ort_engine import usable_cores

        cores = max(usable_cores(), round((options.workers or 0) * options.cpus_per_worker + 0.5))
        ray.init(
            address=LOCAL, num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **manners
        )
        return ray
    try:
        ray.init(address=options.address, **manners)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--ray {options.address}: no Ray cluster answers ({reason}); expected 'local', 'auto', or HOST:PORT of "
            "one; start one ('ray start --head'), or check the address"
        ) from error
    return ray
