"""Memory of one side, measured in a process of its own that runs nothing else: peaks, and whether requests leak.

The process is this module run as a program, told what to do by a `MemoryTask` on its standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.baselines import TorchPlace, TorchPrecision, load_baselines, lowered
from mi2rage_benchmarks.report import EAGER, MemoryRow, Soak
from mi2rage_benchmarks.subjects import SUBJECTS
from mi2rage_benchmarks.whole_calls import pictures, sentences
from mi2rage_benchmarks.work import WorkOptions
from mi2rage_engines.errors import BundleError, InputError, Mi2rageError

__all__ = ["MemoryTask", "measured", "peaks_of", "soak_of"]

_CALLS = 3
_SAMPLES = 64
"""Different requests of a soak, sent round and round."""


class MemoryTask(BaseModel):
    """What one process is to do.

    Attributes:
        kind: `peak` runs a subject's call a few times, `soak` sends single classifications.
        bundle: the side, or what PyTorch's inputs are taken from.
        sources: of PyTorch's models by role; None runs the bundle.
        work: which of the subject's works at this batch size.
        backend: what runs the bundle. device, precision: of PyTorch, see `TorchPlace`.
        requests: of a soak.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["peak", "soak"]
    bundle: str
    sources: dict[str, str] | None = None
    subject: str = "classify"
    batch_size: int = 1
    work: int = 0
    options: WorkOptions = WorkOptions()
    threads: int | None = None
    backend: str = "ort-cpu"
    device: str = "cpu"
    precision: TorchPrecision = "fp32"
    requests: int = 0


def measured(task: MemoryTask) -> dict[str, Any]:
    """What a process of its own found for a task.

    Raises:
        Mi2rageError: the process failed; the message is its last line.
    """
    process = subprocess.run(
        [sys.executable, "-m", "mi2rage_benchmarks.memory"],
        input=task.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise Mi2rageError(f"memory of {task.subject}, batch {task.batch_size}: the process failed: {said[-1][:300]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def peaks_of(tasks: Sequence[tuple[str, MemoryTask]], title: str, batch_size: int) -> tuple[MemoryRow, ...]:
    """The sides' rows of one work; the largest tensor is PyTorch's for all of them.

    Args:
        tasks: names of the sides, eager first, and what their processes do.
    """
    found: dict[str, dict[str, Any] | str] = {}
    for name, task in tasks:
        try:
            found[name] = measured(task)
        except Mi2rageError as error:
            found[name] = " ".join(str(error).split())
    eager = found.get(EAGER)
    largest = eager["largest_bytes"] if isinstance(eager, dict) else None
    return tuple(
        MemoryRow(subject=title, side=name, batch_size=batch_size, failed=answer)
        if isinstance(answer, str)
        else MemoryRow(subject=title, side=name, batch_size=batch_size, **(answer | {"largest_bytes": largest}))
        for name, answer in found.items()
    )


def soak_of(name: str, task: MemoryTask) -> Soak:
    """The resident size of a process that classifies, at a thousand requests (a tenth, if fewer) and on to the last."""
    found = measured(task)
    return Soak(side=name, requests=tuple(found["requests"]), resident_bytes=tuple(found["resident_bytes"]))


def _resident_bytes() -> int:
    from mi2rage_rt.memory_use import ProcessMemory

    return ProcessMemory().peak_bytes(lambda: None)


def _peak(task: MemoryTask) -> dict[str, Any]:
    from mi2rage_benchmarks.sides import BundleSide
    from mi2rage_rt.memory_use import ProcessMemory

    side = BundleSide(Path(task.bundle), task.threads, task.backend)
    subject = SUBJECTS[task.subject]
    work = subject.works(side, task.batch_size, task.options)[task.work]
    largest = None
    _import_libraries(torch=task.sources is not None, threads=task.threads)
    before = _resident_bytes()
    if task.sources is None:
        weights = side.weights_bytes(work.graphs(side.manifest))
        call = work.on_bundle(side)[""]
    else:
        place = TorchPlace(task.device, task.precision)
        models = lowered(load_baselines(work.roles, task.sources, side.manifest, place.device), place)
        weights = sum(_weights_bytes(model) for model in models.values())
        call = work.on_torch(models)
    loaded = _resident_bytes()
    peak = ProcessMemory().peak_bytes(lambda: [call() for _ in range(_CALLS)] and None)
    if task.sources is not None:
        largest = work.count(models)[1].largest_bytes
    return {
        "weights_bytes": weights,
        "loaded_bytes": loaded - before,
        "peak_bytes": peak - before,
        "largest_bytes": largest,
    }


def _import_libraries(*, torch: bool, threads: int | None) -> None:
    """So that their code does not count as the model's memory."""
    if not torch:
        import onnxruntime  # noqa: F401

        return
    import torch as library

    import mi2rage_training.classifier_model
    import mi2rage_training.pytorch_captioner
    import mi2rage_training.random_weights  # noqa: F401

    if threads:
        library.set_num_threads(threads)


def _weights_bytes(model: Any) -> int:
    """Of a `TorchGenerator`, `TorchCaptioner` or `LoadedClassifier`."""
    modules = [model.module] if hasattr(model, "module") else _networks(model.pipeline)
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


def _networks(pipeline: Any) -> list[Any]:
    return [part for part in pipeline.components.values() if hasattr(part, "parameters")]


def _soak(task: MemoryTask) -> dict[str, Any]:
    from mi2rage_benchmarks.sides import BundleSide

    side = BundleSide(Path(task.bundle), task.threads, task.backend)
    spec = side.manifest.classifier
    if spec is None:
        raise BundleError(f"{task.bundle}: this bundle has no classifier; leave --soak out, or export one that has")
    samples = sentences(_SAMPLES, task.options.seed, length=None)
    shown = pictures(_SAMPLES, spec.preprocessing, task.options.seed)
    runtime = side.component("classifier")
    shares = (min(1000, task.requests // 10), task.requests // 2, task.requests)
    points = sorted({max(1, share) for share in shares})
    resident = []
    for number in range(1, task.requests + 1):
        row = number % _SAMPLES
        # Every fourth request comes without an image.
        runtime.predict([samples[row]], [None if row % 4 == 3 else shown[row]])
        if number in points:
            resident.append(_resident_bytes())
    return {"requests": points, "resident_bytes": resident}


def main() -> None:
    """Do the task on standard input; the answer is the last line of standard output."""
    task = MemoryTask.model_validate_json(sys.stdin.read())
    try:
        found = _peak(task) if task.kind == "peak" else _soak(task)
    except (InputError, Mi2rageError) as error:
        sys.exit(" ".join(str(error).split()))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
