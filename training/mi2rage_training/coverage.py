"""Greedy coverage of a set of embeddings under a limit for each group: facility location and k-centre.

Memory stays at N x 128 similarities, whatever N is; nothing of size N x N is held.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cover", "facility_location", "k_centre", "rank_normalised", "unit_rows"]

_BLOCK = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Cover:
    """Rows in the order they were taken, int64 (K,), and what each gained then, float64 (K,), never rising."""

    rows: NDArray[np.int64]
    gains: NDArray[np.float64]


class _Room:
    """Which rows may still be taken: each group has room for `cap` of its rows."""

    def __init__(self, groups: NDArray[np.int64], cap: int) -> None:
        self.groups = groups
        self.left = np.full(int(groups.max(initial=-1)) + 1, cap)
        self.open = np.ones(len(groups), bool)

    def take(self, row: int) -> None:
        group = self.groups[row]
        self.left[group] -= 1
        self.open[row] = False
        if not self.left[group]:
            self.open[self.groups == group] = False


def unit_rows(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1, float32 (N, D); a row of zeros stays so."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    result: NDArray[np.float32] = (embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return result


def rank_normalised(values: NDArray[np.float64], pool: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share (0 to 1) of the other values in `pool` that lie below each value; equal values get the same."""
    below = np.searchsorted(np.sort(pool), values, side="left")
    result: NDArray[np.float64] = below / max(1, len(pool) - 1)
    return result


def _similarities(units: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cosine similarities of all rows with some, negative ones as 0, float32 (N, columns)."""
    result: NDArray[np.float32] = np.maximum(units @ units[columns].T, 0.0)
    return result


def _coverage_gains(
    units: NDArray[np.float32], covered: NDArray[np.float32], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How much each of `columns` would add to sum_i max_{j taken} s_ij."""
    parts = [np.zeros(0)]
    for start in range(0, len(columns), _BLOCK):
        similar = _similarities(units, columns[start : start + _BLOCK])
        parts.append(np.maximum(similar - covered[:, None], 0.0).sum(0, dtype=np.float64))
    return np.concatenate(parts)


def facility_location(
    units: NDArray[np.float32],
    groups: NDArray[np.int64],
    *,
    limit: int,
    cap: int,
    merits: NDArray[np.float64],
    diversity: float,
) -> Cover:
    """Take up to `limit` rows greedily by (1 - d) merit + d coverage, at most `cap` of a group.

    Coverage is the facility location function F(S) = sum_i max_{j in S} s_ij over cosine similarities (negative ones
    count as 0), in units of the best single row's. Both terms are monotone and submodular, so the greedy set reaches
    1 - 1/e of the optimum under `limit` alone (Nemhauser, Wolsey and Fisher, 1978) and 1/2 with the groups
    (Fisher, Nemhauser and Wolsey, 1978). Ties go to the earlier row. Stale gains are upper bounds (Minoux, 1978): only
    those that could win are computed again, in batches that follow how many that were the last time.

    Args:
        units: rows of length 1, float32 (N, D).
        groups: codes from 0, int64 (N,).
        merits: 0 to 1, float64 (N,).
        diversity: d, more than 0 and at most 1.
    """
    count = len(units)
    room = _Room(groups, cap)
    covered = np.zeros(count, np.float32)
    single = _coverage_gains(units, covered, np.arange(count))
    scale = diversity / max(single.max(initial=0.0), np.finfo(np.float32).tiny)
    merits = (1 - diversity) * merits
    bounds = merits + scale * single
    fresh = np.zeros(count, np.int64)
    rows: list[int] = []
    gains: list[float] = []
    batch = 1
    while len(rows) < limit and room.open.any():
        best = int(bounds.argmax())
        if fresh[best] != len(rows):
            top = np.argpartition(-bounds, min(batch, count) - 1)[:batch]
            stale = np.unique(np.append(top[(fresh[top] != len(rows)) & room.open[top]], best))
            bounds[stale] = merits[stale] + scale * _coverage_gains(units, covered, stale)
            fresh[stale] = len(rows)
            batch = min(2 * batch, _BLOCK)
            continue
        rows.append(best)
        gains.append(float(bounds[best]))
        covered = np.maximum(covered, _similarities(units, np.array([best]))[:, 0])
        room.take(best)
        bounds[~room.open] = -np.inf
        batch = max(1, batch // 4)
    return Cover(np.array(rows, np.int64), np.array(gains))


def k_centre(units: NDArray[np.float32], groups: NDArray[np.int64], *, limit: int, cap: int) -> Cover:
    """Take up to `limit` rows, each the farthest from those taken (Sener and Savarese, 2018, algorithm 1).

    The first is the one nearest to the mean; a row's gain is its distance 1 - cosine from the nearest taken row.
    Arguments as for `facility_location`.
    """
    room = _Room(groups, cap)
    rows: list[int] = []
    gains: list[float] = []
    distances = np.full(len(units), 2.0)
    towards_mean = units @ units.sum(0, dtype=np.float64)
    while len(rows) < limit and room.open.any():
        ranking = distances if rows else towards_mean
        best = int(np.where(room.open, ranking, -np.inf).argmax())
        rows.append(best)
        gains.append(float(distances[best]))
        distances = np.minimum(distances, 1.0 - units @ units[best])
        room.take(best)
    return Cover(np.array(rows, np.int64), np.array(gains))
