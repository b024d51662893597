"""Latency of the exported graphs on ONNX Runtime against the same modules in PyTorch eager, fp32, on the CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.probes import Spread, Timing, environment, time_alternating
from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.engine import Array
from mi2rage_engines.errors import BundleError, InputError, ParityError, require
from mi2rage_engines.ort_engine import OrtEngine, usable_cores
from mi2rage_engines.spec import GraphSpec

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph

logger = logging.getLogger(__name__)

__all__ = ["BenchCell", "BenchReport", "run_bench"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BenchCell(_Record):
    """One graph at one batch size.

    Attributes:
        name: what was called. sizes: of the graph's dynamic axes.
        difference: largest difference of the two answers over max(1, largest value), before anything was timed.
        ratio: PyTorch's time over ONNX Runtime's; above 1 ONNX Runtime is faster.
    """

    name: str
    batch_size: int
    sizes: dict[str, int]
    difference: float
    pytorch: Timing
    onnxruntime: Timing
    ratio: Spread


class BenchReport(_Record):
    """All cells, and the environment they were measured in."""

    cells: tuple[BenchCell, ...]
    environment: dict[str, str]
    seed: int


def run_bench(
    bundle: Path | str,
    *,
    classifier: Path | str | None = None,
    generator: Path | str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    repeats: int = 30,
    seed: int = 0,
) -> BenchReport:
    """Compare the classifier's call and the generator's UNet step with the models they were exported from.

    Args:
        bundle: the exported models.
        classifier, generator: what the bundle was exported from; at least one.
        batch_sizes: rows a call.
        threads: CPU threads of either side; by default the cores this process may use.
        repeats: timed calls a side and cell.
        seed: of the inputs.

    Raises:
        InputError: no model was given, or a number is out of range.
        BundleError: the bundle is not whole, or lacks a component that a model was given for.
        ModelFolderError: a model cannot be loaded.
        ParityError: a graph answers differently from the model it is compared with.
    """
    _check_arguments(classifier, generator, batch_sizes, threads, repeats)
    require("torch", "train")
    folder = Path(bundle)
    threads = threads or usable_cores()
    manifest = open_manifest(folder)
    found = environment(threads)
    if float(found.get("cores busy at start", 0)) > 0.5:
        logger.warning(
            "other processes keep %s of the machine's cores busy: the times will be long and scattered",
            found["cores busy at start"],
        )
    cells = []
    with _torch_threads(threads):
        for name, graph, spec in _subjects(folder, manifest, classifier, generator):
            _check_fits(folder, name, graph, spec)
            engine = OrtEngine(folder / spec.file, providers=("CPUExecutionProvider",), threads=threads)
            cells += [_cell(name, graph, spec, engine, size, repeats, seed) for size in batch_sizes]
    return BenchReport(cells=tuple(cells), environment=found, seed=seed)


def _check_arguments(
    classifier: object, generator: object, batch_sizes: Sequence[int], threads: int | None, repeats: int
) -> None:
    if classifier is None and generator is None:
        raise InputError(
            "nothing to compare with: no model was given; expected --classifier or --generator, or both, "
            "the models that the bundle was exported from"
        )
    numbers = {"repeats": repeats, "threads": 1 if threads is None else threads}
    numbers |= {f"batch size {size}": size for size in batch_sizes}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name}: {value} is too small; expected 1 or more")


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _subjects(
    folder: Path, manifest: Manifest, classifier: Path | str | None, generator: Path | str | None
) -> Iterator[tuple[str, Graph, GraphSpec]]:
    """The graphs to time: their names, how to ask PyTorch, and their files in the bundle."""
    from mi2rage_export.families import family_of

    if classifier is not None:
        from mi2rage_training.classifier_model import load_classifier

        if manifest.classifier is None:
            raise _lacks(folder, "classifier")
        loaded = load_classifier(classifier)
        (graph,) = family_of("classifier", loaded).graphs(loaded)
        yield "classifier", graph, manifest.classifier.graphs["classifier"]
    if generator is not None:
        import torch

        from mi2rage_training.pytorch_models import TorchGenerator

        if manifest.generator is None:
            raise _lacks(folder, "generator")
        model = TorchGenerator.from_folder(generator, device="cpu", dtype=torch.float32)
        graphs = family_of("generator", model).graphs(model)
        unet = next(graph for graph in graphs if graph.name == "generator/unet")
        yield "generator step (UNet)", unet, manifest.generator.graphs["unet"]


def _check_fits(folder: Path, name: str, graph: Graph, spec: GraphSpec) -> None:
    wanted, found = [item.spec for item in graph.inputs], list(spec.inputs)
    for mine, theirs in zip(wanted, found, strict=False):
        if (mine.name, mine.shape) != (theirs.name, theirs.shape):
            raise BundleError(
                f"{folder}: its {name} takes {theirs.name} {theirs.shape}, the given model {mine.name} {mine.shape}; "
                "expected the model that the bundle was exported from; give that one, or export again"
            )


def _lacks(folder: Path, component: str) -> BundleError:
    return BundleError(
        f"{folder}: this bundle has no {component}; leave --{component} out, or export a bundle that has one"
    )


def _cell(
    name: str, graph: Graph, spec: GraphSpec, engine: OrtEngine, batch_size: int, repeats: int, seed: int
) -> BenchCell:
    import torch

    from mi2rage_export.graphs import random_inputs

    # Of the sizes that the export was checked at, the last but one is the usual one.
    sizes = dict(graph.checked[-2]) | {"batch": batch_size}
    arrays = random_inputs(graph, sizes, seed)
    tensors = [torch.from_numpy(arrays[item.name]) for item in graph.inputs]

    def run_torch() -> tuple[Any, ...]:
        with torch.inference_mode():
            return graph.reference(*tensors)

    def run_engine() -> dict[str, Array]:
        return engine.run(arrays)

    difference = _compared(name, graph, spec, run_engine, run_torch)
    label = f"{name}, batch {batch_size}"
    pytorch, onnxruntime = time_alternating(run_torch, run_engine, repeats=repeats, label=label)
    return BenchCell(
        name=name,
        batch_size=batch_size,
        sizes=sizes,
        difference=difference,
        pytorch=pytorch,
        onnxruntime=onnxruntime,
        ratio=pytorch.ratio_to(onnxruntime),
    )


def _compared(
    name: str,
    graph: Graph,
    spec: GraphSpec,
    run_engine: Callable[[], dict[str, Array]],
    run_torch: Callable[[], tuple[Any, ...]],
) -> float:
    from mi2rage_export.parity import BOUNDS, difference

    bound = BOUNDS[spec.precision].max_abs_scaled

    found = run_engine()
    pairs = zip(graph.outputs, run_torch(), strict=True)
    worst = max(difference(found[output.name], tensor.numpy()).max_abs_scaled for output, tensor in pairs)
    if bound is not None and not worst <= bound:
        raise ParityError(
            f"{name}: the bundle's graph and the PyTorch model differ by {worst:.3g}, the bound is "
            f"{bound:.3g}; a comparison of their speed would mean nothing; expected the model that the "
            "bundle was exported from; give that one, or export again"
        )
    return worst
