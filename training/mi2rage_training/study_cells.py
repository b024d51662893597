"""The rows of a study's table: what a student of each is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError
from mi2rage_training.chain_config import Given
from mi2rage_training.embeddings import caption_similarity, made_embeddings
from mi2rage_training.pairs import Pair, pairs_from_candidates
from mi2rage_training.policies import Policy, PolicyConfig, choose
from mi2rage_training.ranking import posterior_weights_of
from mi2rage_training.selection import table_from_candidates
from mi2rage_training.store import Candidate
from mi2rage_training.study_material import Material
from mi2rage_training.study_results import CellSpec, Comparison
from mi2rage_training.teacher import TeacherScores

__all__ = ["CELLS", "Lesson", "cells_of", "comparisons_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """What a student is trained on, and on what view of the real pairs its epoch is chosen and it is tested.

    Attributes:
        weights: one a pair, or None.
        soft_targets: (N, labels), or None.
        distill: share of the soft targets in the loss.
        unimodal: the student sees the given modality alone.
        candidates: those among the pairs, for what is measured beside the score.
    """

    pairs: list[Pair]
    weights: list[float] | None = None
    soft_targets: NDArray[np.float64] | None = None
    distill: float = 0.0
    unimodal: bool = False
    candidates: tuple[Candidate, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A row: its description, and how its lesson is made."""

    spec: CellSpec
    lesson: Callable[[Material], Lesson]


def _of(candidates: Sequence[Candidate]) -> Lesson:
    return Lesson(pairs_from_candidates(candidates), candidates=tuple(candidates))


def _unimodal(material: Material) -> Lesson:
    return Lesson(material.unimodal(material.real["train"]), unimodal=True)


def _direct(store: str) -> Callable[[Material], Lesson]:
    return lambda material: _of([item for item in material.store(store) if item.provenance.child == 0])


def _all_of(store: str) -> Callable[[Material], Lesson]:
    return lambda material: _of(material.store(store))


def _selected(store: str, policy: Policy, diversity: float = 0.0) -> Callable[[Material], Lesson]:
    """At most `method.per_parent` candidates of each real sample, by one policy."""

    def lesson(material: Material) -> Lesson:
        candidates = material.store(store)
        fit = material.recipe.student
        taught = policy in {Policy.ADDED, Policy.INFORMATION, Policy.POSTERIOR}
        similarity = embeddings = None
        if policy is Policy.SIMILARITY:
            encoder = material.recipe.models.text_encoder
            similarity = caption_similarity(candidates, encoder, fit.max_length, material.place.device)
        if diversity:
            embeddings = made_embeddings(candidates, fit.config(material.recipe.models, 0), material.place.device)
        scores = material.scores(store) if taught else None
        table = table_from_candidates(candidates, scores=scores, similarity=similarity, embeddings=embeddings)
        config = PolicyConfig(
            policy, per_parent=material.recipe.method.per_parent, diversity=diversity, seed=material.seed_of("select")
        )
        return _of([candidates[row] for row in np.flatnonzero(choose(table, config)).tolist()])

    return lesson


def _weighted(store: str, rounds: int | None = None) -> Callable[[Material], Lesson]:
    """All candidates, each weighted by its teachers among its siblings."""

    def lesson(material: Material) -> Lesson:
        return weighted_lesson(material, material.store(store), material.scores(store, rounds))

    return lesson


def weighted_lesson(material: Material, candidates: Sequence[Candidate], scores: TeacherScores) -> Lesson:
    """Candidates weighted by q(y | both) among their siblings, and the teachers' soft labels if the recipe asks."""
    method = material.recipe.method
    parents = np.array([candidate.provenance.parent for candidate in candidates])
    weights = posterior_weights_of(parents, scores.information_nats, method.sharpness)
    soft = None
    if method.distill:  # the teachers know the labels of their candidates, the benchmark may have more
        soft = np.zeros((len(candidates), len(material.labels)))
        soft[:, [material.labels.index(label) for label in scores.labels]] = scores.probabilities
    return dataclasses.replace(_of(candidates), weights=weights.tolist(), soft_targets=soft, distill=method.distill)


def _method(material: Material) -> Lesson:
    if material.recipe.method.weighted:
        return _weighted("judged")(material)
    return _selected("judged", Policy.POSTERIOR)(material)


def _real(material: Material) -> Lesson:
    return Lesson(material.real["train"])


def _real_and_made(material: Material) -> Lesson:
    made = _method(material)
    real = material.real["train"]
    weights = [1.0] * len(real) + (made.weights or [1.0] * len(made.pairs))
    return Lesson(real + made.pairs, weights, candidates=made.candidates)


def _cell(name: str, title: str, explanation: str, group: str, lesson: Callable[[Material], Lesson]) -> Cell:
    return Cell(
        CellSpec.model_validate({"name": name, "title": title, "explanation": explanation, "group": group}), lesson
    )


CELLS: tuple[Cell, ...] = (
    _cell("unimodal", "given modality only", "the real texts or images, nothing made", "baseline", _unimodal),
    _cell(
        "direct", "direct", "one made sample from each real one, nothing selected", "baseline", _direct("independent")
    ),
    _cell(
        "direct-labelled",
        "direct, label in the prompt",
        "the same, the label's words in the prompt",
        "control",
        _direct("independent-labelled"),
    ),
    _cell(
        "independent",
        "independent, all",
        "as many made samples as the chain has, all made directly",
        "control",
        _all_of("independent"),
    ),
    _cell(
        "independent-added",
        "independent, teacher's best",
        "the same, the teacher's best by added information",
        "control",
        _selected("independent", Policy.ADDED),
    ),
    _cell(
        "independent-weighted",
        "independent, weighted",
        "the same, all kept and weighted by the teacher",
        "control",
        _weighted("independent"),
    ),
    _cell(
        "independent-labelled",
        "independent, label in the prompt",
        "as many, all made directly, the label's words in the prompts",
        "control",
        _all_of("independent-labelled"),
    ),
    _cell("ccg", "chain, all", "every link of the chain, the label's words kept along it", "control", _all_of("chain")),
    _cell(
        "ccg-random",
        "chain, random",
        "as many as the selections keep, at random",
        "control",
        _selected("chain", Policy.RANDOM),
    ),
    _cell(
        "ccg-similarity",
        "chain, similarity",
        "those whose caption is most like the sentence",
        "control",
        _selected("chain", Policy.SIMILARITY),
    ),
    _cell(
        "ccg-information",
        "chain, likelihood",
        "the teacher's best by log q(y | both)",
        "method",
        _selected("chain", Policy.INFORMATION),
    ),
    _cell(
        "ccg-added",
        "chain, added information",
        "the teacher's best by what the made modality adds",
        "method",
        _selected("chain", Policy.ADDED),
    ),
    _cell(
        "ccg-diverse",
        "chain, added and diversity",
        "the same, half of the weight on facility location",
        "method",
        _selected("chain", Policy.ADDED, 0.5),
    ),
    _cell(
        "ccg-posterior",
        "chain, drawn by the posterior",
        "siblings drawn by q(y | both), not the best taken",
        "method",
        _selected("chain", Policy.POSTERIOR),
    ),
    _cell("ccg-weighted", "chain, weighted", "all links, weighted by the teacher", "method", _weighted("chain")),
    _cell(
        "ccg-one-round",
        "chain, weighted, one round",
        "the same without expectation maximisation",
        "method",
        _weighted("chain", 1),
    ),
    _cell("mi2rage", "MI2RAGE", "chain with the teacher inside, weighted", "method", _method),
    _cell("real", "real pairs", "the real images and texts (not available to the others)", "upper", _real),
    _cell("real-and-made", "real pairs and MI2RAGE", "both together", "upper", _real_and_made),
)
"""Every row, in the order of the table."""


def cells_of(names: Sequence[str]) -> tuple[Cell, ...]:
    """The rows of these names, in the order of the table; all of them where no names are given.

    Raises:
        InputError: a name is not known.
    """
    known = {cell.spec.name for cell in CELLS}
    if unknown := sorted(set(names) - known):
        raise InputError(f"cell {unknown[0]!r}: is not known; expected some of {', '.join(sorted(known))}")
    return tuple(cell for cell in CELLS if not names or cell.spec.name in names)


_QUESTIONS = (
    ("direct", "unimodal", "Does one made sample each help at all?"),
    ("independent", "direct", "Do more made samples help, without a teacher?"),
    ("direct-labelled", "direct", "Do the label's words in the prompt help?"),
    ("independent-labelled", "independent", "Do they help where there are more samples?"),
    ("ccg", "independent-labelled", "Does a chain beat as many independent samples by the same prompts?"),
    ("ccg-added", "ccg-random", "Does the teacher beat a random choice of the same size?"),
    ("ccg-added", "ccg-similarity", "Does it beat a similarity filter?"),
    ("ccg-added", "ccg-information", "Does added information beat plain likelihood?"),
    ("ccg-diverse", "ccg-added", "Does diversity help?"),
    ("ccg-posterior", "ccg-added", "Does drawing by the posterior beat taking the best?"),
    ("ccg-weighted", "ccg", "Does weighting beat keeping all alike?"),
    ("ccg-weighted", "ccg-one-round", "Do further rounds of expectation maximisation help?"),
    ("mi2rage", "ccg-weighted", "Does the teacher inside the chain help?"),
    ("mi2rage", "direct", "Does MI2RAGE beat direct generation?"),
    ("mi2rage", "independent", "Does it beat as many independent samples?"),
    ("mi2rage", "independent-labelled", "Does it beat as many independent samples by the same prompts?"),
    ("mi2rage", "independent-weighted", "Does it beat as many independent samples with the same teacher?"),
    ("mi2rage", "real", "Does it beat real pairs?"),
    ("real-and-made", "real", "Do made samples help where real pairs are there?"),
)


def comparisons_of(cells: Sequence[Cell], settings: Sequence[Given]) -> list[Comparison]:
    """The questions that these rows can answer."""
    names = {cell.spec.name for cell in cells}
    return [
        Comparison.model_validate({"setting": given.value, "better": better, "worse": worse, "question": question})
        for given in settings
        for better, worse, question in _QUESTIONS
        if {better, worse} <= names
    ]
