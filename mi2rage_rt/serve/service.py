"""The models as a service: batched, warmed up, watched; without any protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import BundleError, EngineError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.batched_models import BatchedCaptioner, BatchedClassifier, BatchedGenerator
from mi2rage_rt.batching import MicroBatcher
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.serve.admission import Admission
from mi2rage_rt.serve.metrics import Metrics
from mi2rage_rt.serve.options import ServiceOptions
from mi2rage_rt.serve.refusals import RefusedError, refusal_from_error
from mi2rage_rt.serve.rows import CaptionRow, ImageRow, RelationRow
from mi2rage_rt.serve.uploads import UploadGate

__all__ = ["Service"]

logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")

_STARTING_RETRY_S = 2.0
_WATCH_EVERY_S = 1.0
_AT_WORK = 2
"""Full batches: one that is being computed, and one whose answers are on their way."""


class Service:
    """The models of a bundle for one event loop.

    Args:
        bundle: has the models that the options name.
        options: what is served.

    Attributes:
        classifier, captioner, generator: None where they are not served, or not loaded yet.
        batchers: theirs, by model.
        admission: counts the requests inside.
        draining: the server is being stopped; requests are answered, and readiness says no.

    Raises:
        BundleError: the bundle lacks one of them.
    """

    def __init__(self, bundle: Bundle, options: ServiceOptions) -> None:
        lacking = [model for model in options.models if model not in bundle.components]
        if lacking:
            raise BundleError(
                f"{bundle.folder}: this bundle has no {', no '.join(lacking)}; it has "
                f"{', '.join(bundle.components) or 'nothing'}; leave out what it lacks, or export it"
            )
        self.options = options
        self.limits = options.limits
        self.metrics = Metrics(self)
        self.admission = Admission(self)
        self.classifier: BatchedClassifier | None = None
        self.captioner: BatchedCaptioner | None = None
        self.generator: BatchedGenerator | None = None
        self.batchers: dict[str, MicroBatcher[Any, Any]] = {}
        self.draining = False
        self._bundle = bundle
        self._gates: dict[str, UploadGate] = {}
        self._warm: set[str] = set()
        self._failed: dict[str, str] = {}
        self._probing: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- state -----------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that are served."""
        return self.options.models

    @property
    def faults(self) -> dict[str, str]:
        """Why a model is dead, by model; empty while all is well."""
        dead = {name: "its worker has ended" for name, batcher in self.batchers.items() if not batcher.alive}
        return self._failed if self.draining else {**dead, **self._failed}

    @property
    def live(self) -> bool:
        """Whether every model that was loaded still works."""
        return not self.faults

    def ready(self, model: str | None = None) -> bool:
        """Whether a model, or all, have answered a first request, work, and the service is not being stopped."""
        wanted = self.models if model is None else (model,)
        return self._warm.issuperset(wanted) and self.live and not self.draining

    # -- life ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the models' graphs; blocks.

        Raises:
            EngineError: a graph cannot be loaded.
            MissingExtraError: onnxruntime is not installed.
        """
        for model in self.models:
            options = self.options.batch_options(model)
            processing: ImagePreprocessing | None = None
            if model == "classifier":
                self.classifier = BatchedClassifier(self._bundle.classifier(options.max_batch), options)
                batcher: MicroBatcher[Any, Any] = self.classifier.batcher
                processing = self.classifier.model.spec.preprocessing
            elif model == "captioner":
                own = CaptionOptions(batch_size=options.max_batch)
                self.captioner = BatchedCaptioner(self._bundle.captioner(own), options)
                batcher = self.captioner.batcher
                spec = self.captioner.model.spec
                # A vision graph with preprocessing resizes by itself.
                in_graph = any(tensor.name == "image" for tensor in spec.graphs["vision"].inputs)
                processing = None if in_graph else spec.preprocessing
            else:
                made = GenerateOptions(batch_size=options.max_batch)
                self.generator = BatchedGenerator(self._bundle.generator(made), options)
                batcher = self.generator.batcher
            self._gates[model] = UploadGate(batcher, self.limits, processing)
            self.batchers = {**self.batchers, model: batcher}  # a new one: the event loop reads the old one meanwhile

    async def warm_up(self) -> None:
        """One real inference on each model, after which it is ready, and the watch begins.

        Raises:
            Mi2rageError: a model cannot do it.
        """
        for model in self.models:
            began_s = time.monotonic()
            await self._probe(model)
            self._warm.add(model)
            logger.info("%s: warm after %.2f s", model, time.monotonic() - began_s)
        self._start(self._watch())

    async def close(self) -> None:
        """Compute what is queued, and end the workers."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        for batcher in self.batchers.values():
            await batcher.aclose()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, model: str) -> None:
        """A real inference; past the limits, the queue's apart."""
        black: NDArray[np.uint8] = np.zeros((32, 32, 3), np.uint8)
        if model == "classifier" and self.classifier is not None:
            await self.classifier.logits(Sample("warm-up", ("a", "b"), Span(0, 1), Span(1, 2)), black)
        elif model == "captioner" and self.captioner is not None:
            await self.captioner.caption(black)
        elif self.generator is not None:
            await self.generator.generate("a", seed=0)

    async def _probe_after(self, model: str, error: Exception) -> None:
        """Find out whether a failed graph fails on everything: a lost device does."""
        if model in self._probing:
            return
        self._probing.add(model)
        try:
            await self._probe(model)
        except EngineError:
            logger.exception("%s: fails on its own warm-up too, after: %s", model, error)
            self._failed[model] = "its graphs fail on every request"
        except Exception as other:  # too much to do, or stopping: no sign of a fault
            logger.debug("%s: could not be probed: %s", model, other)
        finally:
            self._probing.discard(model)

    async def _watch(self) -> None:
        """Look for a model that makes no headway."""
        since: dict[str, tuple[int, float]] = {}
        while True:
            now_s = time.monotonic()
            for name, batcher in self.batchers.items():
                stats = batcher.stats()
                done = stats.answered + stats.failed
                if not stats.running or since.get(name, (-1, 0.0))[0] != done:
                    since[name] = (done, now_s)
                    if self._failed.get(name, "").startswith("no answer"):
                        del self._failed[name]
                elif now_s - since[name][1] > self.options.stall_s:
                    self._failed[name] = f"no answer for {self.options.stall_s:.0f} s"
            await asyncio.sleep(_WATCH_EVERY_S)

    # -- requests --------------------------------------------------------------------------------

    def check_room(self, model: str, rows: int = 1, inside: int = 0) -> None:
        """Refuse at once what would not be taken, before it is read or decoded.

        Args:
            model: the one asked.
            rows: of the request.
            inside: requests for the model that were let in and have no answer yet, where somebody counts them. Those
                beyond what waits, runs, and is being sent back count as waiting.

        Raises:
            RefusedError: 404 unknown, 503 not ready, 429 too many wait, 400 where so many never fit.
        """
        if model not in self.models:
            raise RefusedError(
                404, f"model {model[:60]!r}: is not served here; expected one of {', '.join(self.models)}"
            )
        if model not in self._warm or model in self.faults:
            raise RefusedError(503, f"{model}: is not ready; try again, or ask another server", _STARTING_RETRY_S)
        batcher = self.batchers[model]
        if rows > batcher.options.max_queue:
            raise RefusedError(
                400,
                f"{rows} rows: expected at most {batcher.options.max_queue}, as many as may wait; send fewer at once",
            )
        coming = max(0, inside - batcher.queued - _AT_WORK * batcher.options.max_batch)
        try:
            batcher.check_room(coming + rows - 1)
        except Exception as error:
            raise refusal_from_error(error) from error

    def timeout_ms(self, *wanted: float | None) -> float:
        """The shortest of the times that were asked for, and the limit."""
        return min([self.limits.max_timeout_ms, *(value for value in wanted if value is not None)])

    async def answer(self, model: str, protocol: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do a request's work, count it, and turn what goes wrong into a `RefusedError`.

        Args:
            model: that it is for.
            protocol: `http`, `json` or `grpc`, for the metrics.
            work: reads the request, computes, and makes the answer.

        Raises:
            RefusedError: whatever went wrong.
        """
        began_s, status = time.monotonic(), 499  # nginx's word for a client that went away
        try:
            self.check_room(model)
            result = await work()
            status = 200
        except Exception as error:
            refusal = refusal_from_error(error)
            status = refusal.status
            if isinstance(error, EngineError):
                self._start(self._probe_after(model, error))
            raise refusal from error
        else:
            return result
        finally:
            known = model if model in self.models else "unknown"
            self.metrics.count(known, protocol, status, time.monotonic() - began_s)

    async def classify(self, rows: Sequence[RelationRow], timeout_ms: float) -> NDArray[np.float32]:
        """Logits `(B, labels)`; fails as a whole where one row fails."""
        assert self.classifier is not None
        classifier, gate, until_s = self.classifier, self._gates["classifier"], _until(timeout_ms)
        self.check_room("classifier", len(rows))

        async def one(row: RelationRow) -> NDArray[np.float32]:
            image = None if row.image is None else await gate.decoded(row.image)
            return await classifier.logits(row.sample, image, timeout_ms=_left_ms(until_s))

        return np.stack(await _all([one(row) for row in rows]))

    async def caption(self, rows: Sequence[CaptionRow], options: CaptionOptions, timeout_ms: float) -> list[str]:
        """One caption a row; fails as a whole where one row fails."""
        assert self.captioner is not None
        captioner, gate, until_s = self.captioner, self._gates["captioner"], _until(timeout_ms)
        self.check_room("captioner", len(rows))

        async def one(row: CaptionRow) -> str:
            image = await gate.decoded(row.image)
            left_ms = _left_ms(until_s)
            return await captioner.caption(image, prefix=row.prefix, seed=row.seed, options=options, timeout_ms=left_ms)

        return await _all([one(row) for row in rows])

    async def generate(self, rows: Sequence[ImageRow], options: GenerateOptions, timeout_ms: float) -> list[bytes]:
        """One PNG file a row; fails as a whole where one row fails."""
        assert self.generator is not None
        generator, until_s = self.generator, _until(timeout_ms)
        self.check_room("generator", len(rows))

        async def one(row: ImageRow) -> bytes:
            image = await generator.generate(row.prompt, seed=row.seed, options=options, timeout_ms=_left_ms(until_s))
            return await asyncio.to_thread(encode_image, image)

        return await _all([one(row) for row in rows])


def _until(timeout_ms: float) -> float:
    return time.monotonic() + timeout_ms / 1e3


def _left_ms(until_s: float) -> float:
    return (until_s - time.monotonic()) * 1e3


async def _all(work: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
    """All results; the first error withdraws what is left and is raised alone."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
