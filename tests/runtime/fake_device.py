"""An engine whose memory is out of the host's reach: what goes there and comes back is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mi2rage_engines.engine import NOTHING, Array, Engine
from mi2rage_engines.spec import TensorSpec


class FakeArray:
    """A tensor on the fake device."""

    def __init__(self, values: Array, fetched: list[tuple[int, ...]]) -> None:
        self.values = values
        self._fetched = fetched

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def numpy(self) -> Array:
        self._fetched.append(self.shape)
        return self.values.copy()


class FakeDevice:
    """Runs an engine of the host behind device arrays.

    Attributes:
        fetched: the shapes of what was copied to the host.
        calls: of each call the shapes of its inputs, and whether each output was written where it was told.
    """

    device = "fake"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.fetched: list[tuple[int, ...]] = []
        self.put_names: list[str] = []
        self.calls: list[tuple[dict[str, tuple[int, ...]], dict[str, int]]] = []

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._engine.run(inputs)

    def put(self, array: Array, name: str) -> FakeArray:
        self.put_names.append(name)
        return FakeArray(array.copy(), self.fetched)

    def call(self, inputs: Mapping[str, Any], into: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
        given = {name: array.values if isinstance(array, FakeArray) else array for name, array in inputs.items()}
        self.calls.append(
            ({name: array.shape for name, array in given.items()}, {name: id(array) for name, array in into.items()})
        )
        for buffer in into.values():
            assert not any(np.shares_memory(buffer.values, array) for array in given.values())
        outputs = {}
        for name, array in self._engine.run(given).items():
            if name in into:
                assert into[name].shape == array.shape and into[name].dtype == array.dtype
                into[name].values[...] = array
            outputs[name] = into.get(name) or FakeArray(array, self.fetched)
        return outputs
