"""Lowering a module to fp16 or bf16 before it is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mi2rage_engines.spec import Precision, TensorSpec
from mi2rage_export.graphs import Graph, Input
from mi2rage_export.overflow import WHOLE, known_parts, outermost
from mi2rage_export.request import OPSET

__all__ = ["BF16_OPSET", "Lowered", "lower", "opset_for"]

BF16_OPSET = 22
"""The first with bf16 convolutions; before, a bf16 graph with one is no valid ONNX."""

_FULL_INPUTS = frozenset({"timestep", "rows", "columns"})
"""Stay float32 in every precision: the sinusoids of a time step, and how images are resized, are computed in fp32."""


_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph after lowering.

    Attributes:
        graph: to be traced; its `reference` is the changed module's and must not be asked any more.
        precision: of the graph; `fp32` where all of it had to stay so.
        kept: submodules left in fp32, by their names in `graph.module`; `*` for all of it.
    """

    graph: Graph
    precision: Precision
    kept: tuple[str, ...] = ()


def opset_for(precision: Precision, opset: int = OPSET) -> int:
    """The opset to trace a graph of the precision with, `opset` or what the precision needs at least."""
    return max(opset, BF16_OPSET) if precision == "bf16" else opset


def lower(graph: Graph, precision: Precision, *, keep: Iterable[str] = ()) -> Lowered:
    """Convert the graph's module in place, so that never both precisions are in memory.

    fp16 graphs take and give float16 tensors; bf16 graphs take and give float32, which NumPy can hold, and cast at
    their borders; `timestep` stays float32 in both. fp32 and the int8 precisions (made from the fp32 file) change
    nothing.

    Args:
        graph: in fp32.
        precision: to convert to.
        keep: submodules that stay in fp32, inputs and outputs cast at their borders; see `overflow.find_overflow`.

    Raises:
        InputError: `keep` names a submodule that is not there.
    """
    dtype = _DTYPES.get(precision)
    if dtype is None:
        return Lowered(graph, precision)
    kept = outermost(known_parts(graph, keep))
    if WHOLE in kept:
        return Lowered(graph, "fp32", kept)
    _convert(graph.module, dtype, kept)
    for name in kept:
        _cast_at_borders(graph.module.get_submodule(name), torch.float32, dtype)
    at_border = dtype if precision == "fp16" else torch.float32
    full = {index for index, item in enumerate(graph.inputs) if item.name in _FULL_INPUTS}
    _cast_at_borders(graph.module, dtype, at_border, full)
    lowered = dataclasses.replace(
        graph,
        inputs=tuple(_with_dtype(item, at_border) for item in graph.inputs),
        outputs=tuple(_with_dtype(item, at_border) for item in graph.outputs),
    )
    return Lowered(lowered, precision, kept)


def _with_dtype(item: Any, dtype: torch.dtype) -> Any:
    if not item.dtype.startswith("float") or item.name in _FULL_INPUTS:
        return item
    name = str(dtype).removeprefix("torch.")
    return dataclasses.replace(item, dtype=name) if isinstance(item, Input) else _spec_with(item, name)


def _spec_with(spec: TensorSpec, dtype: str) -> TensorSpec:
    return spec.model_copy(update={"dtype": dtype})


def _convert(module: nn.Module, dtype: torch.dtype, kept: Collection[str]) -> None:
    """Floating parameters and buffers to `dtype`, but for those of kept submodules; integer buffers stay."""
    inside = {id(layer) for name in kept for layer in module.get_submodule(name).modules()}
    held = {id(value) for layer in module.modules() if id(layer) in inside for value in _own(layer).values()}
    for layer in module.modules():
        if id(layer) in inside:
            continue
        for name, value in _own(layer).items():
            if not value.is_floating_point():
                continue
            if id(value) not in held:
                value.data = value.data.to(dtype)  # in place: tied weights stay tied
            elif isinstance(value, nn.Parameter):
                setattr(layer, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))
            else:
                setattr(layer, name, value.to(dtype))


def _own(layer: nn.Module) -> dict[str, Tensor]:
    return dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def _cast_at_borders(
    layer: nn.Module, inside: torch.dtype, outside: torch.dtype, full: Collection[int] = frozenset()
) -> None:
    """Cast a submodule's floating inputs on entry, but for the positions `full`, and its outputs on leaving."""

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = tuple(item if index in full else _cast(item, inside) for index, item in enumerate(args))
        return cast, _cast(kwargs, inside)

    layer.register_forward_pre_hook(entering, with_kwargs=True)
    layer.register_forward_hook(lambda _, __, outputs: _cast(outputs, outside))
