"""The README's example of a service that embeds the runtime, line by line."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_rt.batch_errors import DeadlineError, QueueFullError
from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.batched_models import BatchedClassifier
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span

OPTIONS = BatchOptions(max_batch=16, max_wait_ms=5, max_queue=256)


def test_the_example(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    released.set()
    jpeg_bytes = encode_image(np.full((40, 30, 3), 200, np.uint8), "jpeg")

    async def main() -> None:
        with Bundle.open(bundle_folder, threads=1) as bundle:
            model = bundle.classifier()
        original = model.logits

        def logits(*args: Any) -> Any:
            assert released.wait(30)
            return original(*args)

        monkeypatch.setattr(model, "logits", logits)
        sample = Sample("1", ("Tim", "leads", "Apple"), head=Span(0, 1), tail=Span(2, 3))
        async with BatchedClassifier(model, OPTIONS) as classifier:
            prediction = await classifier.predict(sample, jpeg_bytes, timeout_ms=5000)
            assert prediction.relation in model.labels and 0 < prediction.probability <= 1
            stats = classifier.batcher.stats()
            assert (stats.answered, stats.queued, stats.rejected) == (1, 0, 0)
            assert stats.wait_ms.count == stats.compute_ms.count == 1 and stats.batch_sizes.total == 1
            with pytest.raises(DeadlineError):
                await classifier.predict(sample, jpeg_bytes, timeout_ms=0)
            released.clear()
            tasks = [asyncio.create_task(classifier.predict(sample)) for _ in range(400)]
            await asyncio.sleep(0)  # all are on their way
            released.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        full = [answer for answer in answers if isinstance(answer, QueueFullError)]
        assert full and all(error.retry_after_s > 0 for error in full)
        assert len(full) + sum(not isinstance(answer, BaseException) for answer in answers) == 400

    asyncio.run(main())
