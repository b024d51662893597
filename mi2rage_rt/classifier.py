"""The relation classifier without PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, Engine, check_names
from mi2rage_engines.errors import BundleError, DataError, EngineError
from mi2rage_engines.spec import ClassifierSpec
from mi2rage_rt.images import pixel_values
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample
from mi2rage_rt.text import EntityMarkedTokenizer, MarkedRow

__all__ = ["Prediction", "RuntimeClassifier", "softmax"]


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable relation of a sample and its probability, 0 to 1."""

    relation: str
    probability: float


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis, float32, same shape."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True), dtype=np.float32)


class RuntimeClassifier:
    """Fulfils `RelationClassifier` from a bundle's graph.

    Args:
        spec: the component's part of the manifest.
        engine: the graph `classifier`.
        tokenizer: the sentences'.
        batch_size: samples run together at most.

    Raises:
        EngineError: the graph lacks a tensor.
    """

    def __init__(
        self, spec: ClassifierSpec, engine: Engine, tokenizer: EntityMarkedTokenizer, batch_size: int = 32
    ) -> None:
        check_names(engine, ["input_ids", "attention_mask"], ["logits"])
        self.labels = spec.labels
        self.spec = spec
        self.batch_size = batch_size
        self._engine = engine
        self._tokenizer = tokenizer

    def logits(self, samples: Sequence[Sample], images: Sequence[Image | None]) -> NDArray[np.float32]:
        """Unnormalised log-probabilities.

        Args:
            samples: sentences with their mentions.
            images: uint8 `(H, W, 3)` each, or None where there is none.

        Returns:
            float32 `(B, len(labels))`, in the order given.

        Raises:
            DataError: samples and images differ in number.
            EngineError: the graph failed, or gave NaN.
        """
        if len(samples) != len(images):
            raise DataError(f"{len(samples)} samples but {len(images)} images; expected one (or None) for every sample")
        rows = self._tokenizer.rows(samples)
        # Rows of like length together: a batch is as wide as its longest row.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
        result = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            result[batch] = self._run([rows[row] for row in batch], [images[row] for row in batch])
        return result

    def predict(self, samples: Sequence[Sample], images: Sequence[Image | None]) -> list[Prediction]:
        """The most probable relation of each sample; raises as `logits`."""
        return [
            Prediction(self.labels[int(row.argmax())], float(row.max()))
            for row in softmax(self.logits(samples, images))
        ]

    def _run(self, rows: Sequence[MarkedRow], images: Sequence[Image | None]) -> NDArray[np.float32]:
        processing = self.spec.preprocessing
        pixels = np.zeros((len(rows), 3, processing.height, processing.width), dtype=np.float32)
        present = [row for row, image in enumerate(images) if image is not None]
        pixels[present] = pixel_values([image for image in images if image is not None], processing)
        mask = np.zeros(len(rows), dtype=np.float32)
        mask[present] = 1.0
        inputs: dict[str, Array] = {**self._tokenizer.collate(rows), "pixel_values": pixels, "image_mask": mask}
        # A classifier of text alone has no image inputs.
        wanted = {tensor.name for tensor in self._engine.inputs}
        logits = self._engine.run({name: array for name, array in inputs.items() if name in wanted})["logits"]
        if logits.shape[-1] != len(self.labels):
            raise BundleError(
                f"{self._engine.name}: gives {logits.shape[-1]} logits, but the bundle names {len(self.labels)} "
                "labels; export again"
            )
        if np.isnan(logits).any():
            raise EngineError(
                f"{self._engine.name}: the logits hold NaN; the graph's precision is too low; export in a higher one"
            )
        return np.asarray(logits, dtype=np.float32)
