"""A bundle's models for services: requests come one by one from coroutines and are computed in batches.

```python
bundle = Bundle.open("bundle")
async with BatchedClassifier(bundle.classifier()) as classifier:
    prediction = await classifier.predict(sample, image_bytes)
```

The answers are those of the models' own calls, to the rounding that another batch size brings. Images are decoded and
resized in the event loop's default executor; all else happens in the model's own thread. Each object belongs to one
event loop. A model that is wrapped here is not to be called beside it: whoever wants that takes a second one from the
bundle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.batching import MicroBatcher
from mi2rage_rt.captioner import CaptionOptions, RuntimeCaptioner
from mi2rage_rt.classifier import Prediction, RuntimeClassifier, softmax
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.images import decode_image, fitted
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample

__all__ = ["BatchedCaptioner", "BatchedClassifier", "BatchedGenerator"]

T = TypeVar("T")
R = TypeVar("R")


class _BatchedModel(Generic[T, R]):
    """What the three have in common; `batcher` has the counters, `alive` and `close`."""

    def __init__(self, name: str, function: Callable[[list[T]], Sequence[R]], options: BatchOptions | None) -> None:
        self.batcher: MicroBatcher[T, R] = MicroBatcher(function, options, name=name)
        self._coming = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.batcher.aclose(drain=kind is None)

    async def _looked_at(self, image: Image | bytes, processing: ImagePreprocessing | None) -> Image:
        """The image decoded, and resized where `processing` says how; in a thread of the executor."""
        # Those that are being decoded count as waiting: else an overloaded executor would be a queue without bound.
        self.batcher.check_room(self._coming)
        self._coming += 1
        try:
            return await asyncio.to_thread(_decoded, image, processing)
        finally:
            self._coming -= 1


def _decoded(image: Image | bytes, processing: ImagePreprocessing | None) -> Image:
    pixels = decode_image(image) if isinstance(image, bytes) else image
    # A photo that waits takes 36 MB, what the model sees of it 0.2 MB.
    return pixels if processing is None else fitted(pixels, processing)


def _left_ms(timeout_ms: float | None, started_s: float) -> float | None:
    return None if timeout_ms is None else timeout_ms - (time.monotonic() - started_s) * 1e3


class BatchedClassifier(_BatchedModel[tuple[Sample, Image | None], NDArray[np.float32]]):
    """`RuntimeClassifier` for one sample a call.

    Args:
        model: used by this object alone from now on.
        options: by default batches of the model's own size.
    """

    def __init__(self, model: RuntimeClassifier, options: BatchOptions | None = None) -> None:
        self.model = model
        super().__init__(model.spec.name, self._run, options or BatchOptions(max_batch=model.batch_size))

    async def logits(
        self, sample: Sample, image: Image | bytes | None = None, *, timeout_ms: float | None = None
    ) -> NDArray[np.float32]:
        """Unnormalised log-probabilities, float32 `(len(labels),)`.

        Args:
            sample: the sentence with its mentions.
            image: uint8 `(H, W, 3)`, or an encoded file's bytes.
            timeout_ms: the request is dropped where the model has not begun with it by then.

        Raises:
            QueueFullError: at once, where too many wait.
            DeadlineError: the time was over before it began.
            ClosedError: the batcher is closed.
            DataError: the image or the sample is unusable.
            EngineError: the graph failed, or gave NaN.
        """
        started_s = time.monotonic()
        pixels = None if image is None else await self._looked_at(image, self.model.spec.preprocessing)
        return await self.batcher.submit((sample, pixels), timeout_ms=_left_ms(timeout_ms, started_s))

    async def predict(
        self, sample: Sample, image: Image | bytes | None = None, *, timeout_ms: float | None = None
    ) -> Prediction:
        """The most probable relation; arguments and errors as `logits`."""
        shares = softmax(await self.logits(sample, image, timeout_ms=timeout_ms))
        return Prediction(self.model.labels[int(shares.argmax())], float(shares.max()))

    def _run(self, requests: list[tuple[Sample, Image | None]]) -> list[NDArray[np.float32]]:
        return list(self.model.logits([sample for sample, _ in requests], [image for _, image in requests]))


@dataclasses.dataclass(frozen=True, slots=True)
class _CaptionRequest:
    image: Image
    prefix: str
    seed: int | None
    options: CaptionOptions
    with_prefix: bool


class BatchedCaptioner(_BatchedModel[_CaptionRequest, str]):
    """`RuntimeCaptioner` for one image a call; requests share a batch where options and prefix length are equal.

    Args:
        model: used by this object alone from now on.
        options: by default batches of the model's own size.
    """

    def __init__(self, model: RuntimeCaptioner, options: BatchOptions | None = None) -> None:
        self.model = model
        # A vision graph with preprocessing resizes by itself.
        in_graph = any(tensor.name == "image" for tensor in model.spec.graphs["vision"].inputs)
        self._processing = None if in_graph else model.spec.preprocessing
        super().__init__(model.name, self._run, options or BatchOptions(max_batch=model.options.batch_size))

    async def caption(
        self,
        image: Image | bytes,
        *,
        prefix: str = "",
        seed: int | None = None,
        options: CaptionOptions | None = None,
        with_prefix: bool = True,
        timeout_ms: float | None = None,
    ) -> str:
        """A caption.

        Args:
            image: uint8 `(H, W, 3)`, or an encoded file's bytes.
            prefix: what the caption begins with.
            seed: of nucleus sampling; None for greedy decoding, or beams where the options ask for them.
            options: in place of the model's own.
            with_prefix: off leaves the prefix out of what is returned.
            timeout_ms: the request is dropped where the model has not begun with it by then.

        Raises:
            QueueFullError: at once, where too many wait.
            DeadlineError: the time was over before it began.
            ClosedError: the batcher is closed.
            DataError: the image is unusable, or the prefix leaves no room.
            InputError: an option is out of range.
            EngineError: a graph failed, or gave NaN.
        """
        started_s = time.monotonic()
        pixels = await self._looked_at(image, self._processing)
        request = _CaptionRequest(pixels, prefix, seed, options or self.model.options, with_prefix)
        key: Hashable = (request.options, len(self.model.prompt_ids(prefix)), seed is None, with_prefix)
        return await self.batcher.submit(request, key=key, timeout_ms=_left_ms(timeout_ms, started_s))

    def _run(self, requests: list[_CaptionRequest]) -> list[str]:
        first = requests[0]
        return self.model.caption(
            [request.image for request in requests],
            [request.prefix for request in requests],
            None if first.seed is None else [request.seed for request in requests if request.seed is not None],
            first.options,
            with_prefix=first.with_prefix,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _GenerateRequest:
    prompt: str
    seed: int
    options: GenerateOptions


class BatchedGenerator(_BatchedModel[_GenerateRequest, Image]):
    """`RuntimeGenerator` for one prompt a call; requests of equal options share a batch.

    Args:
        model: used by this object alone from now on.
        options: by default batches of the model's own size.
    """

    def __init__(self, model: RuntimeGenerator, options: BatchOptions | None = None) -> None:
        self.model = model
        own = model.options.batch_size
        super().__init__(model.name, self._run, options or (BatchOptions(own) if isinstance(own, int) else None))

    async def generate(
        self, prompt: str, *, seed: int, options: GenerateOptions | None = None, timeout_ms: float | None = None
    ) -> Image:
        """An image, uint8 `(H, W, 3)`.

        Args:
            prompt: what to draw.
            seed: 0 to 2^64 - 1; the noise is drawn from it alone.
            options: in place of the model's own.
            timeout_ms: the request is dropped where the model has not begun with it by then.

        Raises:
            QueueFullError: at once, where too many wait.
            DeadlineError: the time was over before it began.
            ClosedError: the batcher is closed.
            InputError: the options do not fit the model, or the seed is out of range.
            EngineError: a graph failed, or gave NaN or infinity.
        """
        request = _GenerateRequest(prompt, seed, options or self.model.options)
        return await self.batcher.submit(request, key=request.options, timeout_ms=timeout_ms)

    def _run(self, requests: list[_GenerateRequest]) -> list[Image]:
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        images = self.model.generate(prompts, seeds, requests[0].options)
        # Copies: a row of the array would keep the whole batch in memory as long as its client keeps it.
        return [image.copy() for image in images]
