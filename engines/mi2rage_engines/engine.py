"""What runs a graph: named arrays in, named arrays out, whatever the backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import TensorSpec

__all__ = ["Array", "Engine", "check_names", "checked_inputs"]

Array = NDArray[Any]


class Engine(Protocol):
    """One loaded graph. Arrays given to `run` are only read; arrays it returns belong to the caller."""

    @property
    def name(self) -> str:
        """What messages call the graph, e.g. its path."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes, in the graph's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns, in the graph's order."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            EngineError: an input is missing, unknown, or of the wrong type or shape, or the backend failed.
        """
        ...


def check_names(engine: Engine, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse a graph that lacks one of the tensors a component needs.

    Raises:
        EngineError: the message names the tensors that are there and those that are needed.
    """
    for kind, needed, present in (("input", inputs, engine.inputs), ("output", outputs, engine.outputs)):
        names = [tensor.name for tensor in present]
        missing = [name for name in needed if name not in names]
        if missing:
            raise EngineError(
                f"{engine.name}: has no {kind} {', '.join(missing)}; its {kind}s are {', '.join(names)}; "
                "export the model again with this release"
            )


def _cast(name: str, array: Array, spec: TensorSpec) -> Array:
    wanted = np.dtype(spec.dtype)
    if array.dtype == wanted:
        return array
    # float32 for a float16 graph is a matter of precision; floats where ids belong are a mistake.
    if array.dtype.kind != wanted.kind:
        raise EngineError(
            f"{name}: input {spec.name} has dtype {array.dtype}; expected {wanted}; convert it before the call"
        )
    return array.astype(wanted)


def _check_shape(name: str, array: Array, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    fits = array.ndim == len(spec.shape)
    for size, axis in zip(array.shape, spec.shape, strict=False):
        fits = fits and (not isinstance(axis, int) or axis == size)
    if not fits:
        raise EngineError(
            f"{name}: input {spec.name} has shape {array.shape}; expected ({', '.join(map(str, spec.shape))}); "
            "give it that shape, or export the graph with that axis dynamic"
        )
    for size, axis in zip(array.shape, spec.shape, strict=True):
        if isinstance(axis, str) and axis:
            known, owner = sizes.setdefault(axis, (size, spec.name))
            if known != size:
                raise EngineError(
                    f"{name}: axis {axis} is {size} in input {spec.name}, but {known} in {owner}; expected one size"
                )


def checked_inputs(name: str, specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in the graph's order, floats cast to the graph's precision, each contiguous.

    Args:
        name: what messages call the graph.
        specs: what the graph takes; equal axis names mean equal sizes.
        inputs: what was given.

    Raises:
        EngineError: an input is missing, unknown, or of the wrong dtype, rank or size.
    """
    names = [spec.name for spec in specs]
    wrong = sorted(set(inputs) ^ set(names))
    if wrong:
        raise EngineError(f"{name}: got the inputs {', '.join(inputs)}; expected {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    feeds = {}
    for spec in specs:
        array = _cast(name, np.asarray(inputs[spec.name]), spec)
        _check_shape(name, array, spec, sizes)
        feeds[spec.name] = np.ascontiguousarray(array) if array.ndim else array
    return feeds
