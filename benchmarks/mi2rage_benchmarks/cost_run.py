"""A piece of the chain, run with a clock at every stage: generate, caption, encode, write."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from mi2rage_benchmarks.cost import CostFigures, Energy
from mi2rage_benchmarks.environment import environment
from mi2rage_benchmarks.power import EnergyMeter
from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt.progress import steps
from mi2rage_rt.protocols import Image, ImageToText, TextToImage
from mi2rage_training.chain_config import ChainConfig
from mi2rage_training.chain_links import Links
from mi2rage_training.chain_models import ChainModels
from mi2rage_training.pairs import Pair
from mi2rage_training.stages import Overlap, Stages
from mi2rage_training.store import StoreWriter

__all__ = ["STAGES", "Piece", "device_name", "figures_of", "run_piece"]

P = ParamSpec("P")
R = TypeVar("R")

STAGES = ("generate", "caption", "encode", "write")


class StageClock:
    """Seconds that each stage was at work, from whatever threads."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """The block is work of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start


class _Generator:
    def __init__(self, model: TextToImage, clock: StageClock) -> None:
        self.name = model.name
        self._model = model
        self._clock = clock

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        with self._clock.at("generate"):
            return self._model.generate(prompts, seeds)


class _Captioner:
    def __init__(self, model: ImageToText, clock: StageClock) -> None:
        self.name = model.name
        self._model = model
        self._clock = clock

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        with self._clock.at("caption"):
            return self._model.caption(images, prefixes, seeds, with_prefix=with_prefix)


class _Encoders(Executor):
    def __init__(self, encoders: Executor, clock: StageClock) -> None:
        self._encoders = encoders
        self._clock = clock

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        def timed() -> R:
            with self._clock.at("encode"):
                return fn(*args, **kwargs)

        return self._encoders.submit(timed)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What a piece of the chain took.

    Attributes:
        texts, candidates: that went in and came out.
        ends_s: when each shard was done, counted from the beginning, in the order in which they were.
        held: candidates of these.
        stages_s: seconds each stage was at work in all.
        energy: of the whole; None where it was not asked for.
    """

    texts: int
    ends_s: tuple[float, ...]
    held: tuple[int, ...]
    stages_s: dict[str, float]
    energy: Energy | None

    @property
    def candidates(self) -> int:
        return sum(self.held)


def run_piece(
    pairs: Sequence[Pair], models: ChainModels, config: ChainConfig, overlap: Overlap, *, power: bool = False
) -> Piece:
    """Make the candidates of some real samples into a store that is thrown away, as `synthesize` makes them.

    Args:
        power: measure the energy too.
    """
    clock, ends = StageClock(), list[tuple[float, int]]()
    starts = range(0, len(pairs), config.shard_size)
    meter = EnergyMeter() if power else None
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mi2rage-cost-")))
        bar = stack.enter_context(steps("cost", len(starts)))
        stages = stack.enter_context(Stages(overlap))
        generator = stages.generator(_Generator(models.generator, clock))
        captioner = stages.captioner(_Captioner(models.captioner, clock))
        links = Links(generator, captioner, config, None, _Encoders(stages.encoders, clock))
        writer = StoreWriter(home / "store", {"step": "cost"})
        if meter is not None:
            stack.enter_context(meter)
        begun_s = time.perf_counter()

        def make(index: int) -> None:
            made = links.make(pairs[starts[index] : starts[index] + config.shard_size])
            with clock.at("write"):
                writer.write(index, made)
            ends.append((time.perf_counter() - begun_s, len(made)))

        for _ in stages.done(range(len(starts)), make):
            bar.advance()
    ends.sort()
    return Piece(
        texts=len(pairs),
        ends_s=tuple(end for end, _ in ends),
        held=tuple(count for _, count in ends),
        stages_s=clock.seconds,
        energy=None if meter is None else meter.energy,
    )


def figures_of(piece: Piece, chain: dict[str, Any], overlap: Overlap, load_s: float, device: str) -> CostFigures:
    """The figures of a piece: the shards after the first ones, which had the stages to themselves.

    Raises:
        InputError: there are no shards after them, or nothing was made.
    """
    first = overlap.in_flight
    if len(piece.ends_s) <= first or not all(piece.held):
        raise InputError(
            f"a run of {piece.texts} texts: came to {len(piece.ends_s)} shards with {piece.candidates} candidates; "
            f"expected {first + 1} shards or more, none of them empty, {first + 8} for an interval worth its name; "
            "give a larger --run, or a smaller --shard-size"
        )
    shards_s = tuple(float(gap) for gap in np.diff(piece.ends_s[first - 1 :]))
    held = piece.held[first:]
    pace = sum(shards_s) / sum(held)
    return CostFigures(
        origin=f"a run of {piece.texts} texts",
        device=device,
        chain=chain,
        texts=piece.texts,
        candidates=piece.candidates,
        load_s=load_s,
        fill_s=max(0.0, piece.ends_s[first - 1] - pace * sum(piece.held[:first])),
        shards_s=shards_s,
        shards_candidates=held,
        stages_s=piece.stages_s,
        energy=piece.energy,
        environment=environment(usable_cores()),
    )


def device_name(device: str) -> str:
    """What a bundle's models run on: the GPU where ONNX Runtime has CUDA and it is not kept from it, else the CPU."""
    import onnxruntime

    if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return _gpu_name() or "a GPU"
    return environment(usable_cores())["cpu"]


def _gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.partition("\n")[0].strip() or None
