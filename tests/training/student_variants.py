"""Variants of MI2RAGE's student, on validation rows: `python -m tests.training.student_variants FOLDER --given image`.

Makes the candidates of the recipe `micro` once for each world (seeds 101 and 102) into FOLDER, then fits several
students of each row, which start from the same weights in all rows. The epoch is chosen on the world's own validation
rows; the score is micro F1 on 800 validation rows of the world of seed + 900. No test row is looked at. What is there
is not made again, so the script goes on where it was stopped. Prints a table; `training/NOTES.md` says what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mi2rage_rt.noise import rng, seed_from
from mi2rage_training import microworld
from mi2rage_training.calibration import log_softmax
from mi2rage_training.chain_config import Given
from mi2rage_training.fit import FitConfig, logits_of_pairs, new_classifier
from mi2rage_training.fit_data import PairTensors
from mi2rage_training.fit_device import accelerator_for
from mi2rage_training.fit_loop import Trainer
from mi2rage_training.fit_targets import targets_of
from mi2rage_training.pairs import Pair, load_pairs
from mi2rage_training.study_cells import CELLS, Lesson, weighted_lesson
from mi2rage_training.study_material import Material, Place
from mi2rage_training.study_recipe import read_recipe

WORLDS = (101, 102)
EVALUATION_ROWS = 800
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Variant:
    """A lesson, and whether its first half of steps sees the rows of `early` alone."""

    lesson: Lesson
    early: NDArray[np.bool_] | None = None


class GradualTrainer(Trainer):
    """Draws the first half of its steps from some rows, the rest from all."""

    early: torch.Tensor

    def _rows(self) -> torch.Tensor:
        if self.state.step >= self.total_steps // 2:
            return super()._rows()
        size = self.config.batch_size
        epoch, position = divmod(self.state.step, len(self.early) // size)
        order = rng(seed_from("fit-early", self.config.seed, epoch)).permutation(len(self.early))
        return self.early[torch.from_numpy(order[position * size : (position + 1) * size])]


def cell(name: str) -> Callable[[Material], Variant]:
    """A row of the study as it is."""
    found = next(cell for cell in CELLS if cell.spec.name == name)
    return lambda material: Variant(found.lesson(material))


def distilled(store: str, share: float) -> Callable[[Material], Variant]:
    """Weighted, with a share of the teachers' soft labels in the loss."""

    def make(material: Material) -> Variant:
        asked = material.recipe.method.model_copy(update={"distill": share})
        changed = Material(
            material.recipe.model_copy(update={"method": asked}), material.given, material.seed, material.place
        )
        return Variant(weighted_lesson(changed, material.store(store), material.scores(store)))

    return make


def gradual(name: str, count: int) -> Callable[[Material], Variant]:
    """A row of the study; the first half of its steps sees `count` children a parent: a chain's first link."""

    def make(material: Material) -> Variant:
        lesson = cell(name)(material).lesson
        early = [item.provenance.link == 1 and item.provenance.child < count for item in lesson.candidates]
        return Variant(lesson, np.array(early))

    return make


ROWS = {
    "independent": cell("independent"),
    "mi2rage": cell("mi2rage"),
    "mi2rage-distill-0.3": distilled("judged", 0.3),
    "mi2rage-distill-0.7": distilled("judged", 0.7),
    "mi2rage-gradual": gradual("mi2rage", 2),
    "independent-gradual": gradual("independent", 2),
    "independent-distill-0.3": distilled("independent", 0.3),
    "independent-distill-0.7": distilled("independent", 0.7),
}


def fitted_logits(
    variant: Variant, fit: FitConfig, labels: Sequence[str], validation: Sequence[Pair], evaluation: Sequence[Pair]
) -> NDArray[np.float32]:
    """What `fit_classifier` does, with a trainer that may be gradual; logits (B, labels) of the evaluation pairs."""
    lesson = variant.lesson
    accelerator = accelerator_for(fit, "cpu")
    torch.manual_seed(fit.seed)
    classifier = new_classifier(labels, fit)
    gold = classifier.label_ids([pair.sample for pair in lesson.pairs])
    targets = targets_of(gold, len(labels), fit, lesson.weights, lesson.soft_targets)
    data = PairTensors(classifier, lesson.pairs, frozen=True, reducible=True)
    held_out = PairTensors(classifier, validation, frozen=True)
    kind = Trainer if variant.early is None else GradualTrainer
    trainer = kind(classifier, accelerator, data, targets, held_out, fit)
    if isinstance(trainer, GradualTrainer):
        assert variant.early is not None
        trainer.early = torch.from_numpy(np.flatnonzero(variant.early))
    trainer.run(None, "student")
    classifier.module.eval()
    return logits_of_pairs(classifier, evaluation)[0]


class World:
    """One world and setting: material, evaluation pairs, and the logits of its students in files."""

    def __init__(self, folder: Path, given: Given, seed: int) -> None:
        self.folder, self.given, self.seed = folder, given, seed
        place = Place(folder / f"{given.value}-{seed}", Path(), "cpu")
        self.material = Material(read_recipe("micro"), given, seed, place)

    @functools.cached_property
    def evaluation(self) -> list[Pair]:
        """Validation rows of another world, which nothing was chosen by."""
        folder = self.folder / f"evaluation-{self.seed}"
        if not folder.is_dir():
            microworld.build_world(folder, seed=self.seed + 900, train=1, validation=EVALUATION_ROWS, test=1)
        return load_pairs(folder / "validation.jsonl")

    def path(self, row: str, student: int) -> Path:
        return self.material.place.folder / "students" / f"{row}-{student}.npy"

    def teach(self, row: str, student: int) -> None:
        """Fit one student, and write its logits."""
        path, material = self.path(row, student), self.material
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        variant = ROWS[row](material)
        made = time.process_time()
        seed = material.seed_of("student" if student == 0 else f"student {student}")
        fit = dataclasses.replace(
            material.recipe.student.config(material.recipe.models, seed), distill=variant.lesson.distill
        )
        logits = fitted_logits(variant, fit, material.labels, material.real["validation"], self.evaluation)
        np.save(path, logits)
        score = 100 * micro_f1(self.gold, logits.argmax(1))
        seconds = f"{made - start:.0f} + {time.process_time() - made:.0f} CPU-s"
        print(f"{self.given.value} {self.seed} {row} {student}: F1 {score:.1f}, {seconds}", flush=True)

    @functools.cached_property
    def gold(self) -> NDArray[np.int64]:
        return np.array([self.material.labels.index(str(pair.sample.label)) for pair in self.evaluation])

    def logits(self, row: str) -> NDArray[np.float64]:
        """Of the row's students, log probabilities (students, B, labels)."""
        paths = sorted(self.path(row, 0).parent.glob(f"{row}-[0-9].npy"))
        return np.stack([log_softmax(np.load(path).astype(np.float64)) for path in paths])


def micro_f1(gold: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """The field's metric; label 0 is `None`."""
    hits = ((gold == predicted) & (gold > 0)).sum()
    return float(2 * hits / max((gold > 0).sum() + (predicted > 0).sum(), 1))


def answers_of(world: World, row: str, students: int, size: int) -> NDArray[np.int64]:
    """Label indices (sets, B) by the mean probabilities of each set of `size` among the row's first students."""
    probabilities = np.exp(world.logits(row)[:students])
    sets = itertools.combinations(range(len(probabilities)), size)
    return np.stack([probabilities[list(chosen)].mean(0).argmax(1) for chosen in sets])


def compared(worlds: Sequence[World], row: str, base: str, size: int = 1) -> tuple[float, float, float]:
    """Mean F1 of `row` less that of `base`, in points, and its 95% interval.

    The interval is a bootstrap over the evaluation rows of each world and, for single students, over the students,
    common to both rows. For the mean answers of `size` students it is one over evaluation rows alone.
    """
    draws = np.random.default_rng(0)
    differences = np.zeros((RESAMPLES + 1, len(worlds)))
    for place, world in enumerate(worlds):
        students = min(len(world.logits(name)) for name in (row, base))
        answers = [answers_of(world, name, students, size) for name in (row, base)]
        for resample in range(RESAMPLES + 1):
            rows = draws.integers(0, len(world.gold), len(world.gold)) if resample else slice(None)
            who = draws.integers(0, students, students) if resample and size == 1 else range(len(answers[0]))
            mine, other = (np.mean([micro_f1(world.gold[rows], found[one][rows]) for one in who]) for found in answers)
            differences[resample, place] = mine - other
    means = 100 * differences.mean(1)
    return (means[0], *np.percentile(means[1:], [2.5, 97.5]))


def report(worlds: Sequence[World], rows: Sequence[str], base: str, size: int) -> None:
    """Print the table: F1 of single students, mean and spread, and of the mean answers of `size` of them."""
    heads = [f"{world.seed}: one student, mean of {size}" for world in worlds]
    print(f"| row | {' | '.join(heads)} | less {base}: one student | mean of {size} |")
    for row in rows:
        cells = []
        for world in worlds:
            count = len(world.logits(row))
            one, more = (
                [100 * micro_f1(world.gold, found) for found in answers_of(world, row, count, number)]
                for number in (1, size)
            )
            cells.append(f"{np.mean(one):.1f} ± {np.std(one, ddof=1):.1f} ({count}), {np.mean(more):.1f}")
        gains = ["{:+.1f} ({:.1f} to {:.1f})".format(*compared(worlds, row, base, number)) for number in (1, size)]
        print(f"| {row} | {' | '.join([*cells, *gains])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--given", type=Given, default=Given.IMAGE)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="their seeds")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    parser.add_argument("--base", choices=ROWS, default="mi2rage", help="what the report compares with")
    parser.add_argument("--together", type=int, default=3, help="students whose mean answer is reported")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [World(asked.folder, asked.given, seed) for seed in asked.worlds]
    if not asked.report:
        for student in range(asked.students):
            for world in worlds:
                for row in asked.rows:
                    world.teach(row, student)
    report(worlds, asked.rows, asked.base, asked.together)


if __name__ == "__main__":
    main()
