"""`config.pbtxt` of each model of a Triton repository, from a bundle's specs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.profiles import default_profile
from mi2rage_engines.spec import GraphSpec, TensorSpec
from mi2rage_rt.serve.tensors import ANY, ModelTensors, ServiceTensor
from mi2rage_rt.triton_engine import is_batched

__all__ = ["Kind", "PlanFacts", "Platform", "TritonOptions", "graph_config", "service_config", "text_from_config"]

Platform = Literal["onnxruntime", "tensorrt"]
Kind = Literal["cpu", "gpu"]
Message = dict[str, Any]
"""One protobuf message: a list is a repeated field, a `_Word` an enum's value."""

_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
_SERVICE_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "INT32": "TYPE_INT32", "UINT64": "TYPE_UINT64"}
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}


class _Word(str):
    """An enum's value, which stands without quotes."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TritonOptions:
    """How a bundle is laid out for Triton.

    Attributes:
        platform: `tensorrt` uses the bundle's plans where it has them, and ONNX Runtime for the other graphs.
        target: whose plans (`sm89`), where the bundle has them for several.
        kind: where the graphs compute.
        models: services that are written; empty takes all that the bundle has.
        max_batch: rows that a request may have, and that Triton puts together.
        queue_delay_us: how long a request waits for others, in microseconds.
        max_queue: requests of a model that may wait; more are refused at once.
        instances: processes of each service, which each work on one batch at a time.
        threads: of one operator on the CPU; None leaves it to ONNX Runtime.
        version: the version folder's number.
    """

    platform: Platform = "onnxruntime"
    target: str | None = None
    kind: Kind = "cpu"
    models: tuple[str, ...] = ()
    max_batch: int = 8
    queue_delay_us: int = 2000
    max_queue: int = 128
    instances: int = 1
    threads: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "instances", "version"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.queue_delay_us < 0:
            raise InputError(f"queue_delay_us {self.queue_delay_us}: expected 0 or more")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads {self.threads}: expected 1 or more, or none for ONNX Runtime's own choice")
        if self.platform == "tensorrt" and self.kind == "cpu":
            raise InputError("platform tensorrt with kind cpu: plans run on GPUs alone; give --kind gpu")


@dataclasses.dataclass(frozen=True, slots=True)
class PlanFacts:
    """What a configuration says of a plan.

    Attributes:
        profiles: how many optimization profiles it holds.
        max_batch: the largest batch that one of them takes; None where the axis is fixed.
    """

    profiles: int
    max_batch: int | None


def graph_config(name: str, graph: GraphSpec, options: TritonOptions, plan: PlanFacts | None = None) -> Message:
    """The configuration of one graph's model.

    Requests are put together where axis 0 of every tensor is the batch; other graphs take each call as it comes.

    Args:
        name: of the model.
        graph: what it takes and gives.
        options: of the repository.
        plan: where the graph is run as a TensorRT plan.

    Raises:
        BundleError: a tensor is of a type that Triton does not know.
    """
    batched = is_batched(graph)
    most = min(options.max_batch, (plan and plan.max_batch) or options.max_batch) if batched else 0
    config: Message = {
        "name": name,
        "platform": _PLATFORMS["tensorrt" if plan else "onnxruntime"],
        "max_batch_size": most,
        "input": [_tensor(name, tensor, batched) for tensor in graph.inputs],
        "output": [_tensor(name, tensor, batched) for tensor in graph.outputs],
        "instance_group": [_instances(1, options.kind)],
    }
    if plan and plan.profiles > 1:
        config["instance_group"][0]["profile"] = [str(index) for index in range(plan.profiles)]
    if batched:
        config["dynamic_batching"] = _batching(options)
    config |= {} if plan else _for_onnxruntime(options)
    config["model_warmup"] = [_warmup(graph, options, batched, most)]
    return config


def _for_onnxruntime(options: TritonOptions) -> Message:
    # What the bundle's own engine sets: all optimizations are ONNX Runtime's default, and fp32 stays fp32.
    if options.kind == "gpu":
        cuda = {"name": "cuda", "parameters": [{"key": "use_tf32", "value": "0"}]}
        return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}}
    threads = {} if options.threads is None else {"intra_op_thread_count": str(options.threads)}
    return {
        "optimization": {"input_pinned_memory": {"enable": False}, "output_pinned_memory": {"enable": False}},
        "parameters": _parameters({**threads, "inter_op_thread_count": "1", "execution_mode": "0"}),
    }


def service_config(
    name: str, tensors: ModelTensors, labels: int, batch_size: int, options: TritonOptions, *, on_device: bool
) -> Message:
    """The configuration of a python-backend model: classifier, captioner or generator.

    Args:
        name: of the model.
        tensors: what it takes and gives.
        labels: the length of an axis that the bundle decides.
        batch_size: rows that the graphs are called with at most.
        options: of the repository.
        on_device: what one graph gives another stays on the GPU.
    """
    settings = {"batch_size": str(batch_size), "tensors_on_device": "true" if on_device else "false"}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": [_service_tensor(tensor, labels) for tensor in tensors.inputs],
        "output": [_service_tensor(tensor, labels) for tensor in tensors.outputs],
        "instance_group": [_instances(options.instances, "cpu")],
        "dynamic_batching": _batching(options),
        "parameters": _parameters(settings),
    }


def _instances(count: int, kind: Kind) -> Message:
    return {"count": count, "kind": _Word(f"KIND_{kind.upper()}")}


def _batching(options: TritonOptions) -> Message:
    policy = {
        "timeout_action": _Word("REJECT"),
        "allow_timeout_override": True,
        "max_queue_size": options.max_queue,
    }
    return {
        "max_queue_delay_microseconds": options.queue_delay_us,
        "default_queue_policy": policy,
    }


def _parameters(values: Mapping[str, str]) -> list[Message]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def _data_type(model: str, tensor: TensorSpec) -> _Word:
    if tensor.dtype not in _TYPES:
        raise BundleError(
            f"{model}: {tensor.name} is {tensor.dtype}; expected one of {', '.join(_TYPES)}; export the graph in "
            "another precision"
        )
    return _Word(_TYPES[tensor.dtype])


def _tensor(model: str, tensor: TensorSpec, batched: bool) -> Message:
    own = [axis if isinstance(axis, int) else -1 for axis in tensor.shape[1 if batched else 0 :]]
    # Triton has no scalars: ONNX Runtime's backend takes one number for a scalar, and a row that is one number is
    # reshaped.
    config: Message = {"name": tensor.name, "data_type": _data_type(model, tensor), "dims": own or [1]}
    if batched and not own:
        config["reshape"] = {"shape": []}
    return config


def _service_tensor(tensor: ServiceTensor, labels: int) -> Message:
    config: Message = {
        "name": tensor.name,
        "data_type": _Word(_SERVICE_TYPES[tensor.datatype]),
        "dims": [labels if axis == ANY else axis for axis in tensor.shape],
    }
    return config | ({"optional": True} if tensor.optional else {})


def _warmup(graph: GraphSpec, options: TritonOptions, batched: bool, most: int) -> Message:
    """One run before the model counts as ready: on a GPU at the usual sizes, on a CPU with a single row."""
    sizes = {name: span.opt for name, span in default_profile(graph).axes.items()}
    if "batch" in sizes:
        sizes["batch"] = (
            min(sizes["batch"], options.max_batch, most or options.max_batch) if options.kind == "gpu" else 1
        )
    inputs = []
    for tensor in graph.inputs:
        dims = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1 if batched else 0 :]]
        value = {"data_type": _Word(_TYPES[tensor.dtype]), "dims": dims or [1], "zero_data": True}
        inputs.append({"key": tensor.name, "value": value})
    return {"name": "usual", "batch_size": sizes["batch"] if batched else 1, "inputs": inputs}


def text_from_config(config: Mapping[str, Any]) -> str:
    """A message in protobuf's text format."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(message: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in message.items():
        for one in _repeated(value):
            if isinstance(one, Mapping):
                lines += [f"{indent}{name} {{", *_lines(one, f"{indent}  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{name}: {_scalar(one)}")
    return lines


def _repeated(value: Any) -> Sequence[Any]:
    """The messages, or the one line, that a field takes; numbers and texts of a repeated field share a line."""
    if not isinstance(value, list):
        return [value]
    return value if value and isinstance(value[0], Mapping) else [value]


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, _Word):
        return str(value)
    return json.dumps(value)  # numbers, true and false, and quoted texts are the same in both formats
