"""What runs a graph: named arrays in, named arrays out, whatever the backend."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import TensorSpec

__all__ = [
    "NOTHING",
    "Array",
    "DeviceArray",
    "Engine",
    "HostArray",
    "HostEngine",
    "check_buffer",
    "check_names",
    "checked_array",
    "checked_inputs",
]

Array = NDArray[Any]


class DeviceArray(Protocol):
    """A tensor in the memory that its engine computes in: the host's, or a GPU's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type."""
        ...

    def numpy(self) -> Array:
        """The values on the host. Where that is where they are, the memory is shared: a later `into` changes them."""
        ...


NOTHING: Mapping[str, DeviceArray] = types.MappingProxyType({})
"""No buffers, see `Engine.call`."""


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

    def put(self, array: Array, name: str) -> DeviceArray:
        """An array in the memory, and the dtype, of input `name`. On the host it may share the array's memory.

        Raises:
            EngineError: no such input, or an array that does not fit it.
        """
        ...

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        """Run the graph once; what it gives stays where it was computed, and may be given to a next call.

        Args:
            inputs: by name; also what another engine of the same backend gave.
            into: buffers that outputs are written into, of their shape and dtype, none of them an input of this call.

        Raises:
            EngineError: as `run`, or a buffer does not fit.
        """
        ...


class HostArray:
    """A `DeviceArray` on the host."""

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def numpy(self) -> Array:
        return self._array


class HostEngine:
    """`put` and `call` for an engine that knows host arrays alone: what only has `run` becomes an `Engine`."""

    if TYPE_CHECKING:  # what the subclass has, as attributes or properties

        @property
        def name(self) -> str: ...
        @property
        def inputs(self) -> tuple[TensorSpec, ...]: ...
        @property
        def outputs(self) -> tuple[TensorSpec, ...]: ...
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def put(self, array: Array, name: str) -> DeviceArray:
        """See `Engine.put`."""
        return HostArray(checked_array(self.name, self.inputs, array, name))

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        """See `Engine.call`."""
        arrays = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in inputs.items()}
        results: dict[str, DeviceArray] = {}
        for name, array in self.run(arrays).items():
            results[name] = HostArray(array)
            if name in into:
                check_buffer(self.name, name, into[name], array.shape, array.dtype)
                into[name].numpy()[...] = array
                results[name] = into[name]
        return results


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


def _check_shape(name: str, array: Array | DeviceArray, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    fits = len(array.shape) == len(spec.shape)
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


def checked_array(name: str, specs: Sequence[TensorSpec], array: Array, wanted: str) -> Array:
    """An array as input `wanted` takes it: cast to its precision, contiguous.

    Raises:
        EngineError: there is no such input, or the array does not fit it.
    """
    for spec in specs:
        if spec.name == wanted:
            return _checked(name, spec, array, {})
    raise EngineError(f"{name}: has no input {wanted}; expected one of {', '.join(spec.name for spec in specs)}")


def check_buffer(name: str, output: str, buffer: DeviceArray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse a buffer that an output does not fit into.

    Raises:
        EngineError: another shape or dtype.
    """
    if (buffer.shape, buffer.dtype) != (shape, dtype):
        raise EngineError(
            f"{name}: the buffer for output {output} is {buffer.dtype} {buffer.shape}; expected {dtype} {shape}"
        )


def _checked(name: str, spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> Array:
    array = _cast(name, np.asarray(array), spec)
    _check_shape(name, array, spec, sizes)
    return np.ascontiguousarray(array) if array.ndim else array


def _check_present(name: str, specs: Sequence[TensorSpec], given: Mapping[str, object]) -> None:
    names = [spec.name for spec in specs]
    if sorted(given) != sorted(names):
        raise EngineError(f"{name}: got the inputs {', '.join(given)}; expected {', '.join(names)}")


def checked_inputs(
    name: str, specs: Sequence[TensorSpec], inputs: Mapping[str, Array | DeviceArray]
) -> dict[str, Array | DeviceArray]:
    """The inputs in the graph's order; arrays with their floats cast to the graph's precision, each contiguous.

    Args:
        name: what messages call the graph.
        specs: what the graph takes; equal axis names mean equal sizes.
        inputs: what was given; what lies on a device is looked at, not touched.

    Raises:
        EngineError: an input is missing, unknown, or of the wrong dtype, rank or size.
    """
    _check_present(name, specs, inputs)
    sizes: dict[str, tuple[int, str]] = {}
    feeds: dict[str, Array | DeviceArray] = {}
    for spec in specs:
        value = inputs[spec.name]
        if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "numpy"):
            feeds[spec.name] = _checked(name, spec, np.asarray(value), sizes)
            continue
        if value.dtype != np.dtype(spec.dtype):
            raise EngineError(f"{name}: input {spec.name} has dtype {value.dtype} on its device; expected {spec.dtype}")
        _check_shape(name, value, spec, sizes)
        feeds[spec.name] = value
    return feeds
