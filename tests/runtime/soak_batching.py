"""Many requests through the batched models of the tiny bundle, and the memory before, meanwhile and after.

`python -m tests.runtime.soak_batching [REQUESTS]`, of each component; one in fifty is cancelled, one in a hundred bad.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_rt.batched_models import BatchedCaptioner, BatchedClassifier, BatchedGenerator
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span
from tests.runtime.tiny_bundle import build_bundle

AT_ONCE = 32
ROUNDS = 5


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def send(ask: Callable[[int], Awaitable[Any]], numbers: range, outcomes: Counter[str]) -> None:
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            task = asyncio.ensure_future(ask(number))
            if number % 50 == 49:
                await asyncio.sleep(0)
                task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            outcomes[type(outcome).__name__ if isinstance(outcome, BaseException) else "answered"] += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))


async def soak(name: str, model: Any, ask: Callable[[int], Awaitable[Any]], requests: int) -> None:
    outcomes: Counter[str] = Counter()
    resident = [resident_mib()]
    async with model:
        for turn in range(ROUNDS):
            await send(ask, range(turn * requests // ROUNDS, (turn + 1) * requests // ROUNDS), outcomes)
            gc.collect()
            resident.append(resident_mib())
        stats = model.batcher.stats()
    print(f"{name}: {dict(outcomes)}; {stats.batch_sizes.count} batches")
    print(f"  resident MiB: {', '.join(f'{mib:.1f}' for mib in resident)}")


async def main(requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(build_bundle(Path(folder) / "bundle"), threads=1)
        rng = np.random.default_rng(0)
        files = [encode_image(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8), "jpeg") for _ in range(10)]
        sample = Sample("s", ("tim", "leads", "apple"), Span(0, 1), Span(2, 3))

        def file(number: int) -> bytes:
            return b"bad" if number % 100 == 7 else files[number % 10]

        classifier = BatchedClassifier(bundle.classifier())
        await soak("classifier", classifier, lambda n: classifier.predict(sample, file(n)), requests)
        captioner = BatchedCaptioner(bundle.captioner())
        prefixes = ("", "a red", "the")
        await soak("captioner", captioner, lambda n: captioner.caption(file(n), prefix=prefixes[n % 3]), requests)
        generator = BatchedGenerator(bundle.generator())
        sizes = (GenerateOptions(), GenerateOptions(height=64, width=64), GenerateOptions(steps=5))
        await soak(
            "generator",
            generator,
            lambda n: generator.generate("a red car", seed=-1 if n % 100 == 7 else n, options=sizes[n % 3]),
            requests,
        )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
