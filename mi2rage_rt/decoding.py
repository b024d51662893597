"""The choice of the next token, one function for the runtime and for PyTorch's captioner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt import noise

__all__ = ["choose_tokens", "nucleus_mask"]


def nucleus_mask(logits: NDArray[np.float32], top_p: float) -> NDArray[np.bool_]:
    """Which tokens belong to the nucleus (Holtzman et al. 2020, section 3.1).

    The nucleus is the smallest set of the most probable tokens whose probabilities sum to at least `top_p`;
    of equally probable ones the lower id comes first.

    Args:
        logits: float32 `(B, V)`.
        top_p: in (0, 1].

    Returns:
        bool `(B, V)`, at least one True a row.
    """
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
    weights = np.exp(ranked - ranked[:, :1])
    shares = weights / weights.sum(axis=-1, keepdims=True)
    before = np.cumsum(shares, axis=-1) - shares
    mask = np.zeros(logits.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, before < top_p, axis=-1)
    mask[np.arange(len(mask)), order[:, 0]] = True
    return mask


def choose_tokens(
    logits: NDArray[np.float32],
    seeds: Sequence[int] | None,
    step: int,
    *,
    top_p: float = 0.9,
    temperature: float = 1.0,
) -> NDArray[np.int64]:
    """The next token of each row: the most probable, or with seeds one sampled from the nucleus.

    Sampling adds Gumbel noise to the scaled logits and takes the largest (Gumbel 1954), so a row's draw depends
    on its seed and the step alone, not on its place in a batch.

    Args:
        logits: `(B, V)`, of the last position.
        seeds: one a row, or None for greedy decoding.
        step: 0 for the first token written; selects the noise.
        top_p: the nucleus's share, in (0, 1].
        temperature: what the logits are divided by, above 0.

    Returns:
        int64 `(B,)`.
    """
    if seeds is None:
        return np.asarray(np.argmax(logits, axis=-1), dtype=np.int64)
    scaled = np.asarray(logits, dtype=np.float32) / np.float32(temperature)
    draws = np.stack([noise.gumbel(seed, scaled.shape[-1], stream=step) for seed in seeds])
    scores = np.where(nucleus_mask(scaled, top_p), scaled + draws, -np.inf)
    return np.asarray(np.argmax(scores, axis=-1), dtype=np.int64)
