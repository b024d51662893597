"""Is the export the model it came from? Graphs against the unpatched modules, components against PyTorch's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mi2rage_engines.bundle import ParityRecord
from mi2rage_engines.errors import ParityError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_rt.noise import rng, seed_from
from mi2rage_rt.samples import Sample, Span

if TYPE_CHECKING:
    from mi2rage_rt.captioner import RuntimeCaptioner
    from mi2rage_rt.classifier import RuntimeClassifier
    from mi2rage_rt.generator import RuntimeGenerator
    from mi2rage_rt.protocols import Image
    from mi2rage_training.classifier_model import LoadedClassifier
    from mi2rage_training.pytorch_captioner import TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["check_captioner", "check_classifier", "check_generator", "check_graph", "demand", "difference"]

GRAPH_TOLERANCE = 1e-4
"""fp32: largest difference, relative to the largest value of the output where that is above 1."""

LOGIT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1 / 255
"""Mean absolute difference of pixels, 0 to 1."""

_WORDS = ("a", "man", "near", "the", "red", "car", "with", "two", "dogs", "at", "park", "#team", "@news", "RT", "!")
_PROMPTS = ("", "a photo of a dog", "two men near a red car in the park", "RT @news: what a game! #team")


def demand(record: ParityRecord) -> ParityRecord:
    """The record itself, if its bound holds.

    Raises:
        ParityError: it does not; the message has subject, measure, value and bound.
    """
    if not record.passed:
        raise ParityError(
            f"{record.subject}: {record.measure} is {record.value:.3g} over {record.cases} inputs, the bound is "
            f"{record.threshold:.3g}; the exported model answers differently from the PyTorch model, nothing was "
            "written; report it with the model's name and the versions that 'mi2rage-rt doctor' prints"
        )
    return record


def _record(subject: str, measure: str, value: float, threshold: float, cases: int, *, least: bool = False) -> Any:
    """`least`: the threshold is the smallest value allowed instead of the largest. NaN never passes."""
    passed = value >= threshold if least else value <= threshold
    # JSON has no infinity; the largest float stands for "not comparable".
    shown = float(value) if np.isfinite(value) else float(np.finfo(np.float64).max)
    return ParityRecord(
        subject=subject, measure=measure, value=shown, threshold=threshold, passed=bool(passed), cases=cases
    )


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference over max(1, largest expected value); infinite where shapes or finiteness differ."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    if not expected.size:
        return 0.0
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


def check_graph(graph: Graph, path: Path, *, threads: int | None = None, seed: int = 0) -> ParityRecord:
    """Compare an exported file with the unpatched PyTorch model at the smallest, usual and largest sizes.

    Args:
        graph: what was exported; its `reference` is asked for the truth.
        path: the `.onnx` file.
        threads: CPU threads of ONNX Runtime.
        seed: of the random inputs.
    """
    engine = OrtEngine(path, providers=("CPUExecutionProvider",), threads=threads)
    worst = 0.0
    for case, sizes in enumerate(graph.checked):
        arrays = random_inputs(graph, sizes, seed_from("parity", graph.name, seed, case))
        found = engine.run(arrays)
        with torch.inference_mode():
            expected = graph.reference(*(torch.from_numpy(arrays[item.name]) for item in graph.inputs))
        for spec, tensor in zip(graph.outputs, expected, strict=True):
            worst = max(worst, difference(found[spec.name], tensor.numpy()))
    record: ParityRecord = _record(graph.name, "max_abs_scaled", worst, GRAPH_TOLERANCE, len(graph.checked))
    return record


def check_generator(runtime: RuntimeGenerator, reference: TorchGenerator, *, seed: int = 0) -> ParityRecord:
    """Images of the same prompts and seeds, runtime against the diffusers pipeline."""
    seeds = [seed_from("parity", seed, row) for row in range(len(_PROMPTS))]
    found = runtime.generate(_PROMPTS, seeds).astype(np.float64)
    expected = reference.generate(_PROMPTS, seeds).astype(np.float64)
    value = float(np.abs(found - expected).mean() / 255) if found.shape == expected.shape else float("inf")
    record: ParityRecord = _record("generator", "mean_abs_pixel", value, PIXEL_TOLERANCE, len(_PROMPTS))
    return record


def _images(count: int, height: int, width: int, seed: int) -> list[Image]:
    """Random colour fields of several sizes, uint8 (H, W, 3), smooth enough to look like something."""
    images: list[Image] = []
    for row in range(count):
        draws = rng(seed_from("parity image", seed, row))
        coarse = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        scale = 1 + row % 3
        tall, wide = max(4, height * scale // 2), max(4, width * (1 + (row + 1) % 3) // 2)
        images.append(coarse[np.ix_(np.arange(tall) * 4 // tall, np.arange(wide) * 4 // wide)])
    return images


def check_captioner(
    runtime: RuntimeCaptioner, reference: TorchCaptioner, *, seed: int = 0, cases: int = 8
) -> ParityRecord:
    """Greedy captions token for token, runtime against transformers' `generate`, without and with a prefix."""
    size = reference.preprocessing
    images = _images(cases, size.height, size.width, seed)
    equal = 0
    for prefix in ("", "a photo of"):
        prompts = [reference.prompt_ids(prefix)] * cases
        found, expected = runtime.generate_ids(images, prompts), reference.generate_ids(images, prompts)
        equal += sum(mine == theirs for mine, theirs in zip(found, expected, strict=True))
    record: ParityRecord = _record("captioner", "caption_agreement", equal / (2 * cases), 1.0, 2 * cases, least=True)
    return record


def _samples(count: int, seed: int) -> list[Sample]:
    samples = []
    for row in range(count):
        draws = rng(seed_from("parity sentence", seed, row))
        length = int(draws.integers(4, 24))
        tokens = tuple(_WORDS[index] for index in draws.integers(0, len(_WORDS), length))
        first, second = sorted(int(place) for place in draws.choice(length, 2, replace=False))
        head, tail = Span(first, first + 1), Span(second, second + 1)
        samples.append(Sample(id=str(row), tokens=tokens, head=head, tail=tail))
    return samples


def check_classifier(
    runtime: RuntimeClassifier, reference: LoadedClassifier, *, seed: int = 0, cases: int = 16
) -> ParityRecord:
    """Logits of random sentences and images (every fourth missing), runtime against PyTorch."""
    size = reference.preprocessing
    images: Sequence[Image | None] = [
        None if row % 4 == 3 else image for row, image in enumerate(_images(cases, size.height, size.width, seed))
    ]
    samples = _samples(cases, seed)
    found, expected = runtime.logits(samples, images), reference.logits(samples, images)
    comparable = found.shape == expected.shape and np.isfinite(found).all() and np.isfinite(expected).all()
    value = float(np.abs(found - expected).max()) if comparable else float("inf")
    record: ParityRecord = _record("classifier", "max_abs_logit", value, LOGIT_TOLERANCE, cases)
    return record
