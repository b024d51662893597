"""One run of `bench`: which subjects, which sides, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from mi2rage_benchmarks.baselines import ROLES, given_sources, load_baselines
from mi2rage_benchmarks.cells import CellRunner, held_against
from mi2rage_benchmarks.environment import environment
from mi2rage_benchmarks.limits import GemmRate
from mi2rage_benchmarks.memory import MemoryTask, peaks_of, soak_of
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, MemoryRow
from mi2rage_benchmarks.sides import BundleSide, bundle_sides
from mi2rage_benchmarks.subjects import SUBJECTS, Subject, chosen_subjects
from mi2rage_benchmarks.work import WorkOptions
from mi2rage_engines.errors import InputError, require
from mi2rage_engines.ort_engine import usable_cores

logger = logging.getLogger(__name__)

__all__ = ["BenchRequest", "run_bench"]


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRequest:
    """What is compared, and how long.

    Attributes:
        also: further bundles of the same models, e.g. in int8.
        generator, captioner, classifier: what the bundles were exported from; what is not given is taken from the
            manifest, where that leads to a model without the network.
        random_weights: names of architectures, in their place; drawn by `seed`.
        subjects: names of `subjects.SUBJECTS`, or `all`; none for the graph calls of the classifier and the UNet.
        compile: whether `torch.compile` is a side too.
        batch_sizes: rows a call.
        steps: denoising steps of whole generations; None takes the bundle's own.
        tokens: of a caption, at most. texts, links: of the chain.
        threads: CPU threads of every side; None takes the cores this process may use.
        repeats: timed calls a side and cell.
        memory: whether peaks of memory are measured too, of the whole calls.
        soak: classifications after which memory is looked at; None leaves it out.
        seed: of inputs.
    """

    also: tuple[Path, ...] = ()
    generator: Path | str | None = None
    captioner: Path | str | None = None
    classifier: Path | str | None = None
    random_weights: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    compile: bool = False
    batch_sizes: tuple[int, ...] = (1, 8)
    steps: int | None = None
    tokens: int = 20
    texts: int = 64
    links: int = 2
    threads: int | None = None
    repeats: int = 30
    memory: bool = False
    soak: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {"repeats": self.repeats, "tokens": self.tokens, "texts": self.texts, "links": self.links}
        numbers |= {f"batch size {size}": size for size in self.batch_sizes}
        optional = {"threads": self.threads, "steps": self.steps, "soak": self.soak}
        numbers |= {name: value for name, value in optional.items() if value is not None}
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name}: {value} is too small; expected 1 or more")

    @property
    def options(self) -> WorkOptions:
        """What every cell is told."""
        return WorkOptions(self.steps, self.tokens, self.texts, self.links, self.seed)

    @property
    def sources(self) -> dict[str, str]:
        """The models that were named, by role; raises as `given_sources`."""
        return given_sources({role: getattr(self, role) for role in ROLES}, self.random_weights, self.seed)


def run_bench(bundle: Path | str, request: BenchRequest | None = None) -> BenchReport:
    """Compare bundles with the models they were exported from, in one run.

    Raises:
        InputError: a model was not given and cannot be found, a subject is not known, or a number is out of range.
        BundleError: a bundle is not whole, or lacks what a subject takes.
        ModelFolderError: a model cannot be loaded.
        ParityError: a bundle in fp32 answers differently from the model it is compared with.
    """
    request = request or BenchRequest()
    require("torch", "train")
    threads = request.threads or usable_cores()
    given = request.sources
    sides = bundle_sides([Path(bundle), *request.also], threads)
    subjects = chosen_subjects(request.subjects, tuple(given), sides)
    roles = tuple(role for role in ROLES if any(role in subject.roles for subject in subjects))
    models = load_baselines(roles, given, sides[0].manifest)
    found = environment(threads)
    if float(found.get("cores busy at start", 0)) > 0.5:
        logger.warning(
            "other processes keep %s of the machine's cores busy: the times will be long and scattered",
            found["cores busy at start"],
        )
    with _torch_threads(threads):
        runner = CellRunner(models, sides, request.compile, GemmRate(), request.repeats)
        cells = [cell for subject in subjects for cell in _cells(subject, runner, request)]
    del models
    return BenchReport(
        cells=tuple(held_against(cell, runner.gemm.gflops) for cell in cells),
        environment=found,
        seed=request.seed,
        gemm_gflops=runner.gemm.gflops,
        memory=tuple(_memory(subjects, sides, given, request)) if request.memory else (),
        soak=tuple(
            soak_of(side.name, _task(side, request).model_copy(update={"kind": "soak", "requests": request.soak}))
            for side in sides
            if request.soak is not None
        ),
    )


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sizes(subject: Subject, request: BenchRequest) -> tuple[int, ...]:
    return request.batch_sizes if subject.batched else (1,)


def _cells(subject: Subject, runner: CellRunner, request: BenchRequest) -> Iterator[BenchCell]:
    for size in _sizes(subject, request):
        for work in subject.works(runner.sides[0], size, request.options):
            yield runner.run(subject.name, work)
    for side in runner.sides:
        side.release()


def _task(side: BundleSide, request: BenchRequest) -> MemoryTask:
    return MemoryTask(kind="peak", bundle=str(side.folder), options=request.options, threads=request.threads)


def _memory(
    subjects: Sequence[Subject], sides: Sequence[BundleSide], given: dict[str, str], request: BenchRequest
) -> Iterator[MemoryRow]:
    """Of the whole calls among the subjects, or, where there are none, of those on the same components."""
    roles = {role for subject in subjects for role in subject.roles}
    alike = [SUBJECTS[name] for name in ("classify", "generate", "caption") if set(SUBJECTS[name].roles) <= roles]
    for subject in [subject for subject in subjects if subject.kind == "whole"] or alike:
        for size in _sizes(subject, request):
            for number, work in enumerate(subject.works(sides[0], size, request.options)):
                change = {"subject": subject.name, "batch_size": size, "work": number}
                tasks = [(side.name, _task(side, request).model_copy(update=change)) for side in sides]
                eager = tasks[0][1].model_copy(update={"sources": given})
                yield from peaks_of([(EAGER, eager), *tasks], work.title, work.batch_size)
