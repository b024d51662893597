"""The choice of the next token, one function for the runtime and for PyTorch's captioner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt import noise

__all__ = ["choose_tokens", "nucleus_ids", "nucleus_mask"]

_ROUNDING = 1e-10
"""Far above what sums of some 100,000 shares in float64 differ by when they are taken in another order."""

_FLOORS = (1e-3, 1e-5)
"""Shares below which tokens are left out at first. What needs more tokens than these leave is nearly uniform."""

_WHOLE_DRAW = 8
"""A nucleus of more than one token in so many takes its noise in one call: one by one would cost more."""


def nucleus_mask(logits: NDArray[np.float32], top_p: float) -> NDArray[np.bool_]:
    """Which tokens belong to the nucleus (Holtzman et al. 2020, section 3.1).

    The nucleus is the smallest set of the most probable tokens whose probabilities sum to at least `top_p`;
    of equally probable ones the lower id comes first. This is its definition, which sorts the whole vocabulary; see
    `nucleus_ids`.

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


def nucleus_ids(logits: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """The ids that `nucleus_mask` marks in one row, ascending, without sorting what cannot be among them.

    Where a sum comes so close to `top_p` that rounding would decide, the definition is asked.

    Args:
        logits: float32 `(V,)`.
        top_p: in (0, 1].
    """
    wide = logits.astype(np.float64)
    peak = wide.max()
    weights = np.exp(wide - peak)
    total = weights.sum()
    for share in _FLOORS if np.isfinite(total) else ():
        likely = np.flatnonzero(wide >= peak + math.log(share * total))
        # Tokens above a floor that sum to more than top_p hold the whole nucleus.
        if weights[likely].sum() <= (top_p + _ROUNDING) * total:
            continue
        ranked = likely[np.argsort(-logits[likely], kind="stable")]
        shares = weights[ranked] / total
        before = np.cumsum(shares) - shares
        if np.abs(before - top_p).min() > _ROUNDING:
            return np.sort(ranked[: np.count_nonzero(before < top_p)])
        break
    return np.flatnonzero(nucleus_mask(logits[None], top_p)[0])


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
    chosen = np.empty(len(scaled), dtype=np.int64)
    for row, seed in enumerate(seeds):
        ids = nucleus_ids(scaled[row], top_p)
        chosen[row] = ids[np.argmax(scaled[row, ids] + _gumbel_at(seed, scaled.shape[-1], step, ids))]
    return chosen


def _gumbel_at(seed: int, size: int, stream: int, ids: NDArray[np.intp]) -> NDArray[np.float32]:
    """`noise.gumbel(seed, size, stream)[ids]`, the same bytes, its logarithms taken at `ids` alone."""
    if len(ids) * _WHOLE_DRAW > size:
        return noise.gumbel(seed, size, stream)[ids]
    uniform = noise.rng(seed, stream).random(size)
    if not uniform.all():  # NumPy draws again where a uniform number is 0, and all behind it moves up
        return noise.gumbel(seed, size, stream)[ids]
    # Python's logarithm and NumPy's generators are the C library's; NumPy's own on arrays may round otherwise.
    return np.array([-math.log(-math.log(1.0 - value)) for value in uniform[ids].tolist()], dtype=np.float32)
