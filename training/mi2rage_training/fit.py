"""Fitting the relation classifier on pairs, and asking it about pairs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mi2rage_engines.errors import DataError, InputError
from mi2rage_training.classifier_model import ClassifierConfig, LoadedClassifier, RelationModule
from mi2rage_training.encoders import image_encoder_from, text_encoder_from
from mi2rage_training.fit_checkpoint import CheckpointFile, discard_checkpoint, fingerprint_of
from mi2rage_training.fit_config import FitConfig, MixedPrecision
from mi2rage_training.fit_data import PairTensors, View, logits_of, metrics_of, predictions
from mi2rage_training.fit_device import accelerator_for, is_main_process
from mi2rage_training.fit_loop import Trainer
from mi2rage_training.fit_targets import targets_of
from mi2rage_training.metrics import NONE_LABEL, RelationMetrics
from mi2rage_training.pairs import Pair

logger = logging.getLogger(__name__)

__all__ = [
    "Fit",
    "FitConfig",
    "MixedPrecision",
    "View",
    "discard_checkpoint",
    "fit_classifier",
    "is_main_process",
    "labels_of",
    "logits_of_pairs",
    "new_classifier",
    "score_pairs",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """A fitted classifier.

    Attributes:
        losses: mean training loss of each epoch, in nats; weighted, and of hidden views, as the settings ask for.
        validation_f1: micro F1 (0 to 1) after each epoch, empty without validation pairs.
        best_epoch: the epoch (from 1) whose weights are kept.
        steps: optimiser steps taken in all.
        resumed_at: the step that a checkpoint let it go on from, 0 without.
    """

    classifier: LoadedClassifier
    losses: tuple[float, ...]
    validation_f1: tuple[float, ...]
    best_epoch: int
    steps: int = 0
    resumed_at: int = 0


def labels_of(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """The labels of the pairs: `None` first, where it occurs, the rest by name.

    Raises:
        DataError: a sample has no label, or there is only one label.
    """
    labels = set()
    for pair in pairs:
        if pair.sample.label is None:
            raise DataError(f"sample {pair.sample.id}: has no label; training needs labelled samples")
        labels.add(pair.sample.label)
    if len(labels) < 2:
        raise DataError(f"the training data have {len(labels)} label(s); expected at least two to tell apart")
    return tuple(sorted(labels, key=lambda label: (label != NONE_LABEL, label)))


def new_classifier(labels: Sequence[str], config: FitConfig, name: str = "classifier") -> LoadedClassifier:
    """A classifier with fresh fusion weights, drawn from torch's global generator."""
    text_encoder, tokenizer = text_encoder_from(config.text_encoder, config.max_length)
    image_encoder, preprocessing = image_encoder_from(config.image_encoder)
    image_encoder.requires_grad_(config.train_image_encoder)
    module = RelationModule(
        text_encoder, image_encoder, len(labels), width=config.width, heads=config.heads, dropout=config.dropout
    )
    described = ClassifierConfig(
        name=name,
        labels=tuple(labels),
        text_encoder=_config_dict(text_encoder),
        image_encoder=_config_dict(image_encoder),
        sources={"text_encoder": config.text_encoder, "image_encoder": config.image_encoder},
        preprocessing=preprocessing,
        width=config.width,
        heads=config.heads,
        dropout=config.dropout,
        max_length=config.max_length,
    )
    return LoadedClassifier(described, module, tokenizer)


def _config_dict(module: nn.Module) -> dict[str, object]:
    described: dict[str, object] = module.config.to_dict()  # type: ignore[operator, union-attr]
    described.pop("_name_or_path", None)
    return described


def fit_classifier(
    pairs: Sequence[Pair],
    config: FitConfig,
    *,
    validation: Sequence[Pair] = (),
    labels: Sequence[str] | None = None,
    device: str = "cpu",
    description: str = "train",
    weights: Sequence[float] | None = None,
    soft_targets: NDArray[np.floating] | None = None,
    checkpoint: Path | None = None,
) -> Fit:
    """Fit a classifier on pairs with cross-entropy; with validation pairs, keep the epoch of best micro F1.

    The weights that come out depend on the arguments alone, bit by bit on one machine, one number of threads and one
    number of processes. In processes that `accelerate launch` or `torchrun` started, all call it with the same
    arguments and get the same classifier; a step then sees the same rows as in one process.

    Args:
        pairs: labelled; images may be missing.
        validation: pairs that choose the epoch, and with `patience` the end, and nothing else.
        labels: the classifier's labels; by default those of `pairs`.
        device: where to fit; the classifier is returned on the CPU. One of several processes takes the GPU of its rank.
        weights: one a pair, 0 or more; multiplies its loss.
        soft_targets: shares of the labels, in the classifier's order, (N, labels); `distill` says how much they count.
        checkpoint: folder of a checkpoint, written after each epoch and every `checkpoint_steps`. A call that finds one
            goes on from it and ends with the weights of a call that was never stopped. The last one is kept: a further
            call returns the finished classifier at once. `discard_checkpoint` deletes it.

    Raises:
        DataError: there are no pairs, or labels, weights or soft targets do not fit.
        InputError: settings that do not go together, or a checkpoint of other settings or data.
    """
    if not pairs:
        raise DataError("training data: no pairs came; expected at least one; check what was read")
    if config.patience is not None and not validation:
        raise InputError(
            f"patience: came {config.patience} without validation pairs; expected some, as nothing else ends a fit "
            "early; give them, or no patience"
        )
    accelerator = accelerator_for(config, device)
    place = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = new_classifier(labels or labels_of(pairs), config)
        gold = classifier.label_ids([pair.sample for pair in pairs])
        targets = targets_of(gold, len(classifier.labels), config, weights, soft_targets)
        file = None
        if checkpoint is not None:
            file = CheckpointFile(checkpoint, fingerprint_of(config, classifier.module, pairs, validation, targets))
        classifier.module.to(place)
        frozen = not config.train_image_encoder
        data = PairTensors(classifier, pairs, frozen=frozen, reducible=config.text_dropout > 0)
        held_out = PairTensors(classifier, validation, frozen=frozen) if validation else None
        trainer = Trainer(classifier, accelerator, data, targets, held_out, config)
        resumed_at = trainer.run(file, description)
        classifier.module.cpu().eval()
    losses, scores = tuple(trainer.state.losses), tuple(trainer.state.scores)
    best_epoch = max(range(len(scores)), key=lambda epoch: (scores[epoch], epoch)) + 1 if scores else len(losses)
    logger.info("%s: loss %.3f, best epoch %d", description, losses[-1], best_epoch)
    return Fit(classifier, losses, scores, best_epoch, trainer.state.step, resumed_at)


def logits_of_pairs(
    classifier: LoadedClassifier,
    pairs: Sequence[Pair],
    *,
    views: Sequence[View | str] = (View.BOTH,),
) -> list[NDArray[np.float32]]:
    """Logits, float32 (B, labels), once for each view, in order; images are encoded once.

    Args:
        views: what is shown of the pairs.

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError("pairs to answer: none came; expected at least one; check what was read")
    wanted = [View(view) for view in views]
    data = PairTensors(classifier, pairs, frozen=True, reducible=View.IMAGE in wanted)
    rows = torch.arange(len(pairs))
    return [torch.cat(list(logits_of(data, rows, view))).numpy() for view in wanted]


def score_pairs(classifier: LoadedClassifier, pairs: Sequence[Pair]) -> RelationMetrics:
    """The field's metric on labelled pairs.

    Raises:
        DataError: there are no pairs, or a label is not known to the classifier.
    """
    if not pairs:
        raise DataError("evaluation data: no pairs came; expected at least one; check what was read")
    data = PairTensors(classifier, pairs, frozen=True)
    return metrics_of(data, predictions(data, torch.arange(len(pairs))))
