"""Testing a classifier, PyTorch folder or exported bundle, on labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mi2rage_engines.bundle import MANIFEST_NAME
from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_rt.progress import track
from mi2rage_rt.protocols import RelationClassifier
from mi2rage_training.metrics import RelationMetrics, relation_metrics
from mi2rage_training.pairs import Pair

__all__ = ["classifier_from", "evaluate_pairs"]

_BATCH = 64


def classifier_from(folder: Path) -> RelationClassifier:
    """The classifier in a folder: a bundle's, run without PyTorch, or one that `train` wrote.

    Raises:
        ModelFolderError: the folder is neither.
        BundleError: the bundle is not whole, or has no classifier.
    """
    if (folder / MANIFEST_NAME).is_file():
        from mi2rage_rt.bundle import Bundle

        return Bundle.open(folder).classifier()
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder; expected one written by 'mi2rage-rt train' or 'export'")
    from mi2rage_training.classifier_model import load_classifier

    return load_classifier(folder)


def evaluate_pairs(classifier: RelationClassifier, pairs: Sequence[Pair]) -> RelationMetrics:
    """The field's metric on labelled pairs.

    Raises:
        DataError: a row has no label, or one that the classifier does not know.
    """
    predicted: list[str] = []
    gold: list[str] = []
    for pair in pairs:
        if pair.sample.label not in classifier.labels:
            raise DataError(
                f"sample {pair.sample.id}: its label is {pair.sample.label!r}, which the classifier does not know; "
                f"expected one of: {', '.join(classifier.labels)}"
            )
        gold.append(str(pair.sample.label))
    for start in track(range(0, len(pairs), _BATCH), "evaluate"):
        batch = pairs[start : start + _BATCH]
        logits = classifier.logits([pair.sample for pair in batch], [pair.load() for pair in batch])
        predicted += [classifier.labels[index] for index in logits.argmax(1)]
    return relation_metrics(gold, predicted)
