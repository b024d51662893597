"""Calibration of a classifier's probabilities: one temperature, and the error that is left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["calibration_error", "fit_temperature", "log_softmax"]

_BINS = 15
_SHARPEST, _FLATTEST = 20.0, 0.01


def log_softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """log softmax(logits / temperature) over the last axis, float64."""
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def fit_temperature(
    logits: NDArray[np.floating], gold: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> float:
    """The temperature T > 0 that minimises the mean of -log softmax(logits / T)[gold] (Guo et al., *On Calibration of
    Modern Neural Networks*, ICML 2017).

    The loss is convex in 1/T; its derivative there, E[z_y] under the model less the gold z, is bisected. Rows that are
    all right, or no better than chance, end at the bounds 1/20 and 100.

    Args:
        logits: (N, labels), of rows that the classifier was not fitted on.
        gold: int64 (N,).
        weights: (N,), 0 or more; by default all 1.
    """
    scores = logits.astype(np.float64)
    shares = np.full(len(gold), 1 / len(gold)) if weights is None else weights / weights.sum()
    own = scores[np.arange(len(gold)), gold]

    def slope(inverse: float) -> float:
        expected = (np.exp(log_softmax(scores, 1 / inverse)) * scores).sum(-1)
        return float(shares @ (expected - own))

    low, high = _FLATTEST, _SHARPEST
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return 1 / float(np.sqrt(low * high))


def calibration_error(
    log_probabilities: NDArray[np.float64], gold: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> float:
    """Expected calibration error, 0 to 1: mean gap between confidence and accuracy over 15 equal bins of confidence
    (Naeini, Cooper and Hauskrecht, *Obtaining Well Calibrated Probabilities Using Bayesian Binning*, AAAI 2015).

    Args:
        log_probabilities: (N, labels).
        gold: int64 (N,).
        weights: (N,), 0 or more; by default all 1.
    """
    shares = np.full(len(gold), 1 / len(gold)) if weights is None else weights / weights.sum()
    confidence = np.exp(log_probabilities.max(-1))
    right = (log_probabilities.argmax(-1) == gold).astype(np.float64)
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, shares * (confidence - right), minlength=_BINS)
    return float(np.abs(gaps).sum())
