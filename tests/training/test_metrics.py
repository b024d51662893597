"""The metric against the field's definition, worked out by hand."""

import pytest

from mi2rage_training.metrics import relation_metrics


def test_counts_by_hand() -> None:
    gold = ["None", "None", "peer", "peer", "couple", "couple"]
    predicted = ["None", "peer", "peer", "couple", "None", "couple"]
    metrics = relation_metrics(gold, predicted)
    # non-None predicted: 4, gold: 4, correct: 2
    assert metrics.precision == pytest.approx(2 / 4)
    assert metrics.recall == pytest.approx(2 / 4)
    assert metrics.f1 == pytest.approx(0.5)
    assert metrics.accuracy == pytest.approx(3 / 6)
    assert metrics.by_label["couple"].precision == pytest.approx(1 / 2)
    assert metrics.by_label["peer"].recall == pytest.approx(1 / 2)
    assert "None" not in metrics.by_label


def test_a_wrong_relation_on_a_positive_row_costs_both() -> None:
    metrics = relation_metrics(["peer", "peer", "peer"], ["peer", "couple", "None"])
    assert metrics.precision == pytest.approx(1 / 2)
    assert metrics.recall == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("gold", "predicted", "accuracy"),
    [(["peer", "peer"], ["None", "None"], 0.0), (["None", "None"], ["peer", "None"], 0.5), (["None"], ["None"], 1.0)],
)
def test_zero_denominators_give_zero(gold: list[str], predicted: list[str], accuracy: float) -> None:
    metrics = relation_metrics(gold, predicted)
    assert (metrics.precision, metrics.recall, metrics.f1) == (0.0, 0.0, 0.0)
    assert metrics.accuracy == accuracy


def test_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    import numpy as np

    labels = ["None", "a", "b", "c"]
    draws = np.random.default_rng(3).integers(0, 4, (2, 200))
    gold, predicted = ([labels[i] for i in row] for row in draws)
    expected = sklearn.precision_recall_fscore_support(gold, predicted, labels=labels[1:], average="micro")
    metrics = relation_metrics(gold, predicted)
    assert (metrics.precision, metrics.recall, metrics.f1) == pytest.approx(expected[:3])


def test_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="equally many"):
        relation_metrics(["None"], [])
