"""The relation classifier without PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, DeviceArray, Engine, check_names
from mi2rage_engines.errors import BundleError, DataError, EngineError
from mi2rage_engines.spec import ClassifierSpec
from mi2rage_rt.classifier_batches import distinct_images, image_groups, length_batches
from mi2rage_rt.images import pixel_values
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample
from mi2rage_rt.text import EntityMarkedTokenizer, MarkedRow

__all__ = ["Prediction", "RuntimeClassifier", "softmax"]

_IDS_A_ROW = 64
"""A batch holds as many ids as so many a row: tweets have some 40, and a few long ones should not be many together."""
_PADDING = 64
"""Ids of padding in a batch, beyond which another run costs less."""


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
    """Fulfils `RelationClassifier` from a bundle's graphs.

    An image that several samples of a call share, as the same array or as equal pixels, is encoded once. One object may
    be called from several threads at once where its engines may, as those on ONNX Runtime.

    Args:
        spec: the component's part of the manifest.
        engines: the graph `classifier`, and `image` where images are encoded apart from it.
        tokenizer: the sentences'.
        batch_size: samples, and images, run together at most; fewer where sentences are long.

    Raises:
        EngineError: a graph lacks a tensor.
    """

    def __init__(
        self,
        spec: ClassifierSpec,
        engines: Mapping[str, Engine],
        tokenizer: EntityMarkedTokenizer,
        batch_size: int = 32,
    ) -> None:
        self.labels = spec.labels
        self.spec = spec
        self.batch_size = batch_size
        self._engine = engines["classifier"]
        self._image = engines.get("image")
        self._tokenizer = tokenizer
        needed = ["input_ids", "attention_mask"]
        if self._image is not None:
            check_names(self._image, ["pixel_values"], [])
            needed += ["image_index", "image_mask", *(tensor.name for tensor in self._image.outputs)]
        check_names(self._engine, needed, ["logits"])
        self._wanted = frozenset(tensor.name for tensor in self._engine.inputs)
        self._sees_images = self._image is not None or "pixel_values" in self._wanted

    def logits(
        self,
        samples: Sequence[Sample],
        images: Sequence[Image | None],
        firsts: Sequence[int | None] | None = None,
    ) -> NDArray[np.float32]:
        """Unnormalised log-probabilities.

        Args:
            samples: sentences with their mentions.
            images: uint8 `(H, W, 3)` each, or None where there is none.
            firsts: which images are equal, as `distinct_images` says it; by default it is looked for, with all of them
                in memory. Where it is given, those of one batch are.

        Returns:
            float32 `(B, len(labels))`, in the order given.

        Raises:
            DataError: samples and images differ in number.
            EngineError: the graph failed, or gave NaN.
        """
        if len(samples) != len(images):
            raise DataError(f"{len(samples)} samples but {len(images)} images; expected one (or None) for every sample")
        rows = self._tokenizer.rows(samples)
        lengths = [len(row.ids) for row in rows]
        result = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        if firsts is None or not self._sees_images:
            firsts = distinct_images(images if self._sees_images else [None] * len(images))
        for group in image_groups(lengths, firsts, self.batch_size):
            shown = self._shown([images[place] for place in group.images])
            ascending = [lengths[row] for row in group.rows]
            for batch in length_batches(ascending, self.batch_size, self.batch_size * _IDS_A_ROW, _PADDING):
                chosen = group.rows[batch]
                result[chosen] = self._run([rows[row] for row in chosen], shown, group.index[batch])
        return result

    def predict(self, samples: Sequence[Sample], images: Sequence[Image | None]) -> list[Prediction]:
        """The most probable relation of each sample; raises as `logits`."""
        return [
            Prediction(self.labels[int(row.argmax())], float(row.max()))
            for row in softmax(self.logits(samples, images))
        ]

    def _shown(self, images: Sequence[Image | None]) -> Mapping[str, Array | DeviceArray]:
        """Distinct images as the graph `classifier` takes them."""
        if not self._sees_images:
            return {}
        if self._image is not None and not images:
            # The graph wants one image, of which nothing is used.
            return {
                tensor.name: np.zeros((1, *map(int, tensor.shape[1:])), dtype=tensor.dtype)
                for tensor in self._image.outputs
            }
        pixels = pixel_values([image for image in images if image is not None], self.spec.preprocessing)
        return {"pixel_values": pixels} if self._image is None else self._image.call({"pixel_values": pixels})

    def _run(
        self, rows: Sequence[MarkedRow], shown: Mapping[str, Array | DeviceArray], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        inputs: dict[str, Array | DeviceArray] = {**self._tokenizer.collate(rows), **shown}
        inputs["image_mask"] = (index >= 0).astype(np.float32)
        inputs["image_index"] = np.maximum(index, 0)
        if "pixel_values" in shown:
            inputs["pixel_values"] = _in_rows(np.asarray(shown["pixel_values"]), index)
        found = self._engine.call({name: array for name, array in inputs.items() if name in self._wanted})
        logits = found["logits"].numpy()
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


def _in_rows(images: Array, index: NDArray[np.int64]) -> Array:
    """The images of rows, (B, ...); zeros where the index is -1."""
    rows = np.zeros((len(index), *images.shape[1:]), dtype=images.dtype)
    rows[index >= 0] = images[index[index >= 0]]
    return rows
