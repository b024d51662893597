"""Settings of a fit."""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum

from mi2rage_engines.errors import InputError
from mi2rage_training.pytorch_models import EMBEDDED

__all__ = ["FitConfig", "MixedPrecision"]

_COUNTS = ("width", "heads", "max_length", "epochs", "batch_size", "gradient_accumulation")
_OPTIONAL_COUNTS = ("steps", "evaluation_steps", "patience", "checkpoint_steps")
_SHARES = ("image_dropout", "text_dropout", "distill")
_EXPONENTS = ("class_balance", "logit_adjustment")


class MixedPrecision(StrEnum):
    """What autocast computes in; weights and optimiser stay float32."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclasses.dataclass(frozen=True, slots=True)
class FitConfig:
    """How a classifier is built and fitted.

    Attributes:
        text_encoder, image_encoder: `embedded`, a folder, or a hub id.
        width, heads, dropout: of the fusion.
        max_length: ids a sentence may hold, markers included.
        epochs: passes over the data; with validation pairs the best epoch's weights are kept.
        batch_size: rows an optimiser step, whatever the number of processes and accumulated parts.
        learning_rate: peak, of AdamW; None takes 1e-3 below ten million trained parameters, 3e-5 above.
        image_dropout: share of rows (0 to 1) whose image is hidden in a step, so that one network gives both
            q(y | text, image) and q(y | text).
        train_image_encoder: also fit the vision tower (else it is frozen, and each image is encoded once).
        seed: of initial weights, dropout and order.
        text_dropout: share of rows whose sentence is reduced to its two mentions in a step, for q(y | image, mentions);
            no row loses both, and none that has no image loses its sentence.
        steps: optimiser steps in place of `epochs`; validation still comes after each pass, and at the end.
        evaluation_steps: steps between validations, in place of one after each pass: data sets of different sizes then
            choose among equally many states. An "epoch" of `Fit` is what lies between two.
        patience: stop once so many epochs in a row have not raised the best validation F1; None goes to the end.
        class_balance: loss weights proportional to (rows of the label)^-class_balance, their mean over the rows 1. 0 is
            off; 1 gives all labels the same say (inverse frequency: Huang et al., *Learning Deep Representation for
            Imbalanced Classification*, CVPR 2016); 0.5 is the square root in between (Mahajan et al., *Exploring the
            Limits of Weakly Supervised Pretraining*, ECCV 2018).
        logit_adjustment: tau of Menon et al., *Long-tail Learning via Logit Adjustment*, ICLR 2021, eq. 10: the loss
            sees logits + tau * log(label frequency), the classifier answers with the logits alone. 0 is off, 1 aims at
            the balanced error.
        distill: share (0 to 1) of the soft targets in the loss, (1 - distill) * CE(label) + distill * CE(soft target)
            (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, at temperature 1).
        mixed_precision: `no`, `fp16` (needs a GPU) or `bf16`.
        gradient_accumulation: parts that a step's rows are computed in, to save memory; the loss is the same.
        checkpoint_steps: steps between checkpoints, besides the one after each epoch.
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
    text_dropout: float = 0.0
    steps: int | None = None
    evaluation_steps: int | None = None
    patience: int | None = None
    class_balance: float = 0.0
    logit_adjustment: float = 0.0
    distill: float = 0.0
    mixed_precision: MixedPrecision = MixedPrecision.NO
    gradient_accumulation: int = 1
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in _OPTIONAL_COUNTS if getattr(self, name) is not None]
        for name in (*_COUNTS, *given):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 1 or more; give a larger number")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: came {getattr(self, name)}; expected a share of 0 to 1; give one")
        for name in _EXPONENTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: came {getattr(self, name)}; expected 0 (off) or more; 1 is the usual choice")
        if self.width % self.heads:
            raise InputError(f"width: came {self.width}; expected a multiple of the {self.heads} heads; give one")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate: came {self.learning_rate}; expected a number above 0; give one, or none")
        if self.image_dropout + self.text_dropout > 1:
            raise InputError(
                f"image_dropout and text_dropout: came {self.image_dropout} and {self.text_dropout}; expected a sum of "
                "at most 1, as no row loses both; give smaller shares"
            )
        if self.mixed_precision not in list(MixedPrecision):
            allowed = ", ".join(MixedPrecision)
            raise InputError(f"mixed_precision: came {self.mixed_precision!r}; expected one of: {allowed}; give one")
