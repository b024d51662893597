"""An engine whose graph is another model of the same Triton server, called from a python-backend model (BLS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mi2rage_engines.engine import NOTHING, Array, DeviceArray, check_buffer, checked_array, checked_inputs
from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import GraphSpec, TensorSpec
from mi2rage_rt.device_copy import array_from_capsule, tensor_from_capsule

__all__ = ["TritonEngine", "is_batched"]


def is_batched(graph: GraphSpec) -> bool:
    """Whether axis 0 of every tensor is the batch, so that Triton may put requests together."""
    return all(tensor.shape[:1] == ("batch",) for tensor in (*graph.inputs, *graph.outputs))


class _TritonArray:
    """A `DeviceArray`: an array on the host, or a tensor of Triton's on a GPU.

    Triton chooses where outputs lie; a buffer that is given as `into` therefore takes the new tensor in place of its
    own, and nothing is copied.
    """

    def __init__(self, array: Array | None = None, tensor: Any = None) -> None:
        self.array, self.tensor = array, tensor
        if array is not None:
            self.shape, self.dtype = array.shape, array.dtype
        else:
            known = tensor_from_capsule(tensor.to_dlpack())
            self.shape, self.dtype = known.shape, known.dtype

    def numpy(self) -> Array:
        return array_from_capsule(self.tensor.to_dlpack()) if self.array is None else self.array

    def take(self, other: _TritonArray) -> None:
        self.array, self.tensor = other.array, other.tensor


class TritonEngine:
    """Fulfils `Engine`; each run is one request to the model `name`.

    Args:
        pb_utils: Triton's module `triton_python_backend_utils`.
        name: of the graph's model in the repository.
        graph: what it takes and gives.
        on_device: what `call` gives stays on the first GPU.
    """

    def __init__(self, pb_utils: Any, name: str, graph: GraphSpec, *, on_device: bool = False) -> None:
        self._pb, self._name, self._graph = pb_utils, name, graph
        self._is_batched = is_batched(graph)
        self.device = "cuda" if on_device else "cpu"

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in its order."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in its order."""
        return self._graph.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        found = self._request(checked_inputs(self._name, self.inputs, inputs), on_device=False)
        # Copies: what Triton gives may be its own shared memory.
        return {name: array.numpy().copy() for name, array in found.items()}

    def put(self, array: Array, name: str) -> DeviceArray:
        """See `Engine.put`; the array stays on the host, and Triton moves it with each request."""
        return _TritonArray(checked_array(self._name, self.inputs, array, name))

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        """See `Engine.call`."""
        feeds = checked_inputs(self._name, self.inputs, inputs)
        results: dict[str, DeviceArray] = {}
        for name, array in self._request(feeds, on_device=self.device != "cpu").items():
            buffer = into.get(name)
            results[name] = array if buffer is None else buffer
            if buffer is None:
                continue
            check_buffer(self._name, name, buffer, array.shape, array.dtype)
            if isinstance(buffer, _TritonArray):
                buffer.take(array)
            else:
                buffer.numpy()[...] = array.numpy()
        return results

    def _request(self, feeds: Mapping[str, Array | DeviceArray], *, on_device: bool) -> dict[str, _TritonArray]:
        pb = self._pb
        memory = pb.TRITONSERVER_MEMORY_GPU if on_device else pb.TRITONSERVER_MEMORY_CPU
        request = pb.InferenceRequest(
            model_name=self._name,
            requested_output_names=[spec.name for spec in self.outputs],
            inputs=[self._sent(name, value) for name, value in feeds.items()],
            preferred_memory=pb.PreferredMemory(memory, 0),
        )
        response = request.exec()
        if response.has_error():
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feeds.items())
            raise EngineError(f"{self._name}: Triton refused ({response.error().message()}) on {shapes}")
        return {spec.name: self._received(response, spec) for spec in self.outputs}

    def _sent(self, name: str, value: Array | DeviceArray) -> Any:
        if isinstance(value, _TritonArray) and value.array is None and len(value.shape) > 1:
            return self._pb.Tensor.from_dlpack(name, value.tensor.to_dlpack())
        array = value if isinstance(value, np.ndarray) else value.numpy()
        return self._pb.Tensor(name, np.ascontiguousarray(array.reshape(self._shape_there(array.shape))))

    def _shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Triton has no scalars, and no rows without an axis of their own."""
        return (1,) if not shape else (*shape, 1) if self._is_batched and len(shape) == 1 else shape

    def _received(self, response: Any, spec: TensorSpec) -> _TritonArray:
        tensor = self._pb.get_output_tensor_by_name(response, spec.name)
        if tensor is None:
            raise EngineError(
                f"{self._name}: gave no {spec.name}; expected what its config.pbtxt names; write it again"
            )
        if not tensor.is_cpu() and len(spec.shape) > 1:
            return _TritonArray(tensor=tensor)
        array = tensor.as_numpy() if tensor.is_cpu() else array_from_capsule(tensor.to_dlpack())
        if len(spec.shape) < 2:
            array = array.reshape((-1,) if spec.shape else ())
        if math.prod(array.shape) and array.dtype != np.dtype(spec.dtype):
            raise EngineError(f"{self._name}: {spec.name} came as {array.dtype}; expected {spec.dtype}; write it again")
        return _TritonArray(array)
