"""The batched models give what the models' own calls give; and the models' own calls, from several threads."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt import batched_models
from mi2rage_rt.batch_errors import DeadlineError, QueueFullError
from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.batched_models import BatchedCaptioner, BatchedClassifier, BatchedGenerator
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span

LONG_S = 30.0
TEXTS = ("the red dog of tim", "rome apple in the sea", "tim leads apple by the sea")
PROMPTS = ("a red car", "the sea", "tim and apple by the sea side and a dog with a car")


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder, threads=1)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (7 + n % 4, 20 - n, 3), dtype=np.uint8) for n in range(8)]


def sample(number: int) -> Sample:
    return Sample(str(number), tuple(TEXTS[number % 3].split()), Span(number % 5, number % 5 + 1), Span(1, 2))


class Recorder:
    """Notes the lists that a model's method is called with, and holds the calls while `released` is clear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: object, method: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.entered = threading.Event()
        self.released = threading.Event()
        self.released.set()
        original: Callable[..., Any] = getattr(model, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(args)
            self.entered.set()
            assert self.released.wait(LONG_S)
            return original(*args, **kwargs)

        monkeypatch.setattr(model, method, call)


def test_the_classifier_answers_as_its_own_call(
    bundle: Bundle, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundle.classifier(batch_size=4)
    samples = [sample(number) for number in range(8)]
    pictures = [image if number % 3 else None for number, image in enumerate(images)]
    logits, predictions = model.logits(samples, pictures), model.predict(samples, pictures)
    recorder = Recorder(monkeypatch, model, "logits")

    async def main() -> None:
        async with BatchedClassifier(model) as classifier:
            assert classifier.batcher.options.max_batch == 4
            sent = [encode_image(image) if image is not None and n % 2 else image for n, image in enumerate(pictures)]
            rows = await asyncio.gather(*map(classifier.logits, samples, sent))
            np.testing.assert_allclose(np.stack(rows), logits, atol=1e-6)
            predicted = await asyncio.gather(*map(classifier.predict, samples, sent))
            assert [one.relation for one in predicted] == [one.relation for one in predictions]
            assert [one.probability for one in predicted] == pytest.approx([one.probability for one in predictions])

    asyncio.run(main())
    assert len(recorder.calls) < 16
    # What waits is as large as the model sees it, not as large as it came.
    assert {image.shape for _, batch in recorder.calls for image in batch if image is not None} == {(6, 6, 3)}


def test_a_bad_image_fails_its_own_request(bundle: Bundle, images: list[np.ndarray]) -> None:
    async def main() -> None:
        async with BatchedClassifier(bundle.classifier()) as classifier:
            good, bad, unfit = await asyncio.gather(
                classifier.predict(sample(0), images[0]),
                classifier.predict(sample(1), b"no image"),
                classifier.predict(Sample("s", ("tim",), Span(3, 4), Span(0, 1)), images[0]),
                return_exceptions=True,
            )
            assert good == bundle.classifier().predict([sample(0)], [images[0]])[0]
            assert isinstance(bad, DataError) and isinstance(unfit, Exception)

    asyncio.run(main())


def test_the_captioner_answers_as_its_own_call(
    bundle: Bundle, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundle.captioner(CaptionOptions(max_new_tokens=6))
    wild = CaptionOptions(temperature=9.0, top_p=1.0, max_new_tokens=6)
    requests: list[dict[str, Any]] = [
        {"prefix": "a"},
        {"prefix": "a", "seed": 7, "options": wild},
        {"prefix": "tim leads"},
        {"prefix": "the", "seed": 8, "options": wild},
        {"prefix": "tim in", "with_prefix": False},
        {"options": CaptionOptions(max_new_tokens=1)},
        {"prefix": "rome"},
        {"prefix": "sea", "options": wild},
    ]
    expected = []
    for image, request in zip(images, requests, strict=True):
        seeds = [request["seed"]] if "seed" in request else None
        with_prefix = request.get("with_prefix", True)
        options = request.get("options")
        expected += model.caption([image], [request.get("prefix", "")], seeds, options, with_prefix=with_prefix)
    recorder = Recorder(monkeypatch, model, "caption")
    recorder.released.clear()

    async def main() -> list[str]:
        async with BatchedCaptioner(model, BatchOptions(max_wait_ms=0)) as captioner:
            first = asyncio.create_task(captioner.caption(images[0]))
            await asyncio.to_thread(recorder.entered.wait, LONG_S)
            tasks = [
                asyncio.create_task(captioner.caption(encode_image(image), **request))
                for image, request in zip(images, requests, strict=True)
            ]
            while captioner.batcher.stats().queued < len(tasks):
                await asyncio.sleep(0.001)
            recorder.released.set()
            await first
            return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == expected
    assert len(set(expected)) > 4
    together = sorted(tuple(sorted(call[1])) for call in recorder.calls[1:])
    assert together == [("",), ("a", "rome"), ("a", "the"), ("sea",), ("tim in",), ("tim leads",)]


def test_the_generator_answers_as_its_own_call(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bundle.generator()
    options = (None, GenerateOptions(steps=5), GenerateOptions(height=8))
    expected = [model.generate([PROMPTS[n % 3]], [n], options[n % 3])[0] for n in range(9)]
    recorder = Recorder(monkeypatch, model, "generate")
    recorder.released.clear()

    async def main() -> list[np.ndarray]:
        async with BatchedGenerator(model, BatchOptions(max_wait_ms=0)) as generator:
            first = asyncio.create_task(generator.generate("a", seed=0))
            await asyncio.to_thread(recorder.entered.wait, LONG_S)
            tasks = [
                asyncio.create_task(generator.generate(PROMPTS[n % 3], seed=n, options=options[n % 3]))
                for n in range(9)
            ]
            await asyncio.sleep(0)
            assert generator.batcher.stats().queued == 9
            recorder.released.set()
            await first
            with pytest.raises(InputError, match="steps 77"):
                await generator.generate("a", seed=0, options=GenerateOptions(steps=77))
            return await asyncio.gather(*tasks)

    made = asyncio.run(main())
    for image, wanted in zip(made, expected, strict=True):
        assert image.shape == wanted.shape and image.base is None
        # Equal but for the rounding of another batch size.
        assert np.abs(image.astype(int) - wanted).max() <= 1
    assert sorted(seeds for _, seeds, _ in recorder.calls[1:4]) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_images_that_are_being_decoded_count_as_waiting(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = types.SimpleNamespace(decode=lambda content: np.zeros((9, 9, 3), np.uint8))
    recorder = Recorder(monkeypatch, decoder, "decode")
    recorder.released.clear()
    monkeypatch.setattr(batched_models, "decode_image", decoder.decode)

    async def main() -> None:
        async with BatchedClassifier(bundle.classifier(), BatchOptions(max_wait_ms=0, max_queue=2)) as classifier:
            coming = [asyncio.create_task(classifier.logits(sample(1), b"image")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                await classifier.logits(sample(1), b"image")
            recorder.released.set()
            await asyncio.gather(*coming)
            assert len(recorder.calls) == 2  # what is refused is not decoded
            with pytest.raises(DeadlineError):
                await classifier.logits(sample(1), b"image", timeout_ms=0)

    asyncio.run(main())


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("component", ["classifier", "captioner", "generator"])
def test_one_model_in_four_threads(bundle: Bundle, images: list[np.ndarray], component: str) -> None:
    model: Any = getattr(bundle, component)()

    def call(number: int) -> list[Any]:
        three = [number, number + 1, number + 2]
        pictures = [images[n % 8] for n in three]
        if component == "classifier":
            return list(model.logits([sample(n) for n in three], [pictures[0], None, pictures[2]]).tolist())
        if component == "captioner":
            seeds = three if number % 2 else None
            return list(model.caption(pictures, [PROMPTS[n % 2] for n in three], seeds))
        return list(model.generate([PROMPTS[n % 3] for n in three], three).tolist())

    expected = [call(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: call(number % 6), range(240)))
    assert answers == expected * 40
