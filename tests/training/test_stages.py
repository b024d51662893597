"""The chain's stages side by side: what is made, how much at a time, and how every kind of error comes out."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mi2rage_engines.errors import EngineError, InputError
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.generator import RuntimeGenerator
from mi2rage_rt.protocols import Image
from mi2rage_training import chain_links
from mi2rage_training.chain import ChainConfig, Given, ImageFormat, synthesize
from mi2rage_training.chain_models import ChainModels
from mi2rage_training.pairs import Pair
from mi2rage_training.stages import AtOnce, Overlap, Stages, usual_overlap
from mi2rage_training.store import Candidate, StoreWriter, read_manifest
from tests.training.fakes import MeanCaptioner, NoiseGenerator
from tests.training.fakes import samples as sentences

CONFIG = ChainConfig(links=3, width=2, seed=5, shard_size=2)
PAIRS = [Pair(sample) for sample in sentences(12)]
OVERLAPS = [
    Overlap(2),
    Overlap(2, models_apart=True),
    Overlap(3),
    Overlap(5, models_apart=True),
    Overlap(3, models_free=True),
]
LONG_S = 20.0
"""Far above what any run here takes; whatever waits so long hangs."""


@pytest.fixture(autouse=True)
def _nothing_hangs_and_no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < LONG_S
    assert set(threading.enumerate()) == before


class _Slow(NoiseGenerator):
    """Takes its time, more for some calls than for others, and says which threads called it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        self.threads.add(threading.get_ident())
        time.sleep(0.002 * (len(self.calls) % 3))
        return super().generate(prompts, seeds)


class _SlowCaptioner(MeanCaptioner):
    def __init__(self) -> None:
        self.threads: set[int] = set()

    def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
        self.threads.add(threading.get_ident())
        time.sleep(0.003)
        return super().caption(images, *args, **kwargs)


class _MeanJudge:
    """Wants bright images, whose bytes it reads: they are to be encoded by then."""

    name = "mean"

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        assert all(row.image for row in candidates)
        return np.array([(sum(row.image) % 100) / 50 - 1 for row in candidates])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"image_format": ImageFormat.JPEG, "jpeg_quality": 75}, {"png_level": 1}, {"least_added_nats": -0.2}],
)
def test_the_store_is_the_same_to_the_byte(overlap: Overlap, settings: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    judge = _MeanJudge() if "least_added_nats" in settings else None
    one, two = tmp_path / "one", tmp_path / "two"
    synthesize(PAIRS, one, NoiseGenerator(), MeanCaptioner(), config, judge=judge, overlap=Overlap())
    generator, captioner = _Slow(), _SlowCaptioner()
    synthesize(PAIRS, two, generator, captioner, config, judge=judge, overlap=overlap)
    assert len(contents(one)) == 8
    assert contents(one) == contents(two)
    if overlap.models_free:
        assert generator.threads == captioner.threads
        assert len(generator.threads) == overlap.in_flight and threading.get_ident() not in generator.threads
        return
    assert generator.threads == {threading.get_ident()}
    assert len(captioner.threads) == 1
    assert (captioner.threads == generator.threads) is not overlap.models_apart


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_judged_chains_and_given_images_too(overlap: Overlap, tmp_path: Path) -> None:
    pictures = [Pair(pair.sample, AtOnce().submit(_png, 20 + row).result()) for row, pair in enumerate(PAIRS)]
    given = dataclasses.replace(CONFIG, given=Given.IMAGE)
    for name, at_a_time in (("one", Overlap()), ("two", overlap)):
        models = NoiseGenerator(), MeanCaptioner()
        synthesize(PAIRS, tmp_path / f"judged-{name}", *models, CONFIG, judge=_MeanJudge(), overlap=at_a_time)
        synthesize(pictures, tmp_path / f"texts-{name}", *models, given, overlap=at_a_time)
    assert contents(tmp_path / "judged-one") == contents(tmp_path / "judged-two")
    assert contents(tmp_path / "texts-one") == contents(tmp_path / "texts-two")


def _png(level: int) -> bytes:
    return chain_links.encode_image(np.full((8, 8, 3), level, np.uint8))


def test_a_slow_stage_holds_the_others_up() -> None:
    making: set[int] = set()
    most = 0
    begun: list[int] = []
    lock = threading.Lock()

    def make(item: int) -> None:
        nonlocal most
        with lock:
            begun.append(item)
            making.add(item)
            most = max(most, len(making))
        time.sleep(0.02 if item % 4 == 0 else 0.002)
        with lock:
            making.remove(item)

    taken = iter(range(100))  # items are taken as they are begun, never all at once
    with Stages(Overlap(3)) as stages:
        done = stages.done(taken, make)
        first = [next(done) for _ in range(10)]
        time.sleep(0.05)
        assert max(begun) <= 10 + 3
        rest = list(done)
    assert most == 3
    assert sorted(first + rest) == list(range(100))


def test_one_at_a_time_is_in_order_and_in_the_callers_thread() -> None:
    threads = set()
    with Stages(Overlap()) as stages:
        assert list(stages.done(range(5), lambda _: threads.add(threading.get_ident()))) == [0, 1, 2, 3, 4]
    assert threads == {threading.get_ident()}


def test_the_captioner_runs_while_the_generator_does(tmp_path: Path) -> None:
    """Each waits for the other inside a call: one after the other, neither would ever return."""
    generating, captioning = threading.Event(), threading.Event()

    class Generator(NoiseGenerator):
        def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
            if len(self.calls) == 1:
                generating.set()
                assert captioning.wait(LONG_S)
            return super().generate(prompts, seeds)

    class Captioner(MeanCaptioner):
        def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
            captioning.set()
            assert generating.wait(LONG_S)
            return super().caption(images, *args, **kwargs)

    overlap = Overlap(2, models_apart=True)
    manifest = synthesize(PAIRS[:4], tmp_path / "store", Generator(), Captioner(), CONFIG, overlap=overlap)
    assert manifest.rows == 24


def _at(call: int, error: BaseException) -> Callable[[], None]:
    """Raises `error` in the so-manieth call."""
    calls = iter(range(1_000_000))
    lock = threading.Lock()

    def check() -> None:
        with lock:
            number = next(calls)
        if number == call:
            raise error

    return check


class _BadGenerator(NoiseGenerator):
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self.check = check

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        self.check()
        return super().generate(prompts, seeds)


class _BadCaptioner(MeanCaptioner):
    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
        self.check()
        return super().caption(images, *args, **kwargs)


class _BadJudge(_MeanJudge):
    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        self.check()
        return super().added_nats(candidates)


@pytest.mark.parametrize(
    "overlap", [Overlap(), Overlap(2), Overlap(3, models_apart=True), Overlap(3, models_free=True)]
)
@pytest.mark.parametrize(
    "error", [EngineError("gave NaN"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("stage", ["generator", "captioner", "judge", "encoder", "writer"])
@pytest.mark.parametrize("call", [0, 5])
def test_an_error_comes_out_as_it_was_and_the_run_goes_on_later(
    stage: str, error: BaseException, call: int, overlap: Overlap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def models(bad: str) -> tuple[Any, Any, Any]:
        check = _at(call, error)
        return (
            _BadGenerator(check) if bad == "generator" else NoiseGenerator(),
            _BadCaptioner(check) if bad == "captioner" else MeanCaptioner(),
            _BadJudge(check) if bad == "judge" else _MeanJudge(),
        )

    def run(store: Path, bad: str) -> None:
        generator, captioner, judge = models(bad)
        synthesize(PAIRS, store, generator, captioner, CONFIG, judge=judge, overlap=overlap)

    with monkeypatch.context() as patch:
        check = _at(call, error)
        if stage == "encoder":
            patch.setattr(chain_links, "_encode", _checked(check, chain_links._encode))
        if stage == "writer":
            patch.setattr(StoreWriter, "write", _checked(check, StoreWriter.write))
        with pytest.raises(type(error)) as caught:
            run(tmp_path / "store", stage)
    assert caught.value is error
    left = contents(tmp_path / "store")
    assert "manifest.json" not in left
    assert not [name for name in left if name.startswith(".")]
    run(tmp_path / "store", "")
    run(tmp_path / "whole", "")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert left.items() <= contents(tmp_path / "whole").items()  # what was finished was whole


def _checked(check: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        check()
        return call(*args, **kwargs)

    return checked


def test_ctrl_c_between_two_calls_frees_what_was_taken_up() -> None:
    """The signal arrives when work was taken out of the queue and not begun: nobody is left waiting for it."""
    stages = Stages(Overlap(2))
    asked = threading.Event()

    def make(_: int) -> None:
        asked.set()
        stages.generator(NoiseGenerator()).generate(["a"], [1])

    class Interrupted:
        def __init__(self, queue: Any) -> None:
            self.queue = queue

        def put(self, item: Any) -> None:
            self.queue.put(item)

        def get(self) -> tuple[Future[Any], Any]:
            self.queue.get()
            raise KeyboardInterrupt

    stages._here._work = Interrupted(stages._here._work)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt), stages:
        list(stages.done(range(4), make))
    assert asked.is_set()


def test_nothing_is_taken_on_once_a_run_is_given_up() -> None:
    stages = Stages(Overlap(2, models_apart=True))
    with stages:
        generator, captioner = stages.generator(NoiseGenerator()), stages.captioner(MeanCaptioner())
    with pytest.raises(RuntimeError, match="given up"):
        generator.generate(["a"], [1])
    with pytest.raises(RuntimeError):
        captioner.caption([np.zeros((2, 2, 3), np.uint8)])


def test_shards_that_end_out_of_order_are_recorded_in_order(tmp_path: Path) -> None:
    class FirstIsSlow(MeanCaptioner):
        def __init__(self) -> None:
            self.calls = 0

        def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
            self.calls += 1
            time.sleep(0.05 if self.calls == 1 else 0)
            return super().caption(images, *args, **kwargs)

    overlap = Overlap(4, models_apart=True)
    synthesize(PAIRS, tmp_path / "store", NoiseGenerator(), FirstIsSlow(), CONFIG, overlap=overlap)
    assert list(read_manifest(tmp_path / "store").shards) == [f"shard-{index:05d}.parquet" for index in range(6)]


def test_the_usual_overlap_goes_by_the_models() -> None:
    generator, captioner = (object.__new__(kind) for kind in (RuntimeGenerator, RuntimeCaptioner))
    assert usual_overlap(generator, captioner) == Overlap(2, models_apart=True)
    assert usual_overlap(NoiseGenerator(), captioner) == Overlap(1)
    models = ChainModels(generator, captioner, {}, overlap=Overlap(2, models_apart=True))
    assert models.overlap_of(0) == models.overlap
    assert models.overlap_of(5) == Overlap(5, models_apart=True)
    with pytest.raises(InputError, match="in flight: came -1"):
        models.overlap_of(-1)
    with pytest.raises(InputError, match="in flight: came 0"):
        Overlap(0)
