"""Cross-fitted scores on a toy distribution whose mutual information is known, with real, tiny networks."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Provenance, Sample, Span
from mi2rage_training.calibration import log_softmax
from mi2rage_training.fit import FitConfig, fit_classifier, logits_of_pairs
from mi2rage_training.pairs import pairs_from_candidates
from mi2rage_training.store import Candidate
from mi2rage_training.teacher import TeacherConfig, Teachers, TeacherScores, fit_teachers
from mi2rage_training.teacher_folder import load_teachers, save_teachers

LABELS = ("None", "/a/b", "/c/d")
WORDS = ("talks about", "w/", "back to")
COLORS = ((220, 40, 40), (40, 200, 60), (50, 60, 220))
TRUE = 0.7
"""How often the word, and independently the colour, is that of the label."""
ROWS = 1500


def candidates(seed: int) -> list[Candidate]:
    """One made image a sentence; names are all different, so that a sentence can be learnt by heart."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(ROWS):
        label = int(rng.integers(3))
        word, color = (label if rng.random() < TRUE else int((label + rng.integers(1, 3)) % 3) for _ in range(2))
        names = ["".join(rng.choice(list("abdefgiklmnoprst"), 6)) for _ in range(2)]
        tokens = (names[0], *WORDS[word].split(), names[1])
        image = np.clip(rng.normal(0, 20, (24, 24, 3)) + np.array(COLORS[color]), 0, 255).astype(np.uint8)
        origin = Provenance(f"s{index}", 1, 0, 0, {})
        spans = Span(0, 1), Span(len(tokens) - 1, len(tokens))
        sample = Sample(f"s{index}/0.1", tokens, *spans, LABELS[label], "x.png", origin)
        rows.append(Candidate(sample, encode_image(image), sample.text))
    return rows


def information(views: int) -> float:
    """I(label; `views` independent noisy copies of it), in nats, by summing over all cases."""
    noise = [TRUE if copy == 0 else (1 - TRUE) / 2 for copy in range(3)]
    total = 0.0
    for seen in itertools.product(range(3), repeat=views):
        joint = [math.prod(noise[(copy - label) % 3] for copy in seen) / 3 for label in range(3)]
        total += sum(p * math.log(p / sum(joint) * 3) for p in joint)
    return total


@pytest.fixture(scope="module")
def taught() -> tuple[list[Candidate], Teachers, TeacherScores]:
    rows = candidates(0)
    return rows, *fit_teachers(rows, TeacherConfig(folds=3, fit=FitConfig(epochs=6, max_length=24, seed=1)))


def test_bounds_land_on_the_true_information(taught: tuple[list[Candidate], Teachers, TeacherScores]) -> None:
    """Within 0.05 nats, sampling error (about 0.02) included."""
    scores = taught[2]
    assert information(1) == pytest.approx(0.28, abs=0.01)
    assert scores.real_bound_nats == pytest.approx(information(1), abs=0.05)
    assert scores.bound_nats == pytest.approx(information(2), abs=0.05)
    assert scores.added_nats.mean() == pytest.approx(information(2) - information(1), abs=0.05)
    assert scores.calibration_error < 0.06


def test_a_teacher_that_saw_its_own_children_would_fail() -> None:
    pairs = pairs_from_candidates(candidates(0))
    seen = fit_classifier(pairs, FitConfig(epochs=10, max_length=24, seed=1), labels=LABELS).classifier
    (logits,) = logits_of_pairs(seen, pairs)
    gold = seen.label_ids([pair.sample for pair in pairs])
    bound = log_softmax(logits)[np.arange(len(gold)), gold].mean() + math.log(3)
    assert bound > information(2) + 0.05


def test_teachers_judge_alike_after_saving(
    taught: tuple[list[Candidate], Teachers, TeacherScores], tmp_path: Path
) -> None:
    rows, teachers, scores = taught
    save_teachers(teachers, tmp_path / "teachers")
    loaded = load_teachers(tmp_path / "teachers")
    assert loaded.name == teachers.name
    assert loaded.added_nats(rows[:50]) == pytest.approx(scores.added_nats[:50], abs=1e-5)
    strangers = [
        dataclasses.replace(row, sample=dataclasses.replace(row.sample, provenance=Provenance("new", 1, 0, 0, {})))
        for row in rows[:3]
    ]
    assert np.isfinite(loaded.added_nats(strangers)).all()
