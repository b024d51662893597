"""Is the export the model it came from? What graphs and components answer, against the answers PyTorch gave.

Nothing here needs PyTorch: the answers lie in the bundle (`reference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.bundle import ParityRecord
from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import BundleError, OutsideProfileError, ParityError
from mi2rage_engines.spec import GraphSpec, Precision
from mi2rage_export.reference import (
    CaptionerReference,
    Case,
    ClassifierReference,
    GeneratorReference,
    GraphReference,
    draw_inputs,
    picked,
    read_answers,
    sha256_of_arrays,
)
from mi2rage_rt.noise import rng, seed_from
from mi2rage_rt.samples import Sample, Span

if TYPE_CHECKING:
    from mi2rage_engines.spec import ImagePreprocessing
    from mi2rage_rt.captioner import RuntimeCaptioner
    from mi2rage_rt.classifier import RuntimeClassifier
    from mi2rage_rt.generator import RuntimeGenerator
    from mi2rage_rt.protocols import Image

__all__ = [
    "BOUNDS",
    "Bounds",
    "Difference",
    "FiguresError",
    "agreement",
    "check_captioner",
    "check_classifier",
    "check_generator",
    "check_graph",
    "common_prefix",
    "demand",
    "difference",
    "lowest",
    "psnr_db",
    "random_images",
    "random_samples",
    "record",
    "written",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What an export in one precision must hold.

    Attributes:
        max_abs_scaled: of a graph: largest difference over max(1, largest value of the output). None where random
            inputs say little: calibrated scales are for real ones, on which `quantize` holds its own bound.
        cosine: of a graph, at least.
        logits_scaled: as `max_abs_scaled`, of a classifier's logits for random sentences and images.
        image_psnr_db: of images, at least.
        caption_prefix: share of a caption's tokens before the first other one, at least; None leaves captions to the
            decoder's logits: where two tokens are all but equally likely, any rounding decides.
        decision_agreement: share of given samples with the same relation, at least.
        f1: points of micro F1 (0 to 100) on given samples, at most.
    """

    max_abs_scaled: float | None
    cosine: float
    logits_scaled: float
    image_psnr_db: float
    caption_prefix: float | None
    decision_agreement: float
    f1: float


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(1e-4, 0.999999, 1e-4, 40.0, 1.0, 1.0, 0.0),
    "fp16": Bounds(0.05, 0.9995, 0.05, 25.0, None, 0.99, 0.3),
    "bf16": Bounds(0.1, 0.999, 0.1, 20.0, None, 0.97, 0.5),
    "int8-weights": Bounds(0.5, 0.97, 0.5, 12.0, None, 0.95, 0.5),
    "int8-dynamic": Bounds(0.5, 0.97, 0.5, 12.0, None, 0.95, 0.5),
    "int8-qdq": Bounds(None, 0.7, 0.5, 12.0, None, 0.95, 0.5),
}
"""By precision: fp32 differs by the order of its sums; the others' bounds are several times what was measured.

The cosine of `int8-qdq` is a floor under which no usable graph fell: noise for images, far outside of the calibrated
range, gave 0.82 on the embedded captioner, and graphs whose int8 weights were lost 0.24 and 0.44.
"""

_PIXELS_AT_ONCE = 512 * 512
"""Of the images drawn in one batch: attention over more of them would decide what memory an export takes."""

_ORDER: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8-weights", "int8-dynamic", "int8-qdq")
_WORDS = ("a", "man", "near", "the", "red", "car", "with", "two", "dogs", "at", "park", "#team", "@news", "RT", "!")


def lowest(graphs: Iterable[GraphSpec]) -> Precision:
    """The lowest precision among graphs: a component is held to its bounds."""
    return max((graph.precision for graph in graphs), key=_ORDER.index, default="fp32")


class FiguresError(ParityError):
    """A figure breaks its bound; `records` has all figures, those that hold too."""

    def __init__(self, message: str, records: Sequence[ParityRecord]) -> None:
        super().__init__(message)
        self.records = tuple(records)


def written(value: float, threshold: float) -> tuple[str, str]:
    """A figure and its bound in as few digits as tell them apart."""
    for digits in (4, 6, 9):
        if value == threshold or f"{value:.{digits}g}" != f"{threshold:.{digits}g}":
            return f"{value:.{digits}g}", f"{threshold:.{digits}g}"
    return repr(value), repr(threshold)


def demand(records: Sequence[ParityRecord]) -> None:
    """Nothing, if every bound holds.

    Raises:
        FiguresError: one does not; the message has subject, measure, value and bound of the first, and their number.
    """
    failed = [record for record in records if not record.passed]
    if failed:
        first = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        value, bound = (f"{first.value:.4g}", "none, but a finite number")
        if first.threshold is not None:
            value, bound = written(first.value, first.threshold)
        raise FiguresError(
            f"{first.subject}: {first.measure} is {value} over {first.cases} inputs, the bound is {bound}{more}; the "
            "exported model answers differently from the PyTorch model; export in a higher --precision, or report it "
            "with the model's name and the versions that 'mi2rage-rt doctor' prints",
            records,
        )


def record(
    subject: str, measure: str, value: float, threshold: float | None, cases: int, *, least: bool = False
) -> ParityRecord:
    """One figure and whether its bound holds.

    Args:
        least: the threshold is the smallest value allowed instead of the largest. NaN never passes.
    """
    passed = bool(np.isfinite(value)) if threshold is None else value >= threshold if least else value <= threshold
    # JSON has no infinity; the largest float stands for "not comparable".
    shown = float(value) if np.isfinite(value) else float(np.finfo(np.float64).max) * (-1 if least else 1)
    return ParityRecord(
        subject=subject, measure=measure, value=shown, threshold=threshold, passed=bool(passed), cases=cases
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """How far an output is from what was expected; all infinite (cosine -1) where shapes or finiteness differ.

    Attributes:
        max_abs: largest absolute difference.
        max_abs_scaled: the same over max(1, largest expected value).
        max_rel: largest |difference| / (|expected| + epsilon), epsilon being a thousandth of the largest value.
        cosine: of the two as vectors; 1 where both are nothing but zeros.
    """

    max_abs: float
    max_abs_scaled: float
    max_rel: float
    cosine: float

    def worse(self, other: Difference) -> Difference:
        """The worse of two, measure by measure."""
        return Difference(
            max(self.max_abs, other.max_abs),
            max(self.max_abs_scaled, other.max_abs_scaled),
            max(self.max_rel, other.max_rel),
            min(self.cosine, other.cosine),
        )


_NONE = Difference(0.0, 0.0, 0.0, 1.0)
_APART = Difference(float("inf"), float("inf"), float("inf"), -1.0)


def difference(found: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """Compare an output with what was expected."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return _APART
    if not expected.size:
        return _NONE
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    apart, largest = np.abs(a - b), float(np.abs(b).max())
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b / norm) if norm else float(np.array_equal(a, b))
    relative = float((apart / (np.abs(b) + 1e-3 * max(largest, 1e-12))).max())
    return Difference(float(apart.max()), float(apart.max() / max(1.0, largest)), relative, cosine)


def check_graph(
    engine: Engine, name: str, spec: GraphSpec, reference: GraphReference, folder: Path
) -> list[ParityRecord]:
    """A graph's answers at its smallest, usual and largest sizes, against PyTorch's.

    Cases outside of a plan's profiles are left out, and not counted; there are no records where all of them are.

    Args:
        engine: runs the graph.
        name: of the graph, e.g. `generator/unet`.
        spec: of the graph.
        reference: its cases.
        folder: the bundle.

    Raises:
        BundleError: the answers are missing, or this machine's NumPy draws other inputs.
        EngineError: the graph cannot be run.
    """
    answers = read_answers(folder, name.replace("/", "-"))
    worst, cases = _NONE, 0
    for number, case in enumerate(reference.cases):
        try:
            found = _run_case(engine, name, spec, reference, case, folder)
        except OutsideProfileError:
            continue
        cases += 1
        for output, (kept, finite) in found.items():
            worst = worst.worse(difference(kept, answers[f"{number}/{output}"]) if finite else _APART)
    if not cases:
        return []
    bounds = BOUNDS[spec.precision]
    return [
        record(name, "max_abs_scaled", worst.max_abs_scaled, bounds.max_abs_scaled, cases),
        record(name, "cosine", worst.cosine, bounds.cosine, cases, least=True),
        record(name, "max_abs", worst.max_abs, None, cases),
        record(name, "max_rel", worst.max_rel, None, cases),
    ]


def _run_case(
    engine: Engine, name: str, spec: GraphSpec, reference: GraphReference, case: Case, folder: Path
) -> dict[str, tuple[NDArray[np.float32], bool]]:
    """What is kept of each output, and whether all of it is finite; all else is let go of with the call."""
    arrays = draw_inputs(spec.inputs, reference.inputs, case.sizes, case.seed)
    if sha256_of_arrays(arrays) != case.inputs_sha256:
        raise BundleError(
            f"{folder}: NumPy {np.__version__} draws other inputs for {name} than the bundle was exported with; "
            "expected the same; install the NumPy of its tool_versions, or export again"
        )
    found = engine.run(arrays)
    return {
        output: (picked(found[output]), bool(np.isfinite(found[output].astype(np.float32, copy=False)).all()))
        for output in reference.outputs
    }


def psnr_db(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of images in 0 to 255, dB; 100 where they are equal, -infinity where shapes differ."""
    if found.shape != expected.shape:
        return float("-inf")
    error = float(np.square(found.astype(np.float64) - expected).mean())
    return min(100.0, 10 * float(np.log10(255**2 / error))) if error else 100.0


def check_generator(
    runtime: RuntimeGenerator, reference: GeneratorReference, folder: Path, precision: Precision
) -> list[ParityRecord]:
    """Images of the same prompts and seeds, runtime against the diffusers pipeline."""
    from mi2rage_rt.generator import GenerateOptions

    at_once = max(1, _PIXELS_AT_ONCE // (reference.height * reference.width))
    options = GenerateOptions(
        reference.steps,
        reference.guidance_scale,
        reference.height,
        reference.width,
        min(at_once, len(reference.prompts)),
    )
    found = runtime.generate(reference.prompts, reference.seeds, options)
    expected = read_answers(folder, "generator")["images"]
    value, cases = psnr_db(found, expected), len(reference.prompts)
    same_shape = found.shape == expected.shape
    apart = float(np.abs(found.astype(np.float64) - expected).mean() / 255) if same_shape else float("inf")
    return [
        record("generator", "image_psnr_db", value, BOUNDS[precision].image_psnr_db, cases, least=True),
        record("generator", "mean_abs_pixel", apart, None, cases),
    ]


def random_images(count: int, height: int, width: int, seed: int) -> list[Image]:
    """Random colour fields of several sizes, uint8 (H, W, 3), smooth enough to look like something."""
    images: list[Image] = []
    for row in range(count):
        draws = rng(seed_from("parity image", seed, row))
        coarse = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        scale = 1 + row % 3
        tall, wide = max(4, height * scale // 2), max(4, width * (1 + (row + 1) % 3) // 2)
        images.append(coarse[np.ix_(np.arange(tall) * 4 // tall, np.arange(wide) * 4 // wide)])
    return images


def common_prefix(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Share of the longer of two sequences before they differ first; 1 where both are empty."""
    longest = max(len(found), len(expected))
    same = 0
    for mine, theirs in zip(found, expected, strict=False):
        if mine != theirs:
            break
        same += 1
    return same / longest if longest else 1.0


def check_captioner(
    runtime: RuntimeCaptioner, reference: CaptionerReference, precision: Precision, subject: str = "captioner"
) -> list[ParityRecord]:
    """Greedy captions, runtime against transformers' `generate`, without and with a prefix.

    Args:
        runtime: its options say which decoder graph is used.
        reference: of the captioner.
        precision: whose bounds hold.
        subject: what the records are about.
    """
    size = runtime.spec.preprocessing
    images = random_images(reference.images, size.height, size.width, reference.seed)
    shares, equal = [], 0
    for prefix, expected in zip(reference.prefixes, reference.ids, strict=True):
        found = runtime.generate_ids(images, [runtime.prompt_ids(prefix)] * len(images))
        shares += [common_prefix(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
        equal += sum(tuple(mine) == theirs for mine, theirs in zip(found, expected, strict=True))
    bound, cases = BOUNDS[precision].caption_prefix, len(shares)
    return [
        record(subject, "caption_prefix", float(np.mean(shares)), bound, cases, least=True),
        record(subject, "caption_agreement", equal / cases, bound, cases, least=True),
    ]


def random_samples(count: int, size: ImagePreprocessing, seed: int) -> tuple[list[Sample], list[Image | None]]:
    """Random sentences with two mentions, and images of which every fourth is missing."""
    samples = []
    for row in range(count):
        draws = rng(seed_from("parity sentence", seed, row))
        length = int(draws.integers(4, 24))
        tokens = tuple(_WORDS[index] for index in draws.integers(0, len(_WORDS), length))
        first, second = sorted(int(place) for place in draws.choice(length, 2, replace=False))
        head, tail = Span(first, first + 1), Span(second, second + 1)
        samples.append(Sample(id=str(row), tokens=tokens, head=head, tail=tail))
    images = random_images(count, size.height, size.width, seed)
    return samples, [None if row % 4 == 3 else image for row, image in enumerate(images)]


def check_classifier(
    runtime: RuntimeClassifier, reference: ClassifierReference, folder: Path, precision: Precision
) -> list[ParityRecord]:
    """Logits of random sentences and images, runtime against PyTorch."""
    samples, images = random_samples(reference.samples, runtime.spec.preprocessing, reference.seed)
    found, expected = runtime.logits(samples, images), read_answers(folder, "classifier")["logits"]
    apart = difference(found, expected)
    agree = agreement(found, expected)
    # Random samples may lie between two relations: in a lower precision their decisions are for information.
    bound = 1.0 if precision == "fp32" else None
    return [
        record("classifier", "max_abs_scaled", apart.max_abs_scaled, BOUNDS[precision].logits_scaled, len(samples)),
        record("classifier", "decision_agreement", agree, bound, len(samples), least=True),
    ]


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Share of rows of logits with the same largest one; -1 where shapes differ or a value is no number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return -1.0
    return float((found.argmax(-1) == expected.argmax(-1)).mean()) if len(found) else 1.0
