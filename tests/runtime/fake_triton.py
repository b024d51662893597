"""A stand-in for `triton_python_backend_utils`: the graphs of a written repository on ONNX Runtime.

It holds each request against the model's `config.pbtxt` as Triton does: names, types, shapes, the batch's size. Tensors
"on the GPU" lie in this process's memory, but are to be had by DLPack alone.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from mi2rage_rt.device_copy import array_from_capsule

GPU, CPU = 1, 0


def read_config(path: Path) -> Any:
    """A `config.pbtxt` by Triton's own schema; an unknown field is an error."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


class Tensor:
    taken_by_dlpack = 0

    def __init__(self, name: str, array: np.ndarray, on_cpu: bool = True) -> None:
        assert array.flags.c_contiguous
        self._name, self._array, self._on_cpu = name, array, on_cpu

    @staticmethod
    def from_dlpack(name: str, capsule: object) -> Tensor:
        Tensor.taken_by_dlpack += 1
        return Tensor(name, array_from_capsule(capsule), on_cpu=False)

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return self._on_cpu

    def to_dlpack(self) -> object:
        return self._array.__dlpack__()

    def as_numpy(self) -> np.ndarray:
        if not self._on_cpu:
            raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def arrays(self) -> dict[str, np.ndarray]:
        assert self._error is None, self._error.message()
        return {name: tensor.as_numpy() for name, tensor in self._tensors.items()}


class ClientRequest:
    """What a client sends to a python-backend model."""

    def __init__(self, arrays: Mapping[str, Any], **parameters: Any) -> None:
        self.tensors = {name: Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()}
        self._parameters = parameters

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class FakeTriton:
    """A server of one repository; `calls` counts the requests to each graph."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.calls: dict[str, int] = {}
        self._sessions: dict[str, Any] = {}

    def module(self) -> Any:
        """What a model imports as `triton_python_backend_utils`."""
        server = self

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: Sequence[str],
                inputs: Sequence[Tensor],
                preferred_memory: tuple[int, int],
            ) -> None:
                self._given = (model_name, requested_output_names, inputs, preferred_memory[0] == GPU)

            def exec(self) -> InferenceResponse:
                return server.infer(*self._given)

        return types.SimpleNamespace(
            Tensor=Tensor,
            TritonError=TritonError,
            InferenceRequest=InferenceRequest,
            InferenceResponse=InferenceResponse,
            PreferredMemory=lambda memory, device: (memory, device),
            TRITONSERVER_MEMORY_GPU=GPU,
            TRITONSERVER_MEMORY_CPU=CPU,
            get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
            get_output_tensor_by_name=lambda response, name: response._tensors.get(name),
        )

    def infer(self, model: str, outputs: Sequence[str], inputs: Sequence[Tensor], on_gpu: bool) -> InferenceResponse:
        self.calls[model] = self.calls.get(model, 0) + 1
        config = read_config(self.repository / model / "config.pbtxt")
        given = {tensor.name(): tensor._array for tensor in inputs}
        assert sorted(given) == sorted(tensor.name for tensor in config.input)
        for tensor in config.input:
            assert f"TYPE_{np_to_triton_dtype(given[tensor.name].dtype)}" == model_config_pb2.DataType.Name(
                tensor.data_type
            )
            _check_shape(config, tensor, given[tensor.name].shape)
        try:
            found = self._run(model, config, given)
        except Exception as error:
            return InferenceResponse([], TritonError(str(error)[:100]))
        return InferenceResponse([Tensor(name, found[name], on_cpu=not on_gpu) for name in outputs])

    def _run(self, model: str, config: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if model not in self._sessions:
            path = next((self.repository / model).glob("*/model.onnx"))
            self._sessions[model] = onnxruntime.InferenceSession(str(path))
        session = self._sessions[model]
        ranks = {node.name: len(node.shape) for node in (*session.get_inputs(), *session.get_outputs())}
        feeds = {
            name: array.reshape(array.shape[: ranks[name]]) if array.ndim != ranks[name] else array
            for name, array in given.items()
        }
        names = [node.name for node in session.get_outputs()]
        found = dict(zip(names, session.run(None, feeds), strict=True))
        for tensor in config.output:
            if tensor.HasField("reshape"):  # a row that is one number
                found[tensor.name] = found[tensor.name][:, None]
            _check_shape(config, tensor, found[tensor.name].shape)
        return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _check_shape(config: Any, tensor: Any, shape: Sequence[int]) -> None:
    rows = list(shape)
    if config.max_batch_size:
        assert rows[0] <= config.max_batch_size, f"{config.name}: {rows[0]} rows, at most {config.max_batch_size}"
        rows = rows[1:]
    assert len(rows) == len(tensor.dims), f"{config.name}: {tensor.name} has shape {shape}, not {tensor.dims}"
    for size, wanted in zip(rows, tensor.dims, strict=True):
        assert wanted in (-1, size), f"{config.name}: {tensor.name} has shape {shape}, not {tensor.dims}"
