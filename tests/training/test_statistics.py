"""Micro-F1 from counts, and intervals over seeds and test rows: by hand, against scipy, and by simulated coverage."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from mi2rage_training.metrics import relation_metrics
from mi2rage_training.statistics import (
    micro_f1,
    paired_bootstrap,
    row_indicators,
    share_of_gap_closed,
    summary,
    t_quantile,
)

LABELS = np.array(["None", "a", "b"])


@dataclass(frozen=True)
class Run:
    gold: list[str]
    predicted: list[str]


def cells(
    rng: np.random.Generator, right: tuple[float, ...], *, seeds: int = 5, rows: int = 120, shared: bool = False
) -> list[dict[int, Run]]:
    """Cells whose F1 in the long run is `right`: all gold is positive, and a wrong row gets a label of its own."""
    made: list[dict[int, Run]] = [{} for _ in right]
    common, common_luck = rng.choice(["a", "b"], rows), rng.random(rows)
    for seed in range(seeds):
        gold = common if shared else rng.choice(["a", "b"], rows)
        luck = common_luck if shared else rng.random(rows)
        for cell, share in zip(made, right, strict=True):
            own = np.where(rng.random(rows) < 0.5, rng.random(rows), luck)
            cell[seed] = Run(gold.tolist(), np.where(own < share, gold, "wrong").tolist())
    return made


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        (["None", "a", "a", "b"], ["a", "a", "b", "None"]),
        (["a", "b"], ["None", "None"]),  # no positive prediction
        (["None", "None"], ["a", "None"]),  # no positive gold
        (["None"], ["None"]),
    ],
)
def test_f1_is_the_metrics_f1_by_hand(gold: list[str], predicted: list[str]) -> None:
    counts = row_indicators(gold, predicted).sum(axis=0)
    assert micro_f1(counts) == pytest.approx(relation_metrics(gold, predicted).f1, abs=1e-12)


def test_f1_is_the_metrics_f1_on_random_rows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        gold, predicted = rng.choice(LABELS, (2, int(rng.integers(1, 12)))).tolist()
        counts = row_indicators(gold, predicted).sum(axis=0)
        assert micro_f1(counts) == pytest.approx(relation_metrics(gold, predicted).f1, abs=1e-12)


def test_indicators_refuse_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="2 gold and 1 predicted"):
        row_indicators(["a", "b"], ["a"])


@pytest.mark.parametrize("freedom", [1, 2, 4, 10, 11, 20, 200])
def test_t_quantiles_are_those_of_scipy(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)


def test_summary_by_hand() -> None:
    found = summary([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.count) == (2.0, 1.0, 3)
    assert found.t_interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    assert summary([0.5]).sd is None
    with pytest.raises(ValueError, match="no values"):
        summary([])


@pytest.mark.parametrize("shared", [False, True])
def test_a_paired_difference_has_the_means_of_the_cells(shared: bool) -> None:
    better, worse = cells(np.random.default_rng(1), (0.8, 0.6), shared=shared)
    found = paired_bootstrap(better, worse, repeats=300)
    by_hand = [
        relation_metrics(better[seed].gold, better[seed].predicted).f1
        - relation_metrics(worse[seed].gold, worse[seed].predicted).f1
        for seed in better
    ]
    assert list(found.by_seed.values()) == pytest.approx(by_hand)
    assert found.mean == pytest.approx(np.mean(by_hand))
    assert found.low < found.mean < found.high
    assert found.shared_rows is shared
    assert paired_bootstrap(better, worse, repeats=300) == found


def test_swapping_the_sides_mirrors_the_difference() -> None:
    better, worse = cells(np.random.default_rng(2), (0.8, 0.6))
    there, back = paired_bootstrap(better, worse, repeats=100), paired_bootstrap(worse, better, repeats=100)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_equal_predictions_differ_by_nothing() -> None:
    (cell,) = cells(np.random.default_rng(3), (0.7,))
    found = paired_bootstrap(cell, cell, repeats=50)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_one_seed_has_no_t_interval() -> None:
    better, worse = cells(np.random.default_rng(4), (0.8, 0.6), seeds=1)
    found = paired_bootstrap(better, worse, repeats=50)
    assert found.t_interval is None
    assert found.low < found.high


def test_what_is_not_paired_is_refused() -> None:
    better, worse = cells(np.random.default_rng(5), (0.8, 0.6))
    with pytest.raises(ValueError, match="expected the same for every cell"):
        paired_bootstrap(better, {0: worse[0]})
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap({}, {})
    with pytest.raises(ValueError, match="seed 0: the gold labels differ"):
        paired_bootstrap(better, worse | {0: worse[1]})


@pytest.mark.parametrize("shared", [False, True])
def test_intervals_cover_the_true_difference(shared: bool) -> None:
    """200 studies of 5 seeds and 120 rows whose true difference is 0.05; nominal 95%, binomial error 1.5%."""
    covered = 0
    for study in range(200):
        better, worse = cells(np.random.default_rng(study), (0.75, 0.70), shared=shared)
        found = paired_bootstrap(better, worse, repeats=200, seed=study)
        covered += found.low <= 0.05 <= found.high
    assert 0.91 <= covered / 200 <= 1.0


def test_rows_shared_by_all_seeds_are_not_five_test_sets() -> None:
    widths = {}
    for shared in (False, True):
        found = [
            paired_bootstrap(*cells(np.random.default_rng(study), (0.75, 0.70), shared=shared), repeats=200)
            for study in range(20)
        ]
        widths[shared] = np.mean([difference.high - difference.low for difference in found])
    assert widths[True] > 1.1 * widths[False]


def test_the_bootstrap_is_fast_enough_for_a_table() -> None:
    better, worse = cells(np.random.default_rng(6), (0.8, 0.6), rows=600)
    start = time.process_time()
    paired_bootstrap(better, worse)
    assert time.process_time() - start < 2  # 0.08 s on an idle core


def test_share_of_the_gap() -> None:
    method, direct, real = cells(np.random.default_rng(7), (0.75, 0.70, 0.90), rows=600)
    share = share_of_gap_closed(method, direct, real)
    assert share is not None
    assert share.share == pytest.approx(0.25, abs=0.1)
    assert share.low < share.share < share.high
    whole = share_of_gap_closed(real, direct, real)
    assert whole is not None
    assert (whole.share, whole.low, whole.high) == pytest.approx((1, 1, 1))


def test_no_share_without_a_clear_gap() -> None:
    method, direct, real = cells(np.random.default_rng(8), (0.75, 0.80, 0.70))
    assert share_of_gap_closed(method, direct, real) is None
    assert share_of_gap_closed(method, direct, direct) is None


def test_the_interval_of_a_share_is_finite_with_a_narrow_gap() -> None:
    for study in range(30):
        method, direct, real = cells(np.random.default_rng(study), (0.6, 0.70, 0.76), rows=60)
        share = share_of_gap_closed(method, direct, real, repeats=200)
        assert share is None or np.isfinite([share.low, share.high]).all()
