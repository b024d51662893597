"""What is known of the candidates, and how a policy ranks them."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError
from mi2rage_rt.noise import gumbel, seed_from

__all__ = ["Policy", "Table", "posterior_weights", "posterior_weights_of", "scores_from", "sibling_ranks"]


class Policy(StrEnum):
    """What candidates are ranked by.

    - `all`, `direct`: no ranking, the earlier row first; `direct` takes link 1 only.
    - `random`: keyed by (seed, id).
    - `similarity`: of sentence and image. `information`: log q(y | text, image) + H(Y).
      `added`: log q(y | both) - log q(y | real modality).
    - `posterior`: siblings are drawn without replacement with probabilities proportional to q(y | text, image). Taking
      the best instead shifts the made modality towards the teacher's favourites; drawing by the likelihood turns draws
      from p(made | real) into draws from p(made | real, label), up to the number of siblings.
    - `diversity`: facility location alone. `k-centre`: the farthest from those taken.
    """

    ALL = "all"
    DIRECT = "direct"
    RANDOM = "random"
    SIMILARITY = "similarity"
    INFORMATION = "information"
    ADDED = "added"
    POSTERIOR = "posterior"
    DIVERSITY = "diversity"
    K_CENTRE = "k-centre"


_COLUMNS = {
    Policy.SIMILARITY: "similarity",
    Policy.INFORMATION: "information_nats",
    Policy.ADDED: "added_nats",
    Policy.POSTERIOR: "information_nats",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """What policies see, one row a candidate.

    Attributes:
        ids: of the candidates, unique, str (N,); what is drawn is keyed by them, so that it does not follow the order.
        parents: id of the real sample, str (N,); all its children have its label.
        labels: str (N,).
        links: from 1, int (N,).
        information_nats, added_nats, similarity: float64 (N,), or None where no policy asks for them.
        embeddings: of what was made, float32 (N, D), of any length, or None.
    """

    ids: NDArray[np.str_]
    parents: NDArray[np.str_]
    labels: NDArray[np.str_]
    links: NDArray[np.int64]
    information_nats: NDArray[np.float64] | None = None
    added_nats: NDArray[np.float64] | None = None
    similarity: NDArray[np.float64] | None = None
    embeddings: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            if column is not None and len(column) != len(self.ids):
                raise DataError(f"{field.name}: {len(column)} rows came; expected {len(self.ids)}, one a candidate")

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, policy: Policy) -> NDArray[np.float64]:
        """The scores that `policy` ranks by.

        Raises:
            DataError: they are missing, or not all are finite.
        """
        name = _COLUMNS[policy]
        values: NDArray[np.float64] | None = getattr(self, name)
        if values is None:
            raise DataError(f"policy {policy.value}: came without {name}; expected a value for each candidate; score")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DataError(
                f"{name} of candidate {self.ids[bad[0]]}: came {values[bad[0]]}; expected a finite number; score again"
            )
        return values


def scores_from(table: Table, policy: Policy, seed: int) -> NDArray[np.float64]:
    """What `policy` ranks the rows by, float64 (N,), higher is better; zeros where it has no ranking."""
    if policy is Policy.RANDOM:
        return np.array([seed_from("random", seed, str(key)) for key in table.ids], np.float64)
    if policy not in _COLUMNS:
        return np.zeros(len(table))
    values = table.column(policy)
    return _drawn(table, values, seed) if policy is Policy.POSTERIOR else values


def _drawn(table: Table, log_weights: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Scores whose order is a draw of siblings without replacement, all first draws before all second ones.

    The Gumbel-top-k trick (Kool, van Hoof and Welling, *Stochastic Beams and Where to Find Them*, ICML 2019): the k
    largest of log w_i + G_i are k draws without replacement with probabilities proportional to w_i. Between parents the
    order is a keyed shuffle: no sentence is preferred.
    """
    noise = np.array([gumbel(seed_from("posterior", seed, str(key)), 1)[0] for key in table.ids], np.float64)
    shuffle = np.array([seed_from("shuffle", seed, str(key)) / 2.0**63 for key in table.ids])
    draws: NDArray[np.float64] = -(sibling_ranks(table.parents, log_weights + noise) + 0.999 * shuffle)
    return draws


def sibling_ranks(parents: NDArray[np.str_], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The place of each row among its siblings, from 0, best first, ties to the earlier."""
    codes = np.unique(parents, return_inverse=True)[1]
    order = np.lexsort((np.arange(len(scores)), -scores, codes))
    sizes = np.bincount(codes, minlength=1)
    ranks = np.empty(len(scores), np.int64)
    ranks[order] = np.arange(len(scores)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def posterior_weights(table: Table, sharpness: float = 1.0) -> NDArray[np.float64]:
    """Weights of candidates in training, float64 (N,), in place of dropping some: see `posterior_weights_of`."""
    return posterior_weights_of(table.parents, table.column(Policy.POSTERIOR), sharpness)


def posterior_weights_of(
    parents: NDArray[np.str_], log_likelihoods: NDArray[np.float64], sharpness: float = 1.0
) -> NDArray[np.float64]:
    """The softmax of `sharpness` * log q(y | text, image) over the siblings, times their number, float64 (N,).

    1 on average for each parent: self-normalised importance weights from p(made | real) to p(made | real, label).
    """
    logits = sharpness * log_likelihoods
    codes, sizes = np.unique(parents, return_inverse=True, return_counts=True)[1:]
    peaks = np.full(len(sizes), -np.inf)
    np.maximum.at(peaks, codes, logits)
    weights = np.exp(logits - peaks[codes])
    result: NDArray[np.float64] = weights / np.bincount(codes, weights)[codes] * sizes[codes]
    return result
