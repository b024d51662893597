"""Cross-validated predictions of the label: from one value by look-up, from a bag of words by a linear model.

Folds are cut between groups of rows that share an image, a sentence or a parent. So what is learnt of a value counts
only where it holds for rows of another image and sentence, and remembering rare values, names or ids gains nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import require
from mi2rage_training.data_check.features import Bag, Column
from mi2rage_training.data_check.rows import Row, normal_tokens

__all__ = [
    "FOLDS",
    "bag_log_probabilities",
    "folds_of",
    "groups_of",
    "prior_log_probabilities",
    "value_log_probabilities",
]

FOLDS = 5

PRIOR_ROWS = 5.0
"""A value must be seen about this often before it outweighs the label's overall shares."""

PROBABILITY_FLOOR = 1e-4
"""One sure and wrong prediction costs at most 9.2 nats, for the text and for every field alike."""

_HASH_BITS = 16


def groups_of(rows: Sequence[Row], image_hashes: dict[str, str] | None = None) -> NDArray[np.int64]:
    """Group numbers, int64 (N,), from 0: rows that share an image, a sentence or a parent, directly or by others.

    Args:
        rows: the rows, of all splits.
        image_hashes: content hash by image name, where there are files.
    """
    root = list(range(len(rows)))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = root[item]
        return item

    seen: dict[Hashable, int] = {}
    for position, row in enumerate(rows):
        keys: list[Hashable] = [("text", normal_tokens(row.tokens))]
        if row.image is not None:
            keys += [("image", row.image), ("file", (image_hashes or {}).get(row.image, row.image))]
        if row.parent is not None:
            keys.append(("parent", row.parent))
        for key in keys:
            root[find(position)] = find(seen.setdefault(key, position))
    _, groups = np.unique([find(position) for position in range(len(rows))], return_inverse=True)
    return groups.astype(np.int64)


def folds_of(groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each row, int64 (N,), 0 to `FOLDS` - 1; a group lies in one fold."""
    order = np.random.default_rng(seed).permutation(int(groups.max()) + 1)
    folds: NDArray[np.int64] = order[groups] % FOLDS
    return folds


def _priors(labels: NDArray[np.int64], folds: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Smoothed label shares outside each fold, float64 (FOLDS, C)."""
    shares = np.empty((FOLDS, count))
    for fold in range(FOLDS):
        seen = np.bincount(labels[folds != fold], minlength=count) + 0.5
        shares[fold] = seen / seen.sum()
    return shares


def _logs(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    floored = np.maximum(probabilities, PROBABILITY_FLOOR)
    logs: NDArray[np.float64] = np.log(floored / floored.sum(1, keepdims=True))
    return logs


def prior_log_probabilities(labels: NDArray[np.int64], folds: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """The majority baseline: every row gets the label shares of the other folds, float64 (N, C)."""
    return _logs(_priors(labels, folds, count)[folds])


def value_log_probabilities(
    column: Column, labels: NDArray[np.int64], folds: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Held-out log q(label | value), float64 (N, C): the label shares of the value in the other folds, smoothed.

    q(y | v) = (n_vy + a * prior_y) / (n_v + a) with a = `PRIOR_ROWS`.
    """
    names, values = np.unique(np.array(column.values, dtype=object).astype(str), return_inverse=True)
    cells = values * count + labels
    total = np.bincount(cells, minlength=len(names) * count).reshape(len(names), count)
    priors = _priors(labels, folds, count)
    probabilities = np.empty((len(labels), count))
    for fold in range(FOLDS):
        held_out = np.flatnonzero(folds == fold)
        inside = np.bincount(cells[held_out], minlength=len(names) * count).reshape(len(names), count)
        seen = (total - inside)[values[held_out]]
        probabilities[held_out] = (seen + PRIOR_ROWS * priors[fold]) / (seen.sum(1, keepdims=True) + PRIOR_ROWS)
    return _logs(probabilities)


def bag_log_probabilities(
    bag: Bag, labels: NDArray[np.int64], folds: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.float64]:
    """Held-out log q(label | words), float64 (N, C): tf-idf of hashed words, logistic regression one against the rest.

    About 5 s for 12,247 sentences of MNRE on one core; labels that a fold lacks get the floor.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    text = require("sklearn.feature_extraction.text", "train")
    linear = require("sklearn.linear_model", "train")
    hashed = text.HashingVectorizer(
        analyzer=list, n_features=2**_HASH_BITS, alternate_sign=False, norm=None, binary=True
    ).transform(bag.words)
    features = text.TfidfTransformer(sublinear_tf=True).fit_transform(hashed)
    probabilities = np.zeros((len(labels), count))
    for fold in range(FOLDS):
        seen, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(held_out) == 0 or len(np.unique(labels[seen])) < 2:
            continue
        model = linear.SGDClassifier(
            loss="log_loss",
            alpha=0.1 / len(seen),  # chosen on MNRE: one tenth of a row's weight
            max_iter=max(5, 20_000 // len(seen)),
            tol=None,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small data do not converge, and need not
            model.fit(features[seen], labels[seen])
        probabilities[np.ix_(held_out, model.classes_)] = model.predict_proba(features[held_out])
    probabilities[probabilities.sum(1) == 0] = 1.0
    return _logs(probabilities)
