"""`mi2rage-rt` with a classifier that is slow, or fails at a word.

`python -m tests.runtime.serve.odd_server SECONDS serve ...`; a sentence's first token decides: `crash` fails its batch,
`die` ends the worker, `lost` fails all batches from then on.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from mi2rage_engines.errors import EngineError
from mi2rage_rt import cli
from mi2rage_rt.classifier import RuntimeClassifier


def spoil(delay_s: float) -> None:
    original = RuntimeClassifier.logits
    lost = False

    def logits(self: RuntimeClassifier, samples: Any, images: Any) -> Any:
        nonlocal lost
        first = {sample.tokens[0] for sample in samples}
        time.sleep(delay_s)
        lost = lost or "lost" in first
        if lost:
            raise EngineError("/secret/model.onnx: the device is lost")
        if "die" in first:
            raise SystemExit("the worker ends")
        if "crash" in first:
            raise ValueError("a secret trace")
        return original(self, samples, images)

    RuntimeClassifier.logits = logits  # type: ignore[method-assign]


if __name__ == "__main__":
    spoil(float(sys.argv[1]))
    cli.main(sys.argv[2:])
