"""Pairs as tensors: sentences tokenised once, images encoded once where the vision tower is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from mi2rage_rt.samples import Sample
from mi2rage_rt.text import EntityMarkedTokenizer
from mi2rage_training.classifier_model import LoadedClassifier, RelationModule
from mi2rage_training.metrics import RelationMetrics, relation_metrics
from mi2rage_training.pairs import Pair, mentions_only

__all__ = ["PairTensors", "View", "logits_from", "logits_of", "metrics_of", "predictions"]

_CACHE_LIMIT_BYTES = 2 << 30
_ENCODE_ROWS = 256
_LOGITS_ROWS = 128


class View(StrEnum):
    """What a classifier sees of a pair.

    `both`: sentence and image; `text`: the image is hidden; `image`: the sentence is reduced to its two mentions.
    """

    BOTH = "both"
    TEXT = "text"
    IMAGE = "image"


class _Sentences:
    """Ids of many sentences; a batch is cut to the longest of its own."""

    def __init__(self, tokenizer: EntityMarkedTokenizer, samples: Sequence[Sample]) -> None:
        arrays = tokenizer.collate(tokenizer.rows(samples))
        self.ids = torch.from_numpy(arrays["input_ids"])
        self.lengths = torch.from_numpy(arrays["attention_mask"].sum(1))
        self.head = torch.from_numpy(arrays["head_index"])
        self.tail = torch.from_numpy(arrays["tail_index"])

    def inputs(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        lengths = self.lengths[rows]
        width = int(lengths.max())
        batch = {
            "input_ids": self.ids[rows, :width],
            "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long(),
            "head_index": self.head[rows],
            "tail_index": self.tail[rows],
        }
        return {name: values.to(device) for name, values in batch.items()}


class PairTensors:
    """The classifier's inputs from rows of a set of pairs.

    Args:
        frozen: the vision tower does not change: its patch states are kept, where they fit into memory.
        reducible: sentences may be asked for reduced to their mentions.

    Attributes:
        mask: float32 (N,) on the CPU, 1 with an image, 0 without.
    """

    def __init__(
        self, classifier: LoadedClassifier, pairs: Sequence[Pair], *, frozen: bool, reducible: bool = False
    ) -> None:
        self.classifier = classifier
        self.pairs = pairs
        self.frozen = frozen
        self.mask = torch.tensor([pair.image is not None for pair in pairs], dtype=torch.float32)
        samples = [pair.sample for pair in pairs]
        # Row N + i is sentence i reduced to its mentions.
        reduced = [mentions_only(sample) for sample in samples] if reducible else []
        self._sentences = _Sentences(classifier.tokenizer, samples + reduced)
        self._blind = not self.mask.any()
        self._cache = self._encoded_all() if frozen and not self._blind else None

    def _encoded_all(self) -> Tensor | None:
        if self._encode([0]).nbytes * len(self.pairs) > _CACHE_LIMIT_BYTES:
            return None
        starts = range(0, len(self.pairs), _ENCODE_ROWS)
        return torch.cat([self._encode(range(i, min(i + _ENCODE_ROWS, len(self.pairs)))) for i in starts])

    def _pixels(self, rows: Sequence[int]) -> Tensor:
        return self.classifier.image_inputs([self.pairs[row].load() for row in rows])[0]

    def _encode(self, rows: Sequence[int]) -> Tensor:
        self.classifier.module.image_encoder.eval()
        with torch.no_grad():
            return self.classifier.module.patches(self._pixels(rows))

    def text(self, rows: Tensor, reduced: Tensor | None = None) -> dict[str, Tensor]:
        """Text inputs of some rows; those where `reduced`, bool (B,), holds show their mentions alone."""
        wanted = rows if reduced is None else rows + reduced.long() * len(self.pairs)
        return self._sentences.inputs(wanted, self.classifier.module.missing_image.device)

    def image(self, rows: Tensor) -> dict[str, Tensor]:
        """`patches` (B, P, width) of some rows, or, while the tower is fitted, the `pixels` (B, 3, H, W)."""
        module = self.classifier.module
        if self._blind:  # no image anywhere: there is nothing to encode
            width = module.keys.in_features
            return {"patches": torch.zeros(len(rows), 1, width, device=module.missing_image.device)}
        if self._cache is not None:
            return {"patches": self._cache[rows.to(self._cache.device)]}
        if self.frozen:
            return {"patches": self._encode(rows.tolist())}
        return {"pixels": self._pixels(rows.tolist())}


def logits_from(module: RelationModule, text: dict[str, Tensor], image: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Logits (B, labels) of what `PairTensors` gives."""
    patches = image["patches"] if "patches" in image else module.patches(image["pixels"])
    return module.fuse(**text, patches=patches, image_mask=mask)


@torch.inference_mode()
def logits_of(data: PairTensors, rows: Tensor, view: View = View.BOTH) -> Iterator[Tensor]:
    """Logits of some rows, float32 (B, labels) on the CPU, batch by batch, in evaluation mode."""
    module = data.classifier.module.eval()
    for batch in torch.split(rows, _LOGITS_ROWS):
        reduced = torch.ones(len(batch), dtype=torch.bool) if view is View.IMAGE else None
        mask = data.mask[batch] * (0.0 if view is View.TEXT else 1.0)
        logits = logits_from(module, data.text(batch, reduced), data.image(batch), mask.to(module.missing_image.device))
        yield logits.float().cpu()


def predictions(data: PairTensors, rows: Tensor) -> list[int]:
    """Indices of the most likely labels of some rows, sentence and image shown."""
    return [int(index) for logits in logits_of(data, rows) for index in logits.argmax(1)]


def metrics_of(data: PairTensors, predicted: Sequence[int]) -> RelationMetrics:
    """The field's metric of the label indices predicted for all rows."""
    labels = data.classifier.labels
    gold = data.classifier.label_ids([pair.sample for pair in data.pairs])
    return relation_metrics([labels[i] for i in gold], [labels[i] for i in predicted])
