"""One graph into one ONNX file, in the precision that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mi2rage_export.finite import demand_finite
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.overflow import find_overflow
from mi2rage_export.precision import lower, opset_for
from mi2rage_export.quantize import Quantization, Quantized, quantize
from mi2rage_export.to_onnx import EXTERNAL_SUFFIX, export_graph, save_model
from mi2rage_rt.noise import seed_from

if TYPE_CHECKING:
    from mi2rage_engines.engine import Array
    from mi2rage_engines.spec import GraphSpec, Precision
    from mi2rage_export.request import ExportRequest

logger = logging.getLogger(__name__)

__all__ = ["export_in_precision", "quantized"]

_LARGEST_ERROR = 0.05
"""Of a quantised graph on real inputs, relative to what fp32 answers: layers stay in fp32 until it holds."""

_SEARCHED = 2
"""Of the sizes that a graph is checked at, so many from the smallest on are run to find what fp16 cannot hold."""


def export_in_precision(graph: Graph, path: Path, file: str, request: ExportRequest) -> GraphSpec:
    """Lower a graph's module, trace it, and write it; the module cannot be used in fp32 any more.

    What int8 is made of stays in fp32 here, see `quantized`.

    Args:
        graph: its answers in fp32 have been recorded.
        path, file: see `export_graph`.
        request: the precision, the opset, and what is to stay in fp32.

    Raises:
        InputError: a part that is to stay in fp32 is not there.
        ParityError: the module gives NaN or infinity in the lower precision; the first layer that does is named.
        Mi2rageError: the module cannot be traced.
    """
    precision = request.precision_of(graph.name)
    keep: tuple[str, ...] = request.kept_parts(graph.name)
    seeds = (seed_from("overflow", graph.name, request.seed, case) for case in range(_SEARCHED))
    samples = [random_inputs(graph, sizes, seed) for sizes, seed in zip(graph.checked[:_SEARCHED], seeds, strict=False)]
    if precision == "fp16":
        keep = find_overflow(graph, samples, keep=keep)
    lowered = lower(graph, precision, keep=keep)
    if lowered.precision in ("fp16", "bf16"):
        demand_finite(lowered.graph, samples[:1])
    spec = export_graph(lowered.graph, path, file, opset_for(lowered.precision, request.opset))
    stays: Precision = lowered.precision if lowered.precision in ("fp16", "bf16") else "fp32"
    kept = (*lowered.kept, *graph.in_fp32) if stays != "fp32" else lowered.kept
    return spec.model_copy(update={"precision": stays, "kept_fp32": kept})


def quantized(
    path: Path, spec: GraphSpec, precision: Precision, samples: Sequence[Mapping[str, Array]], keep: tuple[str, ...]
) -> GraphSpec:
    """Put an fp32 file into int8, in its place.

    Args:
        path: the `.onnx` file.
        spec: of the fp32 graph.
        precision: one of the int8 precisions.
        samples: real inputs; `int8-qdq` takes its scales from them, and with them layers whose error is too large are
            found and left in fp32.
        keep: layers that stay in fp32 in any case.
    """
    draft = path.with_name(f"int8-{path.name}")
    bound = _LARGEST_ERROR if samples else None
    found = quantize(path, draft, Quantization(precision, samples=samples, max_error=bound, keep=keep))
    _warn_of_little(spec.file.removesuffix(".onnx"), found, keep)
    for old in (path, path.with_name(path.name + EXTERNAL_SUFFIX)):
        old.unlink(missing_ok=True)
    _rename(draft, path)
    return spec.model_copy(update={"precision": found.precision, "kept_fp32": found.kept})


def _warn_of_little(name: str, found: Quantized, keep: tuple[str, ...]) -> None:
    """Say it where calibration left less than half of the layers in int8; those that the user keeps are no surprise."""
    done, left = len(found.layers), len(set(found.kept) - set(keep))
    if left > done:
        logger.warning(
            "%s: only %d of its %d layers that could be (%.0f%%) are in %s, the others would lose too much; expected "
            "at least half; give other --calibration data, or this graph another --precision",
            name,
            done,
            done + left,
            100 * done / (done + left),
            found.precision,
        )


def _rename(draft: Path, path: Path) -> None:
    """Move a file with its external data, whose name stands inside it."""
    import onnx_ir as ir

    beside = draft.with_name(draft.name + EXTERNAL_SUFFIX)
    if not beside.exists():
        draft.rename(path)
        return
    save_model(ir.load(draft), path)
    draft.unlink()
    beside.unlink()
