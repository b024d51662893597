"""One cell in a process of its own, so that no cell meets what an earlier one left, and none ends the run.

The process is this module run as a program, told what to do by a `CellTask` on its standard input.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.baselines import TorchPlace, TorchPrecision, load_baselines, lowered
from mi2rage_benchmarks.cells import CellRunner
from mi2rage_benchmarks.limits import Ceilings
from mi2rage_benchmarks.probes import Pace
from mi2rage_benchmarks.report import BenchCell
from mi2rage_benchmarks.sides import bundle_sides
from mi2rage_benchmarks.subjects import SUBJECTS
from mi2rage_benchmarks.work import WorkOptions
from mi2rage_engines.errors import InputError, Mi2rageError

__all__ = ["CellAnswer", "CellTask", "isolated_cell", "torch_threads"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CellTask(_Record):
    """What one process is to do.

    Attributes:
        bundles, backends: the sides, see `bundle_sides`; again: whether the first is a side twice.
        device, precision: of PyTorch's sides, see `TorchPlace`.
        sources: of PyTorch's models by role, where the user named them.
        work: which of the subject's works at this batch size.
        repeats, budget_seconds: see `Pace`.
    """

    bundles: tuple[str, ...]
    sources: dict[str, str]
    subject: str
    batch_size: int
    work: int
    options: WorkOptions
    threads: int
    backends: tuple[str, ...] = ("ort-cpu",)
    device: str = "cpu"
    precision: TorchPrecision = "fp32"
    again: bool = False
    compile: bool = False
    repeats: int | None = None
    budget_seconds: float | None = None


class CellAnswer(_Record):
    """What came of it.

    Attributes:
        cell: None where there is none.
        refused: what the user gave that cannot be used; failed: what else went wrong.
        gflops, gbps: the best rates that were seen, see `Ceilings`.
    """

    cell: BenchCell | None = None
    refused: str | None = None
    failed: str | None = None
    gflops: float = 0.0
    gbps: float = 0.0


def isolated_cell(task: CellTask) -> CellAnswer:
    """What a process of its own made of a task; one that crashes or is killed gives an answer that says so."""
    process = subprocess.run(
        [sys.executable, "-m", "mi2rage_benchmarks.isolated"],
        input=task.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode < 0:
        return CellAnswer(failed=f"its process was killed by {_signal(-process.returncode)}")
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        said = process.stderr.strip().splitlines() or ["it said nothing"]
        return CellAnswer(failed=f"its process ended with exit code {process.returncode}: {said[-1][:300]}")
    return CellAnswer.model_validate_json(lines[-1])


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    # The kernel sends this one where memory is at its end; it cannot be asked.
    return f"{name}, as the system does when memory is at its end" if name == "SIGKILL" else name


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within the block torch has so many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _answer(task: CellTask) -> CellAnswer:
    try:
        folders = [Path(bundle) for bundle in task.bundles]
        sides = bundle_sides(folders, task.threads, backends=task.backends, again=task.again)
        subject, place = SUBJECTS[task.subject], TorchPlace(task.device, task.precision)
        models = load_baselines(subject.roles, task.sources, sides[0].manifest, place.device)
        work = subject.works(sides[0], task.batch_size, task.options)[task.work]
        with torch_threads(task.threads):
            ceilings = Ceilings.at(place)
            pace = Pace(task.repeats, task.budget_seconds)
            runner = CellRunner(models, lowered(models, place), place, sides, task.compile, ceilings, pace)
            cell = runner.run(task.subject, work)
    except InputError as error:
        return CellAnswer(refused=str(error))
    except Mi2rageError as error:
        return CellAnswer(failed=" ".join(str(error).split()))
    return CellAnswer(cell=cell, gflops=ceilings.gemm.gflops, gbps=ceilings.copy.gbps)


def main() -> None:
    """Do the task on standard input; the answer is the last line of standard output."""
    task = CellTask.model_validate_json(sys.stdin.read())
    sys.stdout.write("\n" + _answer(task).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
