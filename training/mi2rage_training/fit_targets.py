"""What the loss of each pair is measured against, and how much it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mi2rage_engines.errors import DataError, InputError
from mi2rage_training.fit_config import FitConfig

__all__ = ["Targets", "class_weights", "targets_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Targets:
    """Float32 tensors of N pairs and L labels, on the CPU.

    Attributes:
        shares: (N, L), the distribution that the answer is compared with; rows sum to 1.
        weights: (N,), factors of the pairs' losses.
        shift: (L,), added to the logits within the loss only.
    """

    shares: Tensor
    weights: Tensor
    shift: Tensor


def class_weights(gold: NDArray[np.int64], balance: float) -> NDArray[np.float64]:
    """Factors, float64 (N,), proportional to (rows of the row's label)^-balance, with mean 1."""
    counts = np.bincount(gold).astype(np.float64)
    weights = counts[gold] ** -balance
    normalised: NDArray[np.float64] = weights / weights.mean()
    return normalised


def _checked_weights(weights: Sequence[float], count: int) -> NDArray[np.float64]:
    values = np.asarray(weights, np.float64)
    if values.shape != (count,):
        raise DataError(f"weights: came {values.size} for {count} pairs; expected one a pair; give as many as pairs")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        raise DataError(f"weights: number {bad[0]} is {values[bad[0]]}; expected finite ones of 0 or more; correct it")
    if not values.any():
        raise DataError("weights: all are 0; expected some above 0; there is nothing to learn from otherwise")
    return values


def _checked_soft(soft: NDArray[np.floating], count: int, labels: int) -> NDArray[np.float64]:
    values = np.asarray(soft, np.float64)
    if values.shape != (count, labels):
        raise DataError(
            f"soft_targets: came {values.shape}; expected {(count, labels)}: a row a pair, a column a label"
        )
    fit = np.isfinite(values).all(1) & (values >= 0).all(1) & (np.abs(values.sum(1) - 1) < 1e-3)
    if not fit.all():
        row = int(np.flatnonzero(~fit)[0])
        raise DataError(f"soft_targets: row {row} is no distribution; expected shares of 0 or more that sum to 1")
    return values


def targets_of(
    gold: NDArray[np.int64],
    labels: int,
    config: FitConfig,
    weights: Sequence[float] | None,
    soft_targets: NDArray[np.floating] | None,
) -> Targets:
    """Targets of the pairs whose label indices are `gold`.

    Raises:
        DataError: `weights` or `soft_targets` do not fit the pairs.
        InputError: there are soft targets and no share for them in the loss, or the other way round.
    """
    if (soft_targets is not None) != (config.distill > 0):
        came = "no soft_targets" if soft_targets is None else "soft_targets"
        raise InputError(f"distill: came {config.distill} with {came}; expected both or neither; give or drop one")
    count = len(gold)
    shares = np.eye(labels)[gold]
    if soft_targets is not None:
        shares = (1 - config.distill) * shares + config.distill * _checked_soft(soft_targets, count, labels)
    factors = class_weights(gold, config.class_balance)
    if weights is not None:
        factors = factors * _checked_weights(weights, count)
    # A label that does not occur counts once: its logarithm must be finite.
    frequency = np.maximum(np.bincount(gold, minlength=labels), 1) / count
    shift = config.logit_adjustment * np.log(frequency)
    return Targets(*(torch.from_numpy(values.astype(np.float32)) for values in (shares, factors, shift)))
