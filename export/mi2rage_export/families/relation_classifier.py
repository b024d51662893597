"""Our own relation classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.spec import AxisRange, TokenizerSpec
from mi2rage_export.families.family import Family
from mi2rage_export.graphs import IN_SEQUENCE, NORMAL, PADDING, Graph, Input, below, outputs_from

if TYPE_CHECKING:
    from mi2rage_training.classifier_model import LoadedClassifier

__all__ = ["FAMILY"]


def _graphs(classifier: LoadedClassifier) -> tuple[Graph, ...]:
    """The relation classifier's one graph."""
    module, spec = classifier.module, classifier.preprocessing
    vocabulary = int(classifier.config.text_encoder["vocab_size"])
    limit = classifier.max_length
    index = ("batch",)
    return (
        Graph(
            name="classifier/classifier",
            module=module,
            inputs=(
                Input("input_ids", "int64", ("batch", "sequence"), below(vocabulary)),
                Input("attention_mask", "int64", ("batch", "sequence"), PADDING),
                Input("head_index", "int64", index, IN_SEQUENCE),
                Input("tail_index", "int64", index, IN_SEQUENCE),
                Input("pixel_values", "float32", ("batch", 3, spec.height, spec.width), NORMAL),
                Input("image_mask", "float32", index, below(2)),
            ),
            outputs=outputs_from(logits=("batch", len(classifier.labels))),
            reference=lambda *tensors: (module(*tensors),),
            traced={"batch": 2, "sequence": min(11, limit)},
            checked=(
                {"batch": 1, "sequence": min(8, limit)},
                {"batch": 3, "sequence": min(32, limit)},
                {"batch": 8, "sequence": limit},
            ),
            axes={
                "batch": AxisRange(min=1, opt=8, max=64),
                "sequence": AxisRange(min=min(8, limit), opt=min(32, limit), max=limit),
            },
        ),
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
