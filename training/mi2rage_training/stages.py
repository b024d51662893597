"""The chain's stages side by side: while one shard's images are drawn, others are described, encoded and written.

Every shard in the making has a thread of its own, which asks the models and waits for their answers. The generator runs
in the thread of the caller: it takes longest, and Ctrl-C reaches it at once. The captioner and the judge share a thread
beside it, or take turns with it. So no model is ever called from two threads, a slow stage holds the others up as soon
as every shard in the making waits for it, and what is made does not depend on any of this.

Small models on a CPU are the exception: several threads can't share the work of one call well, so each shard's thread
calls the models itself, one thread an operator, and the cores are shared by shards.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.generator import RuntimeGenerator
from mi2rage_rt.protocols import Image, ImageToText, TextToImage
from mi2rage_training.judge import Judge
from mi2rage_training.store import Candidate

__all__ = ["AtOnce", "Overlap", "Stages", "usual_overlap"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Overlap:
    """How much is done at a time; what is made is the same, to the byte.

    Attributes:
        in_flight: shards in the making at most, 1 or more; with 1 everything is done one after the other.
        models_apart: the captioner runs beside the generator. Off, all models take turns in the thread of the caller,
            as PyTorch's must: what diffusers and transformers set while they run holds for the whole process.
        models_free: every shard calls the models from its own thread, and does all else there too.
    """

    in_flight: int = 1
    models_apart: bool = False
    models_free: bool = False

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise InputError(f"in flight: came {self.in_flight}; expected 1 (one shard after the other) or more")


def usual_overlap(generator: TextToImage, captioner: ImageToText) -> Overlap:
    """What suits the models: two shards at a time for the runtime's, else one.

    PyTorch's models on a CPU fill its cores already, and each further thread that calls them starts a pool of its own.
    """
    apart = isinstance(generator, RuntimeGenerator) and isinstance(captioner, RuntimeCaptioner)
    return Overlap(2 if apart else 1, models_apart=apart)


class AtOnce(Executor):
    """Does what is submitted there and then; an error is raised by `submit` itself."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _UntilGivenUp(AtOnce):
    """The same, as long as the run goes on."""

    def __init__(self, given_up: Callable[[], bool]) -> None:
        self._given_up = given_up

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        if self._given_up():
            raise RuntimeError("the run was given up")  # only threads that nobody waits for see this
        return super().submit(fn, *args, **kwargs)


class _CallersThread(Executor):
    """Has work done by the thread that calls `serve`, in the order in which it came."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any] | None]] = SimpleQueue()
        self._asked: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self.closed = False

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        with self._lock:
            if self.closed:
                raise RuntimeError("the run was given up")  # only threads that nobody waits for see this
            self._asked.add(future)
            self._work.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def tell(self, done: Future[Any]) -> None:
        """Have `serve` return `done`."""
        self._work.put((done, None))

    def serve(self) -> Future[Any]:
        """Do what was submitted until something is told, and return that; an error goes to whom the work is for."""
        while True:
            future, call = self._work.get()
            if call is None:
                return future
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
            self._asked.discard(future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further work, and free every thread that waits for work not done."""
        with self._lock:
            self.closed = True
        # Not from the queue: Ctrl-C may have come right after something was taken out of it.
        for future in self._asked:
            future.cancel()


class Stages:
    """The threads of one run; to be used in a `with` block, in the thread that owns the models.

    Attributes:
        encoders: where images are encoded.
    """

    def __init__(self, overlap: Overlap) -> None:
        self.overlap = overlap
        self._here = _CallersThread()
        self._threads: list[Executor] = []
        self._generator: Executor = AtOnce()
        self._captioner: Executor = AtOnce()
        self._judge: Executor = AtOnce()
        self.encoders: Executor = AtOnce()
        if overlap.in_flight > 1 and overlap.models_free:
            self._generator = self._captioner = _UntilGivenUp(lambda: self.given_up)
            self._judge = self._pool(1, "judge")  # PyTorch's, and so called from one thread
        elif overlap.in_flight > 1:
            self._generator = self._captioner = self._here
            if overlap.models_apart:
                self._captioner = self._pool(1, "captioner")
            self._judge = self._captioner
            self.encoders = self._pool(usable_cores(), "encoder")

    def _pool(self, workers: int, name: str) -> Executor:
        pool = ThreadPoolExecutor(workers, thread_name_prefix=f"chain-{name}")
        self._threads.append(pool)
        return pool

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What has begun in the other threads comes to its end, a shard's file that is being written too."""
        self._here.shutdown()
        for pool in self._threads:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._threads:
            pool.shutdown(wait=True)

    @property
    def given_up(self) -> bool:
        """Whether the block has ended; what fails in a thread of its after that does so because of it."""
        return self._here.closed

    def generator(self, model: TextToImage) -> TextToImage:
        """The same model, to be called from any thread of the run."""
        return _Generator(model, self._generator)

    def captioner(self, model: ImageToText) -> ImageToText:
        """The same model, to be called from any thread of the run."""
        return _Captioner(model, self._captioner)

    def judge(self, model: Judge) -> Judge:
        """The same judge, to be called from any thread of the run."""
        return _Judge(model, self._judge)

    def done(self, items: Iterable[T], make: Callable[[T], None]) -> Iterator[T]:
        """Call `make` with every item, `in_flight` at a time, and yield each that is done.

        Raises:
            what `make` or a model raised, as it was; the items in the making are given up then.
        """
        if self.overlap.in_flight == 1:
            for item in items:
                make(item)
                yield item
            return
        shards = self._pool(self.overlap.in_flight, "shard")
        rest, making = iter(items), dict[Future[None], T]()

        def begin(count: int) -> None:
            for item in itertools.islice(rest, count):
                future = shards.submit(make, item)
                making[future] = item
                future.add_done_callback(self._here.tell)

        begin(self.overlap.in_flight)
        while making:
            future = self._here.serve()
            future.result()
            item = making.pop(future)
            begin(1)
            yield item


class _Generator:
    def __init__(self, model: TextToImage, thread: Executor) -> None:
        self.name = model.name
        self._model = model
        self._thread = thread

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        return self._thread.submit(self._model.generate, prompts, seeds).result()


class _Captioner:
    def __init__(self, model: ImageToText, thread: Executor) -> None:
        self.name = model.name
        self._model = model
        self._thread = thread

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        return self._thread.submit(self._model.caption, images, prefixes, seeds, with_prefix=with_prefix).result()


class _Judge:
    def __init__(self, model: Judge, thread: Executor) -> None:
        self.name = model.name
        self._model = model
        self._thread = thread

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        return self._thread.submit(self._model.added_nats, candidates).result()
