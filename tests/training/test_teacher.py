"""Cross-fitting and the scores; the fitting itself is replaced by an exact stand-in."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import DataError, InputError
from mi2rage_training import teacher as teacher_module
from mi2rage_training.fit import Fit
from mi2rage_training.folds import fold_of, fold_seed_for
from mi2rage_training.pairs import Pair
from mi2rage_training.store import Candidate
from mi2rage_training.teacher import TeacherConfig, TeacherScores, fit_teachers, label_entropy_nats
from tests.training.fakes import LABELS, candidates


def score_candidates(rows: Sequence[Candidate], config: TeacherConfig) -> TeacherScores:
    return fit_teachers(rows, config)[1]


class _Stub:
    """A classifier that is sure of the label at link 1 with an image, and knows nothing else."""

    labels = ("None", *sorted(LABELS[1:]))

    class module:  # noqa: N801
        """Moves nowhere."""

        to = cpu = staticmethod(lambda *_: None)

    def __init__(self, seen: Sequence[Pair]) -> None:
        self.seen = {pair.sample.provenance.parent for pair in seen if pair.sample.provenance}

    def label_ids(self, rows: Sequence[Any]) -> np.ndarray:
        return np.array([self.labels.index(row.label) for row in rows])


weights_of: list[list[float]] = []
"""The weights that each of the stubs was fitted with."""


@pytest.fixture
def stub_fit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """Replaces fitting; returns the (seen, scored) parents of each teacher."""
    record: list[tuple[set[str], set[str]]] = []

    def fit(pairs: Sequence[Pair], *_: Any, **given: Any) -> Fit:
        weights_of.append(given["weights"])
        return Fit(_Stub(pairs), (0.0,), (), 1)  # type: ignore[arg-type]

    def logits(stub: _Stub, rows: Sequence[Pair], **_: Any) -> list[np.ndarray]:
        record.append((stub.seen, {pair.sample.provenance.parent for pair in rows if pair.sample.provenance}))
        both = np.zeros((len(rows), len(stub.labels)), np.float32)
        gold = stub.label_ids([pair.sample for pair in rows])
        first = [pair.sample.provenance.link == 1 for pair in rows if pair.sample.provenance]
        both[np.arange(len(rows)), gold] = np.where(first, 50.0, 0.0)
        return [both, np.zeros_like(both)]

    weights_of.clear()
    monkeypatch.setattr(teacher_module, "fit_classifier", fit)
    monkeypatch.setattr(teacher_module, "logits_of_pairs", logits)
    return record


def test_no_teacher_scores_a_parent_it_saw(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    score_candidates(candidates(40), TeacherConfig(folds=4))
    assert len(stub_fit) == 4
    for seen, scored in stub_fit:
        assert seen
        assert scored
        assert not seen & scored
    assert set().union(*(scored for _, scored in stub_fit)) == {f"s{i}" for i in range(40)}


def test_teachers_of_other_candidates_have_another_name(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows, config = candidates(12), TeacherConfig(folds=2)
    others = [row for row in rows if row.provenance.link == 1] * 2
    (same, _), (again, _), (other, _) = (fit_teachers(found, config) for found in (rows, rows, others))
    assert same.name == again.name != other.name


def test_scores_are_the_bound_in_nats(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows = candidates(39)
    scores = score_candidates(rows, TeacherConfig(folds=3))
    links = np.array([row.provenance.link for row in rows])
    assert scores.label_entropy_nats == pytest.approx(math.log(3))
    assert scores.information_nats[links == 1] == pytest.approx(math.log(3))  # sure and right: all of H(Y)
    assert scores.information_nats[links == 2] == pytest.approx(0.0)  # knows nothing: log(1/3) + log 3
    assert scores.added_nats[links == 1] == pytest.approx(math.log(3))
    assert scores.bound_nats == pytest.approx(math.log(3) / 2)
    assert scores.real_bound_nats == pytest.approx(0.0)


def test_later_rounds_weigh_siblings_by_their_likelihood(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows = candidates(40)
    scores = score_candidates(rows, TeacherConfig(folds=2, rounds=2, members=2))
    assert len(stub_fit) == 8  # folds x rounds x members
    assert all(weight == 1 for weights in weights_of[:4] for weight in weights)
    links = np.array([row.provenance.link for row in rows])
    # Sure at link 1, one of three at link 2: shares of 3/4 and 1/4 of two siblings.
    assert scores.weights[links == 1] == pytest.approx(1.5)
    assert scores.weights[links == 2] == pytest.approx(0.5)
    assert sorted(set(np.round(weights_of[4], 6))) == pytest.approx([0.5, 1.5])


def test_too_few_parents_for_the_folds() -> None:
    with pytest.raises(DataError, match="folds"):
        score_candidates(candidates(3), TeacherConfig(folds=20))
    with pytest.raises(InputError, match="2 or more"):
        TeacherConfig(folds=1)


def test_folds_are_even_and_follow_the_parent() -> None:
    counts = np.bincount([fold_of(f"s{i}", 4, 0) for i in range(2000)], minlength=4)
    assert counts.min() > 400
    assert fold_of("s1", 4, 0) == fold_of("s1", 4, 0)


def test_a_fold_is_never_empty_while_there_are_parents_enough() -> None:
    for seed in range(20):
        found = fold_seed_for(["a", "b", "c"], 3, seed)
        assert {fold_of(name, 3, found) for name in "abc"} == {0, 1, 2}
    assert fold_seed_for([f"s{i}" for i in range(50)], 4, 7) == 7


@pytest.mark.parametrize(
    "settings", [{"folds": 1}, {"members": 0}, {"rounds": 0}, {"hidden": 0.0}, {"hidden": 1.0}, {"sharpness": 0.0}]
)
def test_impossible_teachers_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        TeacherConfig(**settings)


def test_made_images_and_made_texts_are_not_mixed(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows = candidates(20)
    rows[3] = dataclasses.replace(rows[3], made="text")
    with pytest.raises(DataError, match="made image and text"):
        score_candidates(rows, TeacherConfig(folds=2))


def test_entropy_by_hand() -> None:
    assert label_entropy_nats(["a"] * 5) == 0.0
    assert label_entropy_nats(["a", "b", "b", "b"]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
