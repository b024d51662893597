"""One run of `bench`: which subjects, which sides, and the report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mi2rage_benchmarks.baselines import (
    ROLES,
    TorchPlace,
    TorchPrecision,
    given_sources,
    load_baselines,
    lowered,
)
from mi2rage_benchmarks.cells import CellRunner
from mi2rage_benchmarks.environment import environment
from mi2rage_benchmarks.isolated import CellTask, isolated_cell, torch_threads
from mi2rage_benchmarks.limits import Ceilings
from mi2rage_benchmarks.memory import MemoryTask, peaks_of, soak_of
from mi2rage_benchmarks.probes import Pace
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, MemoryRow, held_against
from mi2rage_benchmarks.sides import BundleSide, bundle_sides
from mi2rage_benchmarks.subjects import SUBJECTS, Subject, chosen_subjects
from mi2rage_benchmarks.work import Work, WorkOptions
from mi2rage_engines.errors import InputError, require
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt import progress

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
        backends: what runs the bundles; each is a side of its own.
        device, precision: of PyTorch's sides, see `TorchPlace`.
        subjects: names of `subjects.SUBJECTS`, or `all`; none for the graph calls of the classifier and the UNet.
        compile: whether `torch.compile` is a side too.
        batch_sizes: rows a call.
        steps: denoising steps of whole generations; None takes the bundle's own.
        feature_cache: above 1 whole generations are done once more, by bundles with feature caching.
        tokens: of a caption, at most. texts, links: of the chain.
        threads: CPU threads of every side; None takes the cores this process may use.
        repeats, budget_seconds: how long a cell is timed, see `Pace`; with neither until all is known, in 20 s at most.
        isolated: whether each cell has a process of its own, where a crash is its own too.
        again: whether the first bundle is a side twice, to see what a difference is that is none.
        memory: whether peaks of memory are measured too, of the whole calls.
        soak: classifications after which memory is looked at; None leaves it out.
        seed: of inputs.
    """

    also: tuple[Path, ...] = ()
    generator: Path | str | None = None
    captioner: Path | str | None = None
    classifier: Path | str | None = None
    random_weights: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("ort-cpu",)
    device: str = "cpu"
    precision: TorchPrecision = "fp32"
    subjects: tuple[str, ...] = ()
    compile: bool = False
    batch_sizes: tuple[int, ...] = (1, 8)
    steps: int | None = None
    feature_cache: int = 1
    tokens: int = 20
    texts: int = 64
    links: int = 2
    threads: int | None = None
    repeats: int | None = None
    budget_seconds: float | None = None
    isolated: bool = False
    again: bool = False
    memory: bool = False
    soak: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {"feature cache": self.feature_cache, "tokens": self.tokens, "texts": self.texts, "links": self.links}
        numbers |= {f"batch size {size}": size for size in self.batch_sizes}
        optional = {"repeats": self.repeats, "threads": self.threads, "steps": self.steps, "soak": self.soak}
        numbers |= {name: value for name, value in optional.items() if value is not None}
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name}: {value} is too small; expected 1 or more")
        if self.seed < 0:
            raise InputError(f"seed: came {self.seed}; expected 0 or more; give such a number")
        if self.budget_seconds is not None and not 0 < self.budget_seconds < float("inf"):
            raise InputError(f"budget: {self.budget_seconds} s is no time to measure in; expected seconds above 0")

    @property
    def options(self) -> WorkOptions:
        """What every cell is told."""
        return WorkOptions(self.steps, self.tokens, self.texts, self.links, self.seed, self.feature_cache)

    @property
    def pace(self) -> Pace:
        """How long a cell is timed."""
        if self.repeats is None and self.budget_seconds is None:
            return Pace()
        return Pace(self.repeats, self.budget_seconds)

    @property
    def place(self) -> TorchPlace:
        """Of PyTorch's sides; raises as `TorchPlace`."""
        return TorchPlace(self.device, self.precision)

    @property
    def sources(self) -> dict[str, str]:
        """The models that were named, by role; raises as `given_sources`."""
        return given_sources({role: getattr(self, role) for role in ROLES}, self.random_weights, self.seed)


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """What the cells of a run share."""

    request: BenchRequest
    place: TorchPlace
    sides: Sequence[BundleSide]
    subjects: Sequence[Subject]
    given: dict[str, str]
    threads: int

    @property
    def folders(self) -> list[Path]:
        """The bundles, each once."""
        return list(dict.fromkeys(side.folder for side in self.sides))

    def works(self) -> Iterator[tuple[Subject, int, int, Work]]:
        """Every cell's subject, batch size, number among the subject's works at that size, and work."""
        for subject in self.subjects:
            for size in _sizes(subject, self.request):
                for number, work in enumerate(subject.works(self.sides[0], size, self.request.options)):
                    yield subject, size, number, work


def run_bench(bundle: Path | str, request: BenchRequest | None = None, *, command: str | None = None) -> BenchReport:
    """Compare bundles with the models they were exported from, in one run.

    Args:
        command: what the report says it was made by.

    Raises:
        InputError: a model was not given and cannot be found, a subject is not known, or a number is out of range.
        BundleError: a bundle is not whole, or lacks what a subject takes.
        ModelFolderError: a model cannot be loaded.
        ParityError: a bundle in fp32 answers differently from the model it is compared with; where cells have processes
            of their own, that is a row.
    """
    start = time.monotonic()
    request = request or BenchRequest()
    require("torch", "train")
    threads = request.threads or usable_cores()
    given, place = request.sources, request.place
    sides = bundle_sides([Path(bundle), *request.also], threads, backends=request.backends)
    subjects = chosen_subjects(request.subjects, tuple(given), sides)
    found = environment(threads, place.device)
    if float(found.get("cores busy at start", 0)) > 0.5:
        logger.warning(
            "other processes keep %s of the machine's cores busy: the times will be long and scattered",
            found["cores busy at start"],
        )
    run = _Run(request, place, sides, subjects, given, threads)
    cells, gflops, gbps = _isolated_cells(run) if request.isolated else _cells(run)
    return BenchReport(
        cells=tuple(held_against(cell, gflops, gbps) for cell in cells),
        environment=found,
        seed=request.seed,
        gemm_gflops=gflops,
        copy_gbps=gbps,
        memory=tuple(_memory(subjects, sides, given, request)) if request.memory else (),
        soak=tuple(
            soak_of(side.name, _task(side, request).model_copy(update={"kind": "soak", "requests": request.soak}))
            for side in sides
            if request.soak is not None
        ),
        command=command,
        isolated=request.isolated,
        seconds=time.monotonic() - start,
    )


def _cells(run: _Run) -> tuple[list[BenchCell], float, float]:
    """The cells in this process, and the run's ceilings."""
    request = run.request
    roles = tuple(role for role in ROLES if any(role in subject.roles for subject in run.subjects))
    place = run.place
    models = load_baselines(roles, run.given, run.sides[0].manifest, place.device)
    sides = bundle_sides(run.folders, run.threads, backends=request.backends, again=request.again)
    cells, last = [], None
    with torch_threads(run.threads):
        ceilings = Ceilings.at(place)
        runner = CellRunner(models, lowered(models, place), place, sides, request.compile, ceilings, request.pace)
        for subject, _, _, work in run.works():
            if subject is not last:
                for side in sides:
                    side.release()
            cells.append(runner.run(subject.name, work))
            last = subject
    return cells, ceilings.gemm.gflops, ceilings.copy.gbps


def _isolated_cells(run: _Run) -> tuple[list[BenchCell], float, float]:
    """The cells, each by a process of its own, and the run's ceilings."""
    request, pace = run.request, run.request.pace
    cells, gflops, gbps = [], 0.0, 0.0
    for subject, size, number, work in progress.track(list(run.works()), "cells"):
        task = CellTask(
            bundles=tuple(map(str, run.folders)),
            backends=request.backends,
            device=request.device,
            precision=request.precision,
            sources=run.given,
            subject=subject.name,
            batch_size=size,
            work=number,
            options=request.options,
            threads=run.threads,
            again=request.again,
            compile=request.compile,
            repeats=pace.repeats,
            budget_seconds=pace.budget_seconds,
        )
        answer = isolated_cell(task)
        if answer.refused is not None:
            raise InputError(answer.refused)
        if answer.failed is not None:
            logger.warning("%s, batch %d failed: %s", work.title, work.batch_size, answer.failed)
        cells.append(answer.cell or _failed(subject, work, run.place, answer.failed or "its process gave no cell"))
        gflops, gbps = max(gflops, answer.gflops), max(gbps, answer.gbps)
    return cells, gflops, gbps


def _failed(subject: Subject, work: Work, place: TorchPlace, reason: str) -> BenchCell:
    return BenchCell(
        subject=subject.name,
        title=work.title + place.words,
        kind=work.kind,
        batch_size=work.batch_size,
        sizes=work.sizes,
        items=work.items,
        flop=0,
        sides=(),
        failed=reason,
    )


def _sizes(subject: Subject, request: BenchRequest) -> tuple[int, ...]:
    return request.batch_sizes if subject.batched else (1,)


def _task(side: BundleSide, request: BenchRequest) -> MemoryTask:
    return MemoryTask(
        kind="peak",
        bundle=str(side.folder),
        options=request.options,
        threads=request.threads,
        backend=side.backend,
        device=request.device,
        precision=request.precision,
    )


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
