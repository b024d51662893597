"""Our own relation classifiers, as two graphs: what is computed of an image alone, and all the rest.

An image that several pairs share is encoded once, and a pair without one costs no image.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mi2rage_engines.spec import Axis, AxisRange, TokenizerSpec
from mi2rage_export.families.family import Family
from mi2rage_export.graphs import IN_IMAGES, IN_SEQUENCE, NORMAL, PADDING, Graph, Input, below, outputs_from
from mi2rage_training.classifier_model import RelationModule

if TYPE_CHECKING:
    from mi2rage_training.classifier_model import LoadedClassifier

__all__ = ["FAMILY"]

_Shapes = dict[str, tuple[Axis, ...]]
"""What an image becomes: names, and sizes behind the batch."""

_BATCH = AxisRange(min=1, opt=8, max=64)


class _ImagePart(nn.Module):
    """pixel_values float32 (B, 3, H, W) -> image_keys, image_values (B, heads, P, size), image_summary (B, width).

    It holds the layers that it runs and no others, so that lowering one part leaves the other in fp32; the code is
    `RelationModule`'s own.
    """

    def __init__(self, module: RelationModule) -> None:
        super().__init__()
        self.image_encoder, self.heads = module.image_encoder, module.heads
        self.keys, self.values, self.summary = module.keys, module.values, module.summary

    _by_head = RelationModule._by_head

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole: Any = self
        return RelationModule.image_features(whole, RelationModule.patches(whole, pixel_values))


class _PairPart(nn.Module):
    """Text inputs, what `_ImagePart` gave of some images, and each row's place among them -> logits (B, labels)."""

    def __init__(self, module: RelationModule) -> None:
        super().__init__()
        self.text_encoder, self.heads, self.missing_image = module.text_encoder, module.heads, module.missing_image
        self.pair, self.pair_norm = module.pair, module.pair_norm
        self.image_norm, self.head = module.image_norm, module.head

    _by_head = RelationModule._by_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        head_index: Tensor,
        tail_index: Tensor,
        image_index: Tensor,
        image_mask: Tensor,
        image_keys: Tensor,
        image_values: Tensor,
        image_summary: Tensor,
    ) -> Tensor:
        whole: Any = self
        image = (image_keys, image_values, image_summary)
        keys, values, summary = (part.index_select(0, image_index) for part in image)
        return RelationModule.fuse_features(
            whole, input_ids, attention_mask, head_index, tail_index, (keys, values, summary), image_mask
        )


def _graphs(classifier: LoadedClassifier) -> tuple[Graph, ...]:
    """`image` and `classifier` of a relation classifier."""
    module, spec = classifier.module, classifier.preprocessing
    with torch.inference_mode():
        # How many patches a tower makes of an image is its own affair.
        keys, _, summary = module.image_features(module.patches(torch.zeros(1, 3, spec.height, spec.width)))
    key, whole = tuple(keys.shape[1:]), tuple(summary.shape[1:])
    shapes: _Shapes = {"image_keys": key, "image_values": key, "image_summary": whole}
    return _image_graph(classifier, shapes), _pair_graph(classifier, shapes)


def _image_graph(classifier: LoadedClassifier, shapes: _Shapes) -> Graph:
    module, spec = classifier.module, classifier.preprocessing
    return Graph(
        name="classifier/image",
        module=_ImagePart(module),
        inputs=(Input("pixel_values", "float32", ("batch", 3, spec.height, spec.width), NORMAL),),
        outputs=outputs_from(**{name: ("batch", *shape) for name, shape in shapes.items()}),
        reference=lambda pixels: module.image_features(module.patches(pixels)),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 3}, {"batch": _BATCH.max}),
        axes={"batch": _BATCH},
    )


def _pair_graph(classifier: LoadedClassifier, shapes: _Shapes) -> Graph:
    module, limit = classifier.module, classifier.max_length
    vocabulary = int(classifier.config.text_encoder["vocab_size"])
    row: tuple[Axis, ...] = ("batch",)

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        ids, attention, head, tail, index, mask, keys, values, summary = tensors
        image = (keys[index], values[index], summary[index])
        return (module.fuse_features(ids, attention, head, tail, image, mask),)

    return Graph(
        name="classifier/classifier",
        module=_PairPart(module),
        inputs=(
            Input("input_ids", "int64", ("batch", "sequence"), below(vocabulary)),
            Input("attention_mask", "int64", ("batch", "sequence"), PADDING),
            Input("head_index", "int64", row, IN_SEQUENCE),
            Input("tail_index", "int64", row, IN_SEQUENCE),
            Input("image_index", "int64", row, IN_IMAGES),
            Input("image_mask", "float32", row, below(2)),
            *(Input(name, "float32", ("images", *shape), NORMAL) for name, shape in shapes.items()),
        ),
        outputs=outputs_from(logits=("batch", len(classifier.labels))),
        reference=reference,
        traced={"batch": 2, "sequence": min(11, limit), "images": 3},
        checked=(
            {"batch": 1, "sequence": min(8, limit), "images": 1},
            {"batch": 3, "sequence": min(32, limit), "images": 2},
            {"batch": 8, "sequence": limit, "images": 8},
            {"batch": _BATCH.max, "sequence": min(8, limit), "images": _BATCH.max},
        ),
        axes={
            "batch": _BATCH,
            "sequence": AxisRange(min=min(8, limit), opt=min(32, limit), max=limit),
            "images": _BATCH,
        },
    )


def _write(folder: Path, classifier: LoadedClassifier) -> dict[str, Any]:
    """The tokenizer; returns the manifest's fields."""
    classifier.tokenizer.save(folder / "tokenizer.json")
    return {
        "name": classifier.name,
        "tokenizer": TokenizerSpec(
            file="classifier/tokenizer.json", max_length=classifier.max_length, pad_id=classifier.pad_id
        ),
        "preprocessing": classifier.preprocessing,
        "labels": classifier.labels,
    }


FAMILY = Family(
    name="relation-classifier",
    role="classifier",
    fits=lambda model: hasattr(model.module, "fuse"),
    graphs=_graphs,
    write=_write,
)
