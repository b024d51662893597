"""Temperatures and calibration error against cases worked out by hand, and simulated ones."""

import numpy as np
import pytest

from mi2rage_training.calibration import calibration_error, fit_temperature, log_softmax


def simulated(rows: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits `sharpness` times those that the labels are drawn by."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, (rows, 4))
    gold = (log_softmax(true) + rng.gumbel(size=true.shape)).argmax(1)
    return sharpness * true, gold


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_a_known_sharpness(sharpness: float) -> None:
    logits, gold = simulated(20_000, sharpness)
    assert fit_temperature(logits, gold) == pytest.approx(sharpness, rel=0.05)


def test_the_temperature_minimises_the_loss() -> None:
    logits, gold = simulated(500, 3.0)
    found = fit_temperature(logits, gold)

    def loss(temperature: float) -> float:
        return -float(log_softmax(logits, temperature)[np.arange(len(gold)), gold].mean())

    assert loss(found) <= min(loss(found * 1.05), loss(found / 1.05))


def test_weights_count_rows_more_than_once() -> None:
    logits, gold = simulated(300, 2.0)
    weights = np.random.default_rng(1).integers(0, 4, len(gold))
    repeated = np.repeat(np.arange(len(gold)), weights)
    weighted = fit_temperature(logits, gold, weights.astype(np.float64))
    assert weighted == pytest.approx(fit_temperature(logits[repeated], gold[repeated]), rel=1e-9)


def test_rows_that_are_all_right_end_at_the_bound() -> None:
    assert fit_temperature(np.eye(3) * 5, np.arange(3)) == pytest.approx(1 / 20, rel=1e-6)


def test_calibration_error_by_hand() -> None:
    """Four rows at confidence 0.8, of which three are right; two at 0.6, none right."""
    sure = np.log([[0.8, 0.2]] * 4 + [[0.6, 0.4]] * 2)
    gold = np.array([0, 0, 0, 1, 1, 1])
    assert calibration_error(sure, gold) == pytest.approx((4 * 0.05 + 2 * 0.6) / 6)
    assert calibration_error(sure, gold, np.array([1, 1, 1, 1, 0, 0.0])) == pytest.approx(0.05)


def test_the_right_temperature_calibrates() -> None:
    logits, gold = simulated(20_000, 4.0)
    before = calibration_error(log_softmax(logits), gold)
    after = calibration_error(log_softmax(logits, fit_temperature(logits, gold)), gold)
    assert before > 0.15
    assert after < 0.02


def test_log_softmax_of_large_logits_is_finite() -> None:
    assert np.isfinite(log_softmax(np.array([[1e5, -1e5, 0.0]], np.float32))).all()
