"""Fitting the relation classifier on pairs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.progress import track
from mi2rage_training.classifier_model import ClassifierConfig, LoadedClassifier, RelationModule
from mi2rage_training.encoders import image_encoder_from, text_encoder_from
from mi2rage_training.metrics import NONE_LABEL, RelationMetrics, relation_metrics
from mi2rage_training.pairs import Pair
from mi2rage_training.pytorch_models import EMBEDDED

logger = logging.getLogger(__name__)

__all__ = ["Fit", "FitConfig", "fit_classifier", "labels_of", "logits_of_pairs", "new_classifier", "score_pairs"]

_CACHE_LIMIT_BYTES = 2 << 30
_SMALL_MODEL = 10_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class FitConfig:
    """How a classifier is built and fitted.

    Attributes:
        text_encoder, image_encoder: `embedded`, a folder, or a hub id.
        width, heads, dropout: of the fusion.
        max_length: ids a sentence may hold, markers included.
        epochs: passes over the data; with validation pairs the best epoch's weights are kept.
        batch_size: rows a step.
        learning_rate: peak, of AdamW; None takes 1e-3 below ten million trained parameters, 3e-5 above.
        image_dropout: share of rows (0 to 1) whose image is hidden in a step, so that one network gives both
            q(y | text, image) and q(y | text).
        train_image_encoder: also fit the vision tower (else it is frozen, and each image is encoded once).
        seed: of initial weights, dropout and order.
    """

    text_encoder: str = EMBEDDED
    image_encoder: str = EMBEDDED
    width: int = 64
    heads: int = 4
    dropout: float = 0.3
    max_length: int = 64
    epochs: int = 12
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    image_dropout: float = 0.0
    train_image_encoder: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "heads", "max_length", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 1 or more")


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """A fitted classifier.

    Attributes:
        losses: mean training loss of each epoch, in nats.
        validation_f1: micro F1 (0 to 1) after each epoch, empty without validation pairs.
        best_epoch: the epoch (from 1) whose weights are kept.
    """

    classifier: LoadedClassifier
    losses: tuple[float, ...]
    validation_f1: tuple[float, ...]
    best_epoch: int


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


class _Images:
    """Patch states of the pairs' images: encoded once where the tower is frozen and they fit into memory."""

    def __init__(self, classifier: LoadedClassifier, pairs: Sequence[Pair], *, frozen: bool) -> None:
        self.classifier = classifier
        self.pairs = pairs
        self.mask = torch.tensor([pair.image is not None for pair in pairs], dtype=torch.float32)
        self.cache: Tensor | None = None
        self.blind = not self.mask.any()
        if frozen and not self.blind:
            with torch.inference_mode():
                first = self._encode([0])
                if first.nbytes * len(pairs) <= _CACHE_LIMIT_BYTES:
                    parts = [self._encode(range(i, min(i + 256, len(pairs)))) for i in range(0, len(pairs), 256)]
                    self.cache = torch.cat(parts)
            if self.cache is not None:
                self.cache = self.cache.clone()  # an inference tensor may not take part in autograd

    def _encode(self, rows: Sequence[int]) -> Tensor:
        pixels, _ = self.classifier.image_inputs([self.pairs[row].load() for row in rows])
        return self.classifier.module.patches(pixels)

    def patches(self, rows: Sequence[int]) -> Tensor:
        """Patch states (B, P, width) of some rows."""
        if self.blind:  # no image anywhere: there is nothing to encode
            width = self.classifier.module.keys.in_features
            return torch.zeros(len(rows), 1, width, device=self.classifier.module.missing_image.device)
        return self.cache[list(rows)] if self.cache is not None else self._encode(rows)


def _optimizer(
    module: RelationModule, config: FitConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    small = sum(parameter.numel() for parameter in trained) < _SMALL_MODEL
    rate = config.learning_rate or (1e-3 if small else 3e-5)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=config.weight_decay)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    return optimizer, schedule


def fit_classifier(
    pairs: Sequence[Pair],
    config: FitConfig,
    *,
    validation: Sequence[Pair] = (),
    labels: Sequence[str] | None = None,
    device: str = "cpu",
    description: str = "train",
) -> Fit:
    """Fit a classifier on pairs with cross-entropy; with validation pairs, keep the epoch of best micro F1.

    Args:
        pairs: labelled; images may be missing.
        validation: pairs that choose the epoch and nothing else.
        labels: the classifier's labels; by default those of `pairs`.
        device: where to fit; the classifier is returned on the CPU.

    Raises:
        DataError: there are no pairs, or labels do not fit.
    """
    if not pairs:
        raise DataError("training data: no pairs came; expected at least one")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        classifier = new_classifier(labels or labels_of(pairs), config)
        classifier.module.to(device)
        result = _epochs(classifier, pairs, validation, config, description)
        classifier.module.cpu().eval()
    return result


def _epochs(
    classifier: LoadedClassifier, pairs: Sequence[Pair], validation: Sequence[Pair], config: FitConfig, description: str
) -> Fit:
    targets = torch.from_numpy(classifier.label_ids([pair.sample for pair in pairs]))
    images = _Images(classifier, pairs, frozen=not config.train_image_encoder)
    held_out = _Images(classifier, validation, frozen=not config.train_image_encoder)
    batches = -(-len(pairs) // config.batch_size)
    optimizer, schedule = _optimizer(classifier.module, config, config.epochs * batches)
    losses: list[float] = []
    scores: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in track(range(config.epochs), description, total=config.epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(pairs)), config.batch_size):
            total += _step(classifier, images, rows, targets[rows], config, optimizer) * len(rows)
            schedule.step()
        losses.append(total / len(pairs))
        if validation:
            scores.append(_metrics(classifier, held_out).f1)
            if scores[-1] >= max(scores):
                best = {name: value.clone() for name, value in classifier.module.state_dict().items()}
    if best:
        classifier.module.load_state_dict(best)
    best_epoch = max(range(len(scores)), key=lambda epoch: (scores[epoch], epoch)) + 1 if scores else config.epochs
    logger.info("%s: loss %.3f, best epoch %d", description, losses[-1], best_epoch)
    return Fit(classifier, tuple(losses), tuple(scores), best_epoch)


def _step(
    classifier: LoadedClassifier,
    images: _Images,
    rows: Tensor,
    targets: Tensor,
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
) -> float:
    classifier.module.train()
    mask = images.mask[rows]
    if config.image_dropout:
        mask = mask * (torch.rand(len(rows)) >= config.image_dropout).float()
    indices: list[int] = rows.tolist()
    text = classifier.text_inputs([images.pairs[row].sample for row in indices])
    device = text["input_ids"].device
    logits = classifier.module.fuse(**text, patches=images.patches(indices), image_mask=mask.to(device))
    loss = nn.functional.cross_entropy(logits, targets.to(device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(classifier.module.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.inference_mode()
def _logits(classifier: LoadedClassifier, images: _Images, *, hide_images: bool = False) -> NDArray[np.float32]:
    classifier.module.eval()
    parts = []
    for start in range(0, len(images.pairs), 128):
        rows = range(start, min(start + 128, len(images.pairs)))
        text = classifier.text_inputs([images.pairs[row].sample for row in rows])
        device = text["input_ids"].device
        mask = images.mask[list(rows)].to(device) * (0.0 if hide_images else 1.0)
        parts.append(
            classifier.module.fuse(**text, patches=images.patches(rows), image_mask=mask).float().cpu().numpy()
        )
    return np.concatenate(parts)


def logits_of_pairs(
    classifier: LoadedClassifier, pairs: Sequence[Pair], *, hide_images: Sequence[bool] = (False,)
) -> list[NDArray[np.float32]]:
    """Logits, float32 (B, labels), once for each entry of `hide_images`; images are encoded once."""
    images = _Images(classifier, pairs, frozen=True)
    return [_logits(classifier, images, hide_images=hidden) for hidden in hide_images]


def _metrics(classifier: LoadedClassifier, images: _Images) -> RelationMetrics:
    gold = classifier.label_ids([pair.sample for pair in images.pairs])
    predicted = _logits(classifier, images).argmax(1)
    return relation_metrics([classifier.labels[i] for i in gold], [classifier.labels[i] for i in predicted])


def score_pairs(classifier: LoadedClassifier, pairs: Sequence[Pair]) -> RelationMetrics:
    """The field's metric on labelled pairs.

    Raises:
        DataError: there are no pairs, or a label is not known to the classifier.
    """
    if not pairs:
        raise DataError("evaluation data: no pairs came; expected at least one")
    return _metrics(classifier, _Images(classifier, pairs, frozen=True))
