"""Running a study: every setting and seed is a job, every trained student a cached cell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_engines.errors import DataError, InputError, Mi2rageError
from mi2rage_rt.files import atomic_text
from mi2rage_rt.progress import Steps, be_quiet, steps
from mi2rage_training.calibration import log_softmax
from mi2rage_training.chain_config import Given
from mi2rage_training.fit import fit_classifier, logits_of_pairs
from mi2rage_training.study_cells import Cell, Lesson, cells_of, comparisons_of
from mi2rage_training.study_material import Material, Place
from mi2rage_training.study_measures import cue_rate, diagnostics_of, job_measures
from mi2rage_training.study_recipe import Recipe
from mi2rage_training.study_report import write_study_report
from mi2rage_training.study_results import CellResult, StudyResult

logger = logging.getLogger(__name__)

__all__ = ["StudyConfig", "run_study"]

_RECIPE_NAME = "recipe.json"


@dataclasses.dataclass(frozen=True, slots=True)
class StudyConfig:
    """How a study runs.

    Attributes:
        out: the folder of everything; a study that was stopped goes on there.
        data: what the recipe's files are relative to.
        device: of models and fits.
        jobs: processes, each with one thread where there are several.
        command: what the report says was run.
    """

    out: Path
    data: Path = Path()
    device: str = "cpu"
    jobs: int = 1
    command: str = ""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"jobs: came {self.jobs}; expected 1 or more")


def run_study(recipe: Recipe, config: StudyConfig) -> StudyResult:
    """Train and test every row of the recipe's table for every seed, and write the report.

    Whatever is finished (worlds, shards of stores, teachers' scores, students) is read again by a later call with the
    same recipe, which ends with the same table.

    Raises:
        InputError: `out` holds a study of another recipe, or something else.
        DataError: the recipe's data cannot be used.
    """
    cells = cells_of(recipe.cells)
    _check_recipe(recipe, config.out)
    start = time.perf_counter()
    jobs = [(recipe, given, seed, config) for given in recipe.given for seed in recipe.seeds]
    # The seeds of both settings in turn: a study that is stopped early has some of each.
    jobs.sort(key=lambda job: job[0].seeds.index(job[2]))
    paths = [_cell_path(config.out, given, cell, seed) for _, given, seed, _ in jobs for cell in cells]
    with steps("study", len(paths)) as bar, _counting(paths, bar):
        if config.jobs == 1:
            for job in jobs:
                _run_job(*job)
        else:
            _run_in_processes(jobs, config.jobs)
    result = StudyResult(
        recipe=recipe.name,
        title=recipe.title,
        command=config.command,
        seeds=list(recipe.seeds),
        cells=[cell.spec for cell in cells],
        results=[
            CellResult.model_validate_json(path.read_text(encoding="utf-8"))
            for given in recipe.given
            for cell in cells
            for seed in recipe.seeds
            if (path := _cell_path(config.out, given, cell, seed)).is_file()
        ],
        comparisons=comparisons_of(cells, recipe.given),
        diagnostics=diagnostics_of(_measures(recipe, config.out)),
        settings=recipe.model_dump(mode="json"),
        environment=_environment(config),
        seconds=round(time.perf_counter() - start, 1),
    )
    write_study_report(result, config.out)
    return result


@contextlib.contextmanager
def _counting(paths: Sequence[Path], bar: Steps) -> Iterator[None]:
    """Within the block the bar shows how many cells are there, whichever process makes them."""
    over = threading.Event()
    seen: set[Path] = set()

    def count() -> None:
        while True:
            new = {path for path in paths if path not in seen and path.is_file()}
            bar.advance(len(new))
            seen.update(new)
            if over.wait(1.0):
                return

    watcher = threading.Thread(target=count, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _check_recipe(recipe: Recipe, out: Path) -> None:
    """Begin a study in `out`, or find that one of this recipe was begun there."""
    path = out / _RECIPE_NAME
    described = recipe.model_dump(mode="json")
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: exists and is no study; expected a new folder; give another --out")
        with atomic_text(path) as file:
            json.dump(described, file, indent=2)
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); expected the recipe; begin again in another folder") from error
    differing = sorted(key for key in begun.keys() | described.keys() if begun.get(key) != described.get(key))
    if differing:
        changes = "; ".join(f"{key}: was {begun.get(key)!r}, is {described.get(key)!r}" for key in differing)
        raise InputError(f"{out}: is a study of another recipe ({changes}); use the same to go on, or another --out")


def _run_in_processes(jobs: Sequence[tuple[Recipe, Given, int, StudyConfig]], count: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(_run_job, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise Mi2rageError(
                "study: one of its processes was killed, as the system does when memory is at its end; expected all to "
                "last; what was finished is kept; give fewer --jobs, and else the same command again"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker() -> None:
    """One thread a process; and a process whose parent was killed ends too, so that nobody works beside a later run."""
    import torch

    torch.set_num_threads(1)
    be_quiet()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cell_path(out: Path, given: Given, cell: Cell, seed: int) -> Path:
    return out / "cells" / given.value / cell.spec.name / f"seed-{seed}.json"


def _job_folder(out: Path, given: Given, seed: int) -> Path:
    return out / "jobs" / f"{given.value}-{seed}"


def _run_job(recipe: Recipe, given: Given, seed: int, config: StudyConfig) -> None:
    """All rows of one setting and seed, and what is measured beside them."""
    folder = _job_folder(config.out, given, seed)
    material = Material(recipe, given, seed, Place(folder, config.data, config.device))
    for cell in cells_of(recipe.cells):
        path = _cell_path(config.out, given, cell, seed)
        if path.is_file():
            continue
        result = _run_cell(cell, material)
        with atomic_text(path) as file:
            file.write(result.model_dump_json(indent=1) + "\n")
        logger.info("%s given, seed %d: %s, %d pairs", given.value, seed, cell.spec.title, result.pairs)
    measures = folder / "measures.json"
    if not measures.is_file():
        with atomic_text(measures) as file:
            json.dump(job_measures(material), file, indent=1)


def _run_cell(cell: Cell, material: Material) -> CellResult:
    lesson = cell.lesson(material)
    start = time.perf_counter()
    predicted, best_epoch = _taught(lesson, material, cell.spec.title)
    test = material.real["test"]
    rate = cue_rate(
        material, lesson.candidates, None if lesson.weights is None else lesson.weights[-len(lesson.candidates) :]
    )
    return CellResult(
        setting=material.given.value,
        cell=cell.spec.name,
        seed=material.seed,
        pairs=len(lesson.pairs),
        best_epoch=best_epoch,
        seconds=round(time.perf_counter() - start, 1),
        gold=[str(pair.sample.label) for pair in test],
        predicted=predicted,
        measures={} if rate is None else {"cue_rate": rate},
    )


def _taught(lesson: Lesson, material: Material, title: str) -> tuple[list[str], int]:
    """The students' labels for the test pairs, and the first one's best epoch on the validation pairs."""
    splits = {split: material.unimodal(pairs) if lesson.unimodal else pairs for split, pairs in material.real.items()}
    answers, best_epochs = [], []
    for number in range(material.recipe.students):
        seed = material.seed_of("student") if number == 0 else material.seed_of(f"student {number}")
        config = material.recipe.student.config(material.recipe.models, seed)
        fitted = fit_classifier(
            lesson.pairs,
            dataclasses.replace(config, distill=lesson.distill),
            validation=splits["validation"],
            labels=material.labels,
            device=material.place.device,
            description=title,
            weights=lesson.weights,
            soft_targets=lesson.soft_targets,
        )
        (logits,) = logits_of_pairs(fitted.classifier, splits["test"])
        answers.append(np.exp(log_softmax(logits)))
        best_epochs.append(fitted.best_epoch)
    chosen = np.argmax(np.mean(answers, axis=0), axis=1)
    return [material.labels[index] for index in chosen], best_epochs[0]


def _measures(recipe: Recipe, out: Path) -> dict[Given, list[dict[str, Any]]]:
    found: dict[Given, list[dict[str, Any]]] = {}
    for given in recipe.given:
        paths = [_job_folder(out, given, seed) / "measures.json" for seed in recipe.seeds]
        found[given] = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return found


def _environment(config: StudyConfig) -> dict[str, str]:
    import torch

    from mi2rage_rt import __version__

    return {
        "mi2rage-rt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "jobs": str(config.jobs),
        "device": config.device,
    }
