"""int8: an fp32 ONNX file with the weights of its products, and where asked their inputs, quantised.

Quantised are MatMul, Gemm and Conv with constant weights, symmetrically and by output channel; all operators are
standard ONNX of opset 20. Left in fp32:

- products of two activations (attention): probabilities between 0 and 1 lose most, and they hold no weights;
- embedding tables: they are looked up, and a dequantised table would be computed whole in every run;
- norms, activation functions, biases: next to no time and no size;
- convolutions in `int8-dynamic`: `ConvInteger` with its casts gains little over ONNX Runtime's fp32 convolutions;
- in `int8-qdq` products of one position selected from a sequence (poolers): TensorRT-RTX cannot build some of them.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError, ParityError, require
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import Precision
from mi2rage_export.activation_ranges import Method, largest_values
from mi2rage_export.quantized_layers import add_outputs, layers_of, quantized_product, replace, store

__all__ = ["Quantization", "Quantized", "quantize"]

logger = logging.getLogger(__name__)

Array = NDArray[Any]
INT8 = ("int8-weights", "int8-dynamic", "int8-qdq")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a graph is quantised.

    Attributes:
        precision: one of the int8 precisions.
        samples: inputs by name, as the fp32 graph takes them; real ones. `int8-qdq` takes its scales from them, and
            `max_error` is measured on them.
        method: how `int8-qdq` takes the range of an activation from the samples.
        max_error: bound on the error on the samples; the layers with the largest errors of their own stay in fp32
            until it holds. None: all layers are quantised.
        keep: names of layers that stay in fp32 in any case.
    """

    precision: Precision
    samples: Sequence[Mapping[str, Array]] = ()
    method: Method = "minmax"
    max_error: float | None = None
    keep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        precision: of the graph; `fp32` where it has no layer to quantise.
        layers: the quantised layers, in the graph's order.
        kept: layers that could have been and stay in fp32, the most sensitive first, then those of `keep`.
        error: the worst output's norm of the difference to fp32 over the norm of the fp32 answer, over all samples;
            None without samples.
    """

    precision: Precision
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    error: float | None


def quantize(source: Path, target: Path, how: Quantization) -> Quantized:
    """Write an int8 version of an fp32 graph; the same file and samples give the same bytes.

    Args:
        source: an fp32 `.onnx` file, its weights inside or beside it; of any size.
        target: another path; weights above 100 MB go into `<target>_data` beside it.
        how: see `Quantization`.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        InputError: the settings do not fit each other or the graph.
        ParityError: `max_error` does not hold however few layers are quantised.
    """
    require("onnx_ir", "export")
    _check(how, source, target)
    with tempfile.TemporaryDirectory(prefix="mi2rage-quantize-") as folder:
        work = _Work(source, Path(folder), how)
        return work.search(target)


def _check(how: Quantization, source: Path, target: Path) -> None:
    if how.precision not in INT8:
        raise InputError(f"precision {how.precision}: cannot be quantised to; expected one of {', '.join(INT8)}")
    if not how.samples and (how.precision == "int8-qdq" or how.max_error is not None):
        wanted = "int8-qdq takes its scales from" if how.precision == "int8-qdq" else "max_error is measured on"
        raise InputError(
            f"{source.name}: no samples were given; {wanted} samples; give some of the model's real inputs"
        )
    if source.resolve() == target.resolve():
        raise InputError(f"{source}: cannot be quantised onto itself; expected another target; give another path")


class _Work:
    """One file being quantised: its layers, the activations' ranges, and the fp32 answers."""

    def __init__(self, source: Path, folder: Path, how: Quantization) -> None:
        self.source, self.folder, self.how = source, folder, how
        found = layers_of(self._load(), how.precision)
        names = [layer.name for layer in found]
        if unknown := sorted(set(how.keep) - set(names)):
            raise InputError(
                f"{source.name}: has no layer {', '.join(unknown)} to keep; its products with constant weights are "
                f"{', '.join(names[:12]) or 'none'}; name some of them"
            )
        self.names = [name for name in names if name not in how.keep]
        self.ranges: Mapping[str, float] = {}
        if how.precision == "int8-qdq":
            tensors = {layer.input_name for layer in found}
            self.ranges = largest_values(source, tensors, how.samples, how.method, folder)
        self.answers = list(self._answers(source)) if how.samples else []

    def _load(self) -> Any:
        import onnx_ir as ir

        return ir.load(self.source)

    def _answers(self, path: Path) -> Iterator[dict[str, Array]]:
        engine = OrtEngine(path, providers=("CPUExecutionProvider",))
        for sample in self.how.samples:
            yield engine.run(sample)

    def write(self, path: Path, kept: Sequence[str]) -> float | None:
        """Quantise all layers but the kept ones into a file, and measure it."""
        model = self._load()
        for layer in layers_of(model, self.how.precision):
            if layer.name in self.names and layer.name not in kept:
                replace(layer, quantized_product(layer, self.how.precision, self.ranges.get(layer.input_name)))
        store(model, path)
        return self._error(path) if self.answers else None

    def _error(self, path: Path) -> float:
        """Norm of the difference over norm of the fp32 answer, of the worst output."""
        apart: dict[str, float] = {}
        size: dict[str, float] = {}
        for found, expected in zip(self._answers(path), self.answers, strict=True):
            for name, answer in expected.items():
                exact = answer.astype(np.float64)
                apart[name] = apart.get(name, 0.0) + float(np.square(found[name] - exact).sum())
                size[name] = size.get(name, 0.0) + float(np.square(exact).sum())
        return max(float(np.sqrt(apart[name] / max(size[name], 1e-30))) for name in apart)

    def search(self, target: Path) -> Quantized:
        """Keep as few of the most sensitive layers as `max_error` allows, and write the target."""
        bound = self.how.max_error
        kept: list[str] = []
        error = self.write(target, kept)
        if bound is not None and error is not None and not error <= bound:
            ranked = self._ranked()
            number = _fewest(len(ranked), lambda count: self._holds(ranked[:count], bound))
            if number == len(ranked):
                raise ParityError(
                    f"{self.source.name}: in {self.how.precision} its error is {error:.3g} with all layers quantised, "
                    f"and with {ranked[-1]} alone quantised it is still above the bound of {bound:.3g}; "
                    "raise the bound, or choose a higher precision"
                )
            kept = ranked[:number]
            error = self.write(target, kept)
        layers = tuple(name for name in self.names if name not in kept)
        if kept:
            logger.info("%s: kept in fp32 to hold %.3g: %s", self.source.name, bound, ", ".join(kept))
        if not layers:
            logger.warning("%s: has no layer that %s quantises; it stays in fp32", self.source.name, self.how.precision)
        return Quantized(self.how.precision if layers else "fp32", layers, (*kept, *self.how.keep), error)

    def _holds(self, kept: Sequence[str], bound: float) -> bool:
        error = self.write(self.folder / "trial.onnx", kept)
        return error is not None and error <= bound

    def _ranked(self) -> list[str]:
        """The layers, the largest error of their own output first: each is computed twice from the same fp32 inputs."""
        model = self._load()
        for layer in layers_of(model, self.how.precision):
            if layer.name in self.names:
                twin = quantized_product(layer, self.how.precision, self.ranges.get(layer.input_name))
                add_outputs(model, layer, twin)
        path = self.folder / "twins.onnx"
        store(model, path)
        sums: dict[str, Array] = {name: np.zeros(2) for name in self.names}
        for outputs in self._answers(path):
            for name in self.names:
                sums[name] += [float(outputs[f"{name}/apart"]), float(outputs[f"{name}/size"])]
        own = {name: value[0] / max(value[1], 1e-30) for name, value in sums.items()}
        return sorted(self.names, key=lambda name: -own[name])


def _fewest(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest count from 1 on for which a condition holds that holds from some count on; `most` if none does."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
