"""The ranges of a graph's activations on real inputs, for static int8 scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_export.quantized_layers import store

__all__ = ["Method", "largest_values"]

Array = NDArray[Any]

Method = Literal["minmax", "percentile"]
"""`minmax`: the largest value seen. `percentile`: the largest over the samples of what 99.99% of a sample's values stay
below, which clips outliers. KL divergence ("entropy") was tried with ONNX Runtime's collector: worse on every graph."""

_PERCENT = 99.99


def largest_values(
    source: Path, tensors: Iterable[str], samples: Iterable[Mapping[str, Array]], method: Method, folder: Path
) -> dict[str, float]:
    """The largest absolute value of each tensor that int8 is to hold.

    Args:
        source: an fp32 `.onnx` file.
        tensors: names of activations in it.
        samples: inputs by name; read once, one at a time.
        method: see `Method`.
        folder: where a file as large as the graph can be written.

    Raises:
        InputError: the method is not known, or a tensor held NaN or Inf.
    """
    if method not in get_args(Method):
        raise InputError(f"calibration method {method!r}: expected one of {', '.join(get_args(Method))}; choose one")
    names = sorted(tensors)
    engine = _engine_with_outputs(source, names, folder / "calibration.onnx", reduced=method == "minmax")
    largest = dict.fromkeys(names, 0.0)
    for outputs in map(engine.run, samples):
        for name in names:
            # np.maximum hands NaN on, as max() would not.
            largest[name] = float(np.maximum(largest[name], _summary(outputs[f"{name}/seen"], method)))
    for name, value in largest.items():
        if not np.isfinite(value):
            raise InputError(
                f"{source.name}: the activation {name} is {value} on a calibration sample; expected finite values; "
                "see what the fp32 model answers to the samples"
            )
    return largest


def _engine_with_outputs(source: Path, names: list[str], path: Path, *, reduced: bool) -> OrtEngine:
    """The graph with `<name>/seen` for each tensor: its values, or their largest absolute one."""
    import onnx_ir as ir

    model = ir.load(source)
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    for name in names:
        node = ir.node("Abs" if reduced else "Identity", [values[name]])
        model.graph.append(node)
        if reduced:
            node = ir.node("ReduceMax", [node.outputs[0]], {"keepdims": 0})
            model.graph.append(node)
        seen = node.outputs[0]
        seen.name, seen.dtype = f"{name}/seen", ir.DataType.FLOAT
        seen.shape = ir.Shape(()) if reduced else values[name].shape
        model.graph.outputs.append(seen)
    store(model, path)
    return OrtEngine(path, providers=("CPUExecutionProvider",))


def _summary(values: Array, method: Method) -> float:
    return float(np.percentile(np.abs(values), _PERCENT) if method == "percentile" else np.max(values))
