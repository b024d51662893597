"""From a PyTorch module to an ONNX file: the same bytes for the same module, nothing said on the way."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mi2rage_engines.errors import Mi2rageError, require
from mi2rage_engines.spec import GraphSpec
from mi2rage_export.finite import arguments_from
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.memory import is_lack_of_memory
from mi2rage_export.request import OPSET

__all__ = ["export_graph", "save_model", "trace"]

EMBED_UP_TO_BYTES = 100_000_000
"""Weights above this go into a file of their own: protobuf ends at 2 GiB, and takes four times their memory."""

EXTERNAL_SUFFIX = "_data"
"""`model.onnx_data`, the name that optimum gives it."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and prints away from the user."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx", "torch._dynamo")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _dynamic_shapes(graph: Graph) -> tuple[Any, ...]:
    """The dynamic axes of the inputs, nested as `torch.export` nests arguments: what `*rest` takes is one tuple."""
    shapes = [
        {index: axis for index, axis in enumerate(item.shape) if isinstance(axis, str)} or None for item in graph.inputs
    ]
    parameters = inspect.signature(graph.module.forward).parameters.values()
    if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters):
        return tuple(shapes)
    named = len(parameters) - 1
    return (*shapes[:named], tuple(shapes[named:]))


def trace(graph: Graph, opset: int = OPSET) -> Any:
    """The graph as an `onnx_ir.Model`, the same for the same module wherever it is traced.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        Mi2rageError: the module cannot be traced.
    """
    require("onnx", "export")
    require("onnxscript", "export")
    import torch

    arrays = random_inputs(graph, graph.traced, seed=0)
    arguments = arguments_from(graph, arrays)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                graph.module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=[item.name for item in graph.inputs],
                output_names=[output.name for output in graph.outputs],
                dynamic_shapes=_dynamic_shapes(graph),
                verbose=False,
                report=False,
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        if any(map(is_lack_of_memory, (error, error.__cause__ or error))):
            raise MemoryError(str(error)) from error
        reason = str(error).strip().partition("\n")[0]
        raise Mi2rageError(
            f"{graph.name}: PyTorch's ONNX exporter failed ({type(error).__name__}: {reason}); expected a module that "
            "torch.export can trace; report it with the model's name and the versions that 'mi2rage-rt doctor' prints"
        ) from error
    assert program is not None
    _promote(program.model)
    _tidy(program.model, graph)
    return program.model


def _promote(model: Any) -> None:
    """Cast the inputs of a `Concat` to what PyTorch promotes them to, which the exporter leaves out.

    SDXL joins pooled text in fp16 with sinusoids in fp32.
    """
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        wanted = node.outputs[0].dtype
        if node.op_type != "Concat" or {value.dtype for value in node.inputs} == {wanted}:
            continue
        for index, value in enumerate(node.inputs):
            if value.dtype != wanted:
                cast = ir.node("Cast", [value], {"to": wanted}, name=f"{node.name}_promoted_{index}")
                cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = cast.name, wanted, value.shape
                node.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])


def _tidy(model: Any, graph: Graph) -> None:
    """Name the outputs' axes as the manifest does, and drop what differs between machines (paths, traces)."""
    import onnx_ir as ir

    for value, spec in zip(model.graph.outputs, graph.outputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    model.doc_string = None
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def save_model(model: Any, path: Path, *, embed_up_to_bytes: int = EMBED_UP_TO_BYTES) -> None:
    """Write a traced model; weights too large to embed go to `<path>_data` beside it."""
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=path.name + EXTERNAL_SUFFIX if weights > embed_up_to_bytes else None)


def export_graph(graph: Graph, path: Path, file: str, opset: int = OPSET) -> GraphSpec:
    """Trace the graph's wrapper and write it as ONNX.

    Args:
        graph: what to export.
        path: the `.onnx` file to write.
        file: the same path as the manifest has it, relative to the bundle.
        opset: of the file.

    Raises:
        MissingExtraError, Mi2rageError: see `trace`.
    """
    model = trace(graph, opset)
    save_model(model, path)
    # onnxscript's rewriter keeps hold of the last model that it saw, and with it of weights that were transposed.
    for value in model.graph.initializers.values():
        value.const_value = None
    return GraphSpec(
        file=file,
        inputs=tuple(item.spec for item in graph.inputs),
        outputs=graph.outputs,
        opset=opset,
        axes=dict(graph.axes),
    )
