"""The whole line on the embedded micro-world: from labelled sentences to a deployed classifier, and a page about it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mi2rage_benchmarks.bench import BenchRequest, run_bench
from mi2rage_benchmarks.report import BenchReport
from mi2rage_benchmarks.standalone import StandaloneRun, run_standalone
from mi2rage_engines.bundle import Manifest
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.request import ExportRequest
from mi2rage_rt.files import atomic_text, check_absent
from mi2rage_rt.noise import seed_from
from mi2rage_rt.samples import read_samples, write_samples
from mi2rage_training import microworld
from mi2rage_training.chain import Given, synthesize
from mi2rage_training.evaluation import evaluate_pairs
from mi2rage_training.fit import fit_classifier
from mi2rage_training.metrics import RelationMetrics
from mi2rage_training.microworld.probe import AttributeProbe
from mi2rage_training.pairs import Pair, load_pairs, pairs_from_candidates
from mi2rage_training.pytorch_captioner import TorchCaptioner
from mi2rage_training.pytorch_models import TorchGenerator
from mi2rage_training.selection import Selection, SelectionConfig, select
from mi2rage_training.store import Candidate, read_store
from mi2rage_training.study_recipe import read_recipe
from mi2rage_training.teacher import TeacherScores

__all__ = ["DemoConfig", "DemoResult", "Student", "run_demo"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class DemoConfig:
    """Sizes of the demo.

    Attributes:
        train, validation, test: real samples of each split; the training images are hidden from MI2RAGE.
        links: of each chain.
        recipe: the study's recipe that students and teachers are fitted by.
        bench_repeats: timed calls a side.
        seed: of everything.
    """

    train: int = 1200
    validation: int = 300
    test: int = 600
    links: int = 3
    recipe: str = "micro"
    bench_repeats: int = 30
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Student:
    """One row of the comparison: what the student was fitted on, and how it does on the real test pairs."""

    name: str
    explanation: str
    pairs: int
    metrics: RelationMetrics


@dataclasses.dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo did.

    Attributes:
        seconds: wall time of each step, in order.
        cue_rates: share (0 to 1) of the pictures that show the object which the label rests on, by the probe of
            `microworld.probe`: first of the real pictures, then of each link's.
    """

    config: DemoConfig
    out: Path
    world: Path
    candidates: tuple[Candidate, ...]
    selection: Selection
    students: tuple[Student, ...]
    manifest: Manifest
    standalone: StandaloneRun
    bench: BenchReport
    seconds: dict[str, float]
    cue_rates: tuple[float, ...]

    @property
    def scores(self) -> TeacherScores:
        """The teachers' scores; the demo's policy always asks for them."""
        assert self.selection.scores is not None
        return self.selection.scores


class _Steps:
    """Says on stderr what is being done, and keeps how long it took."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    def run(self, title: str, work: Callable[[], T]) -> T:
        print(f"[{len(self.seconds) + 1}/{self.total}] {title}", file=sys.stderr, flush=True)  # noqa: T201
        start = time.perf_counter()
        result = work()
        self.seconds[title] = time.perf_counter() - start
        print(f"      {self.seconds[title]:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
        return result


def _fit_student(
    name: str, explanation: str, pairs: Sequence[Pair], real: dict[str, list[Pair]], config: DemoConfig, folder: Path
) -> Student:
    recipe = read_recipe(config.recipe)
    fit = recipe.student.config(recipe.models, seed_from(config.seed, "student") % 2**31)
    text_only = all(pair.image is None for pair in pairs)
    splits = {split: [Pair(pair.sample) for pair in rows] if text_only else rows for split, rows in real.items()}
    fitted = fit_classifier(
        pairs, fit, validation=splits["validation"], labels=microworld.LABELS, description=f"train: {name}"
    )
    folder.mkdir(parents=True)
    fitted.classifier.save(folder)
    return Student(name, explanation, len(pairs), evaluate_pairs(fitted.classifier, splits["test"]))


def _students(
    candidates: Sequence[Candidate],
    direct: Sequence[Candidate],
    selection: Selection,
    real: dict[str, list[Pair]],
    config: DemoConfig,
    out: Path,
) -> tuple[Student, ...]:
    kept = [candidate for candidate, keep in zip(candidates, selection.kept, strict=True) if keep]
    rows: list[tuple[str, str, Sequence[Pair]]] = [
        ("text only", "the labelled sentences, no image", [Pair(pair.sample) for pair in real["train"]]),
        ("direct", "one image made from each sentence alone", pairs_from_candidates(direct)),
        ("MI2RAGE", "the chain's images that the teacher kept", pairs_from_candidates(kept)),
        ("real pairs", "the sentences with their real images (not available to MI2RAGE)", real["train"]),
    ]
    return tuple(
        _fit_student(name, explanation, pairs, real, config, out / "students" / name.replace(" ", "-"))
        for name, explanation, pairs in rows
    )


def _cue_rates(world: Path, candidates: Sequence[Candidate], real: Sequence[Pair], links: int) -> tuple[float, ...]:
    facts = microworld.read_facts(world)
    probe = AttributeProbe.load()

    def rate(pictures: Sequence[tuple[str, Pair]]) -> float:
        found = probe.cues([image for _, pair in pictures if (image := pair.load()) is not None])
        return sum(cue == facts[parent].cue for cue, (parent, _) in zip(found, pictures, strict=True)) / len(pictures)

    made = [(candidate.provenance, Pair(candidate.sample, candidate.image)) for candidate in candidates]
    by_link = [[(at.parent, pair) for at, pair in made if at.link == link] for link in range(1, links + 1)]
    return (rate([(pair.sample.id, pair) for pair in real]), *map(rate, by_link))


def run_demo(out: Path, config: DemoConfig, *, force: bool = False) -> DemoResult:
    """Run every step into the folder `out`; the steps' stores, models and bundle stay there.

    Raises:
        InputError: `out` exists and `force` is off.
    """
    check_absent(out, force=force)
    shutil.rmtree(out, ignore_errors=True)
    world, store, bundle = out / "world", out / "candidates", out / "bundle"
    steps = _Steps(7)

    def make_world() -> None:
        microworld.build_world(
            world, seed=config.seed, train=config.train, validation=config.validation, test=config.test
        )
        # What MI2RAGE is given: sentences and labels, no image.
        write_samples(
            out / "sentences.jsonl",
            (dataclasses.replace(sample, image=None) for sample in read_samples(world / "train.jsonl")),
        )

    recipe = read_recipe(config.recipe)
    prompts = recipe.chain_of(Given.TEXT)

    def make_candidates() -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
        generator = TorchGenerator.from_folder("embedded", device="cpu")
        captioner = TorchCaptioner.from_folder("embedded", device="cpu")
        sentences = load_pairs(out / "sentences.jsonl")
        chain = prompts.config(Given.TEXT, config.seed, links=config.links, width=1)
        alone = prompts.config(Given.TEXT, config.seed, links=1, width=1).without_labels()
        synthesize(sentences, store, generator, captioner, chain)
        synthesize(sentences, out / "direct", generator, captioner, alone)
        return tuple(read_store(store)), tuple(read_store(out / "direct"))

    teacher = recipe.teacher.teacher(recipe.models, seed_from(config.seed, "teacher") % 2**31, "cpu")
    steps.run("make the micro-world: labelled sentences, and real pairs to test on", make_world)
    candidates, direct = steps.run("synthesize: chains of images and captions from each sentence", make_candidates)
    selection = steps.run(
        "select: cross-fitted teachers score every candidate in nats",
        lambda: select(store, out / "selected", SelectionConfig(teacher=teacher)),
    )
    real = {split: load_pairs(world / f"{split}.jsonl") for split in ("train", "validation", "test")}
    students = steps.run(
        "train and evaluate four students", lambda: _students(candidates, direct, selection, real, config, out)
    )
    classifier = out / "students" / "MI2RAGE"
    manifest = steps.run(
        "export generator, captioner and classifier to ONNX, parity checked",
        lambda: export_bundle(bundle, ExportRequest(generator="embedded", captioner="embedded", classifier=classifier)),
    )
    standalone = steps.run(
        "run the bundle without PyTorch: generate, caption, predict",
        lambda: run_standalone(bundle, world / "test.jsonl", out / "standalone"),
    )
    bench = steps.run(
        "bench against PyTorch",
        lambda: run_bench(
            bundle, BenchRequest(classifier=classifier, generator="embedded", repeats=config.bench_repeats)
        ),
    )
    cue_rates = _cue_rates(world, candidates, real["train"], config.links)
    result = DemoResult(
        config, out, world, candidates, selection, students, manifest, standalone, bench, steps.seconds, cue_rates
    )
    with atomic_text(out / "bench.json") as file:
        file.write(bench.model_dump_json(indent=1) + "\n")
    with atomic_text(out / "demo.json") as file:
        json.dump(summary_from(result), file, indent=2)
    return result


def summary_from(result: DemoResult) -> dict[str, Any]:
    """The demo's numbers as JSON values; all but `seconds` are the same in every run of a seed on one machine."""
    return {
        "config": dataclasses.asdict(result.config),
        "candidates": len(result.candidates),
        "kept": int(result.selection.kept.sum()),
        "bound_nats": result.scores.bound_nats,
        "real_bound_nats": result.scores.real_bound_nats,
        "label_entropy_nats": result.scores.label_entropy_nats,
        "cue_rates": result.cue_rates,
        "students": {
            student.name: {
                "pairs": student.pairs,
                "precision": student.metrics.precision,
                "recall": student.metrics.recall,
                "f1": student.metrics.f1,
                "accuracy": student.metrics.accuracy,
            }
            for student in result.students
        },
        "parity": [record.model_dump() for record in result.manifest.parity],
        "standalone": {
            "f1": result.standalone.metrics.f1,
            "modules_loaded": len(result.standalone.modules),
            "torch_loaded": result.standalone.torch_loaded,
        },
        "seconds": result.seconds,
    }
