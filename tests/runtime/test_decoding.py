from __future__ import annotations

import numpy as np
import pytest

from mi2rage_rt.decoding import choose_tokens, nucleus_mask


def log(*shares: float) -> np.ndarray:
    return np.log(np.array([shares], dtype=np.float32))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_nucleus_is_the_smallest_set(top_p: float, kept: list[int]) -> None:
    mask = nucleus_mask(log(0.15, 0.5, 0.05, 0.3), top_p)
    assert np.flatnonzero(mask[0]).tolist() == kept


def test_equal_tokens_are_taken_by_id() -> None:
    assert nucleus_mask(log(0.25, 0.25, 0.25, 0.25), 0.45).tolist() == [[True, True, False, False]]


def test_greedy_takes_the_largest() -> None:
    assert choose_tokens(log(0.2, 0.5, 0.3), None, 0).tolist() == [1]


def test_sampling_follows_the_nucleus_distribution() -> None:
    rows = 4000
    logits = np.repeat(log(0.15, 0.5, 0.05, 0.3), rows, axis=0)
    counts = np.bincount(choose_tokens(logits, range(rows), 2, top_p=0.9), minlength=4) / rows
    expected = np.array([0.15, 0.5, 0, 0.3]) / 0.95
    assert counts[2] == 0
    # Three standard errors of a share of 4000 draws are below 0.025.
    np.testing.assert_allclose(counts, expected, atol=0.025)


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.repeat(log(0.6, 0.4), 2000, axis=0)
    cold, warm = (np.mean(choose_tokens(logits, range(2000), 0, top_p=1.0, temperature=t) == 0) for t in (0.25, 4.0))
    assert cold == pytest.approx(0.6**4 / (0.6**4 + 0.4**4), abs=0.04)
    assert warm == pytest.approx(0.525, abs=0.04)


def test_a_row_depends_on_its_seed_and_step_alone() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
    together = choose_tokens(logits, [3, 1, 4, 1, 5], 7)
    alone = [choose_tokens(logits[row : row + 1], [seed], 7)[0] for row, seed in enumerate([3, 1, 4, 1, 5])]
    assert together.tolist() == alone
    assert any((choose_tokens(logits, [3, 1, 4, 1, 5], step) != together).any() for step in range(3))
