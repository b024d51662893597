from __future__ import annotations

import math

import numpy as np
import pytest

from mi2rage_rt import decoding, noise
from mi2rage_rt.decoding import choose_tokens, nucleus_ids, nucleus_mask


def log(*shares: float) -> np.ndarray:
    return np.log(np.array([shares], dtype=np.float32))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_nucleus_is_the_smallest_set(top_p: float, kept: list[int]) -> None:
    logits = log(0.15, 0.5, 0.05, 0.3)
    assert np.flatnonzero(nucleus_mask(logits, top_p)[0]).tolist() == kept
    assert nucleus_ids(logits[0], top_p).tolist() == kept


def test_equal_tokens_are_taken_by_id() -> None:
    logits = log(0.25, 0.25, 0.25, 0.25)
    assert nucleus_mask(logits, 0.45).tolist() == [[True, True, False, False]]
    assert nucleus_ids(logits[0], 0.45).tolist() == [0, 1]


LOGITS = {
    "peaked": lambda draws: 8 * draws.standard_normal(3000),
    "flat": lambda draws: 0.1 * draws.standard_normal(3000),
    "ties": lambda draws: np.round(2 * draws.standard_normal(3000)),
    "powers of two": lambda draws: np.log(2.0) * draws.permutation(np.repeat([0.0, -1, -2, -3], 512)),
    "all alike": lambda draws: np.zeros(2048),
    "one stands out": lambda draws: np.where(np.arange(3000) == draws.integers(3000), 30.0, 0.0),
    "some are out of the question": lambda draws: np.where(draws.random(3000) < 0.5, -np.inf, draws.random(3000)),
    "two tokens": lambda draws: draws.random(2),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("top_p", [1e-6, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_the_quick_search_finds_what_the_definition_says(kind: str, top_p: float) -> None:
    """Exactly, ties and sums that meet `top_p` to the last bit among them."""
    for seed in range(5):
        row = np.asarray(LOGITS[kind](np.random.default_rng(seed)), dtype=np.float32)
        expected = np.flatnonzero(nucleus_mask(row[None], top_p)[0])
        assert np.array_equal(nucleus_ids(row, top_p), expected)


def test_most_rows_are_not_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "nucleus_mask", lambda *_: pytest.fail("the definition was asked"))
    rows = np.random.default_rng(0).standard_normal((20, 3000)).astype(np.float32)
    sizes = [len(nucleus_ids(scale * rows[scale], 0.9)) for scale in (2, 4, 6)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 100


def by_definition(logits: np.ndarray, seeds: range, step: int, top_p: float, temperature: float) -> list[int]:
    """What `choose_tokens` promises, noise and nucleus of the whole vocabulary."""
    scaled = logits / np.float32(temperature)
    draws = np.stack([noise.gumbel(seed, logits.shape[1], stream=step) for seed in seeds])
    return list(np.where(nucleus_mask(scaled, top_p), scaled + draws, -np.inf).argmax(-1))


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_noise_is_drawn_as_by_definition(scale: float, top_p: float, temperature: float) -> None:
    logits = (scale * np.random.default_rng(1).standard_normal((40, 1500))).astype(np.float32)
    for step in (0, 5):
        found = choose_tokens(logits, range(40), step, top_p=top_p, temperature=temperature)
        assert found.tolist() == by_definition(logits, range(40), step, top_p, temperature)


def test_the_noise_of_some_tokens_is_the_same_bytes() -> None:
    whole = noise.gumbel(11, 20_000, stream=3)
    for ids in (np.arange(0, 20_000, 9), np.arange(20_000), np.array([19_999])):
        assert decoding._gumbel_at(11, 20_000, 3, ids).tobytes() == whole[ids].tobytes()


def test_a_uniform_zero_moves_the_draws_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's gumbel skips it; one in 2^53, so it is put there."""

    class Zero:
        def random(self, size: int) -> np.ndarray:
            return np.where(np.arange(size) == 2, 0.0, 0.5)

        def gumbel(self, size: int) -> np.ndarray:
            return np.full(size, 7.0)

    monkeypatch.setattr(noise, "rng", lambda *_: Zero())
    assert decoding._gumbel_at(0, 100, 0, np.array([1])).tolist() == [7.0]
    monkeypatch.setattr(Zero, "random", lambda _, size: np.full(size, 0.5))
    assert decoding._gumbel_at(0, 100, 0, np.array([1])).tolist() == [np.float32(-math.log(math.log(2)))]


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
