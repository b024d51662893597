"""Selection policies: pure functions from what is known of the candidates to which of them are kept.

A policy ranks the candidates; then they are taken greedily, best first, under a limit for each parent (the real sample
that a candidate was made from), a limit for each label, and a share of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_training.coverage import Cover, facility_location, k_centre, rank_normalised, unit_rows
from mi2rage_training.ranking import Policy, Table, posterior_weights, scores_from, sibling_ranks

__all__ = ["Decision", "Policy", "PolicyConfig", "Quota", "Table", "choose", "decide", "posterior_weights"]

_COVERING = (Policy.DIVERSITY, Policy.K_CENTRE)
_UNRANKED = (Policy.ALL, Policy.DIRECT, *_COVERING)


class Quota(StrEnum):
    """How the share to keep is divided: by label in proportion, the same number each, or without regard to labels."""

    PROPORTIONAL = "proportional"
    BALANCED = "balanced"
    NONE = "none"


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What is kept.

    Attributes:
        policy: the ranking.
        per_parent: the most children kept of one parent; None is no limit.
        per_label: the most candidates kept of one label; None is no limit.
        keep: share (0 to 1] kept of what the limit for each parent leaves.
        quota: how that share is divided among the labels.
        diversity: weight d (0 to 1) of coverage: within a label, rows are taken by (1 - d) score + d facility-location
            gain, the score as its rank (0 to 1).
        seed: of what is drawn.
    """

    policy: Policy = Policy.ADDED
    per_parent: int | None = None
    per_label: int | None = None
    keep: float = 1.0
    quota: Quota = Quota.PROPORTIONAL
    diversity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_parent", "per_label"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InputError(f"{name.replace('_', '-')} limit: came {limit}; expected 1 or more, or none")
        if not 0 < self.keep <= 1:
            raise InputError(f"share to keep: came {self.keep}; expected more than 0 and at most 1")
        if not 0 <= self.diversity <= 1:
            raise InputError(f"diversity: came {self.diversity}; expected 0 (off) to 1 (coverage alone)")
        if self.diversity and self.policy in _COVERING:
            raise InputError(
                f"diversity: came {self.diversity} with the policy {self.policy.value}; expected 0, since that has no "
                "score to weigh it against; leave it out"
            )
        if self.quota is Quota.BALANCED and self.per_label is None and self.keep == 1:
            raise InputError(
                "quota balanced: came without a limit; expected one to divide among the labels; give a share to keep "
                "below 1, or a limit per label"
            )

    @property
    def covers(self) -> bool:
        """Whether the table needs embeddings."""
        return self.diversity > 0 or self.policy in _COVERING


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """Which candidates are kept, bool (N,), and a few words on each."""

    kept: NDArray[np.bool_]
    reasons: tuple[str, ...]


class _Rows:
    """The rows that may be taken, and the codes of their labels and parents."""

    def __init__(self, table: Table, policy: Policy) -> None:
        self.names, self.labels = np.unique(table.labels, return_inverse=True)
        self.parents = np.unique(table.parents, return_inverse=True)[1]
        eligible = table.links == 1 if policy is Policy.DIRECT else np.ones(len(table), bool)
        self.eligible = np.flatnonzero(eligible)
        pairs = np.unique(np.stack([self.parents, self.labels]), axis=1)
        again = np.flatnonzero(np.diff(pairs[0]) == 0)
        if len(again):
            parent = table.parents[self.parents == pairs[0, again[0]]][0]
            raise DataError(
                f"parent {parent}: its children have several labels; expected its own; make the store again"
            )
        self.label_of_parent = pairs[1]

    def available(self, cap: int) -> NDArray[np.int64]:
        """How many rows of each label the limit `cap` for each parent leaves, int64 (labels,)."""
        siblings = np.bincount(self.parents[self.eligible], minlength=len(self.label_of_parent))
        result = np.zeros(len(self.names), np.int64)
        np.add.at(result, self.label_of_parent, np.minimum(siblings, cap))
        return result


@dataclasses.dataclass(frozen=True, slots=True)
class _Limits:
    """Rows at most of one parent, of each label, and of all together."""

    per_parent: int
    per_label: NDArray[np.int64]
    total: int


def _limits(rows: _Rows, config: PolicyConfig, count_like: NDArray[np.bool_] | None) -> _Limits:
    no_limit = max(1, len(rows.labels))
    if count_like is not None:
        cap = max(1, int(np.bincount(rows.parents[count_like], minlength=1).max()))
        counts = np.bincount(rows.labels[count_like], minlength=len(rows.names))
        per_label = np.minimum(rows.available(cap), counts)
        return _Limits(cap, per_label, int(per_label.sum()))
    cap = config.per_parent or no_limit
    available = rows.available(cap)
    per_label = np.minimum(available, config.per_label or no_limit)
    total = _share(config.keep, int(available.sum()))
    if config.quota is Quota.PROPORTIONAL:
        per_label = np.minimum(per_label, [_share(config.keep, int(count)) for count in available])
    elif config.quota is Quota.BALANCED:
        per_label = _divided(total, per_label)
    if config.quota is not Quota.NONE:
        total = int(per_label.sum())
    return _Limits(cap, per_label, total)


def _share(keep: float, count: int) -> int:
    return math.ceil(keep * count - 1e-9)  # 0.07 * 100 is a little above 7


def _divided(total: int, limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """`total` divided evenly, at least 1 each; what a label cannot take goes to the others."""
    shares = np.zeros(len(limits), np.int64)
    for done, label in enumerate(np.argsort(limits, kind="stable")):
        shares[label] = min(limits[label], max(1, (total - shares.sum()) // (len(limits) - done)))
    return shares


def _ordered(
    table: Table, rows: _Rows, scores: NDArray[np.float64], limits: _Limits, config: PolicyConfig
) -> list[Cover]:
    """Of each label the rows in the order they are taken, with what each was worth then (never rising)."""
    units = unit_rows(table.embeddings) if config.covers and table.embeddings is not None else None
    covers = []
    for label, limit in enumerate(limits.per_label.tolist()):
        mine = rows.eligible[rows.labels[rows.eligible] == label]
        if units is None:
            order = np.argsort(-scores[mine], kind="stable")
            order = order[sibling_ranks(rows.parents[mine], scores[mine])[order] < limits.per_parent][:limit]
            covers.append(Cover(mine[order], scores[mine[order]]))
            continue
        groups = np.unique(rows.parents[mine], return_inverse=True)[1]
        if config.policy is Policy.K_CENTRE:
            found = k_centre(units[mine], groups, limit=limit, cap=limits.per_parent)
        else:
            pool = scores[rows.eligible] if config.quota is Quota.NONE else scores[mine]
            merits = rank_normalised(scores[mine], pool)
            weight = config.diversity or 1.0
            found = facility_location(
                units[mine], groups, limit=limit, cap=limits.per_parent, merits=merits, diversity=weight
            )
        covers.append(Cover(mine[found.rows], found.gains))
    return covers


def _taken(covers: list[Cover], total: int, count: int) -> NDArray[np.bool_]:
    """The best of all labels, `total` rows or one a label if that is more."""
    found = np.concatenate([np.zeros(0, np.int64), *(cover.rows for cover in covers)])
    worth = np.concatenate([np.zeros(0), *(cover.gains for cover in covers)])
    later = np.concatenate([np.zeros(0, bool), *(np.arange(len(cover.rows)) > 0 for cover in covers)])
    order = np.lexsort((found, -worth, later))
    kept = np.zeros(count, bool)
    kept[found[order[: max(total, int((~later).sum()))]]] = True
    return kept


def _reasons(
    table: Table, rows: _Rows, scores: NDArray[np.float64], kept: NDArray[np.bool_], cap: int, config: PolicyConfig
) -> tuple[str, ...]:
    eligible = np.zeros(len(table), bool)
    eligible[rows.eligible] = True
    ranks = sibling_ranks(table.parents, np.where(eligible, scores, -np.inf)) + 1
    siblings = np.bincount(rows.parents[rows.eligible], minlength=len(rows.label_of_parent))
    of_parent = np.bincount(rows.parents[kept], minlength=len(siblings))
    of_label = np.bincount(rows.labels[kept], minlength=len(rows.names))
    candidates = np.bincount(rows.labels[rows.eligible], minlength=len(rows.names))
    total, words, known = int(kept.sum()), [], dict[str, str]()
    for row, (label, parent) in enumerate(zip(rows.labels, rows.parents, strict=True)):
        place = "" if config.policy in _UNRANKED else f"rank {ranks[row]} of {siblings[parent]}"
        if not eligible[row]:
            word = "dropped: not the first link"
        elif kept[row]:
            word = f"kept: {place} siblings" if place else f"kept: {config.policy.value}"
        elif of_parent[parent] >= cap:
            word = "dropped: per-parent limit" + (f" ({place})" if place else "")
        elif config.quota is Quota.NONE:
            word = f"dropped: overall share ({total} of {len(rows.eligible)} kept)"
        else:
            word = f"dropped: label quota ({of_label[label]} of {candidates[label]} kept)"
        words.append(known.setdefault(word, word))  # few are different, and there may be millions
    return tuple(words)


def decide(table: Table, config: PolicyConfig, count_like: NDArray[np.bool_] | None = None) -> Decision:
    """Which candidates are kept, and why; ties go to the earlier row, and every label with a candidate keeps one.

    Args:
        count_like: a selection whose numbers are taken in place of the configured limits: as many of each label, and
            of one parent at most as many as it has of any. So a control has the size of what it is compared with.

    Raises:
        DataError: the table lacks what the policy needs, or children of one parent have several labels.
    """
    if config.covers and table.embeddings is None:
        raise DataError(
            f"policy {config.policy.value}: came without embeddings; expected a row a candidate; embed them"
        )
    rows = _Rows(table, config.policy)
    scores = scores_from(table, config.policy, config.seed)
    limits = _limits(rows, config, count_like)
    kept = _taken(_ordered(table, rows, scores, limits, config), limits.total, len(table))
    return Decision(kept, _reasons(table, rows, scores, kept, limits.per_parent, config))


def choose(table: Table, config: PolicyConfig, count_like: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """`decide` without the words, bool (N,)."""
    return decide(table, config, count_like).kept
