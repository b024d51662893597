"""A graph to export: its wrapper, its inputs and axes, and the PyTorch answer to check it against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mi2rage_engines.spec import Axis, TensorSpec

__all__ = ["Graph", "Input", "Sizes", "below", "in_sequence", "normal", "outputs_from", "padding_mask", "random_inputs"]

Array = NDArray[Any]
Sizes = Mapping[str, int]
Draw = Callable[[np.random.Generator, tuple[int, ...], Sizes], Array]


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
    """

    name: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Callable[..., tuple[Tensor, ...]]
    traced: Sizes
    checked: tuple[Sizes, ...]


def random_inputs(graph: Graph, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Random arrays for the graph's inputs at the given sizes of its dynamic axes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for item in graph.inputs:
        shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in item.shape)
        arrays[item.name] = np.asarray(item.draw(rng, shape, sizes), dtype=item.dtype)
    return arrays


def normal(rng: np.random.Generator, shape: tuple[int, ...], _: Sizes) -> Array:
    return rng.standard_normal(shape)


def below(limit: int) -> Draw:
    return lambda rng, shape, _: rng.integers(0, limit, shape)


def in_sequence(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Array:
    return rng.integers(0, sizes["sequence"], shape)


def padding_mask(rng: np.random.Generator, shape: tuple[int, ...], _: Sizes) -> Array:
    lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
    return np.arange(shape[1]) < lengths


def outputs_from(**shapes: tuple[Axis, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())
