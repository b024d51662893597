"""A graph to export: its wrapper, its inputs and axes, and the PyTorch answer to check it against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from mi2rage_engines.spec import Axis, AxisRange, TensorSpec
from mi2rage_export.reference import Array, Draw, Sizes, draw_inputs

__all__ = [
    "IN_IMAGES",
    "IN_SEQUENCE",
    "NORMAL",
    "PADDING",
    "Graph",
    "Input",
    "Sizes",
    "below",
    "outputs_from",
    "random_inputs",
]

NORMAL = Draw(kind="normal")
IN_IMAGES = Draw(kind="in_images")
IN_SEQUENCE = Draw(kind="in_sequence")
PADDING = Draw(kind="padding")


def below(limit: int) -> Draw:
    return Draw(kind="below", limit=limit)


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of a graph and how test values for it are drawn."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]
    draw: Draw

    @property
    def spec(self) -> TensorSpec:
        """The input as the manifest has it."""
        return TensorSpec(name=self.name, dtype=self.dtype, shape=self.shape)


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph to export.

    Attributes:
        name: component and graph, e.g. `generator/unet`.
        module: the wrapper that is traced; its forward takes `inputs` in order.
        inputs, outputs: with the names of dynamic axes.
        reference: what the unpatched PyTorch model answers to the inputs, in the order of `outputs`.
        traced: the sizes of the dynamic axes while tracing; 2 or more (0 and 1 would be frozen), no two alike
            where axes might be taken for one.
        checked: sizes at which the graph is compared: smallest, usual, largest.
        axes: the range of each dynamic axis of the inputs that engines are built for.
        in_fp32: what its module computes in fp32 in every precision, as the manifest names it among the kept parts.
    """

    name: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Callable[..., tuple[Tensor, ...]]
    traced: Sizes
    checked: tuple[Sizes, ...]
    axes: Mapping[str, AxisRange] = dataclasses.field(default_factory=dict)
    in_fp32: tuple[str, ...] = ()


def random_inputs(graph: Graph, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Random arrays for the graph's inputs at the given sizes of its dynamic axes."""
    specs = [item.spec for item in graph.inputs]
    return draw_inputs(specs, {item.name: item.draw for item in graph.inputs}, sizes, seed)


def outputs_from(**shapes: tuple[Axis, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())
