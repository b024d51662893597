"""Graphs on ONNX Runtime, on the CPU or a GPU."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_engines.engine import NOTHING, Array, DeviceArray, check_buffer, checked_array, checked_inputs
from mi2rage_engines.errors import EngineError, require
from mi2rage_engines.plan_cache import default_cache_folder
from mi2rage_engines.spec import TensorSpec

logger = logging.getLogger(__name__)

__all__ = ["OrtEngine", "default_providers", "usable_cores"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


def usable_cores() -> int:
    """The cores this process may run on, which in a container are fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def default_providers() -> tuple[str, ...]:
    """ONNX Runtime's providers in the order we use them: CUDA where this build has it, then the CPU."""
    available = require("onnxruntime", "cpu").get_available_providers()
    return tuple(provider for provider in _PREFERRED if provider in available)


def _spec_from_node(node: Any) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int | str) else "" for axis in node.shape)
    return TensorSpec(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)


def _options(ort: Any, threads: int, frugal: bool) -> Any:
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not frugal
    # Packed weights are copies: those that lie beside a graph are mapped, and shared, as long as nobody packs them.
    options.add_session_config_entry("session.disable_prepacking", str(int(frugal)))
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The last level lays convolutions' weights out anew, which is a copy of them too.
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if frugal else level.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Graphs that are called in turn (image and text, vision and decoder) would spin against each other's threads:
    # 164 ms instead of 93 for a classification on two cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _with_options(provider: str, path: Path, limit_bytes: int | None) -> str | tuple[str, dict[str, str]]:
    if provider == "CUDAExecutionProvider":
        # TF32 is on by default and costs three digits: the parity of fp32 graphs is promised to 1e-4.
        options = {"use_tf32": "0"}
        if limit_bytes is not None:
            # The arena would double at each growth, and the search for the fastest convolution tries those that need
            # much memory, outside of the limit.
            options |= {"gpu_mem_limit": str(limit_bytes), "arena_extend_strategy": "kSameAsRequested"}
            options["cudnn_conv_algo_search"] = "HEURISTIC"
        return provider, options
    if provider == "TensorrtExecutionProvider":
        folder = default_cache_folder() / "ort-tensorrt"
        engines = folder / _state_of(path)
        with contextlib.suppress(OSError):  # where nothing can be kept, each run builds
            engines.mkdir(parents=True, exist_ok=True)
        # Builds take minutes: they are kept, and the kernels' times too. The graphs themselves say what is in fp16.
        return provider, {
            "trt_fp16_enable": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return provider


def _state_of(path: Path) -> str:
    """A name for a graph's files as they are now: the provider's own key says nothing of the weights."""
    files = [file for file in sorted(path.parent.glob(f"{glob.escape(path.name)}*")) if file.is_file()]
    stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(stats).encode()).hexdigest()[:24]


class _HostView:
    """What an `OrtValue` holds, as NumPy takes it, with its memory kept: on the CPU `OrtValue.numpy` is a bare view."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._array = value.numpy()
        self.__array_interface__ = self._array.__array_interface__


class _OrtArray:
    """A `DeviceArray` that is an `OrtValue`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_DTYPES[self.value.data_type()])

    def numpy(self) -> Array:
        return np.asarray(_HostView(self.value))


class OrtEngine:
    """One ONNX file in an ONNX Runtime session.

    Args:
        path: the `.onnx` file; external data lies beside it.
        providers: execution providers in order of preference; by default `default_providers()`.
        threads: CPU threads of one operator; by default the cores this process may use.
        frugal: take as little memory as can be on the CPU, at the price of slower runs: weights are neither packed nor
            laid out anew, which is a second copy of most, and what one run took is not kept for the next.
        device_memory_limit_bytes: what this graph's arena on CUDA may take, weights included.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: a provider is not available, or the file cannot be loaded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        frugal: bool = False,
        device_memory_limit_bytes: int | None = None,
    ) -> None:
        ort = require("onnxruntime", "cpu")
        self._path = Path(path)
        chosen = tuple(providers) if providers else default_providers()
        available = ort.get_available_providers()
        unknown = [provider for provider in chosen if provider not in available]
        if unknown:
            raise EngineError(
                f"onnxruntime: provider {', '.join(unknown)} is not in this build; it has {', '.join(available)}; "
                "choose one of them, or install another build (see 'mi2rage-rt doctor')"
            )
        if not self._path.is_file():
            raise EngineError(f"{path}: no such file; expected an ONNX graph; export the model again")
        try:
            self._session = ort.InferenceSession(
                str(self._path),
                sess_options=_options(ort, threads or usable_cores(), frugal),
                providers=[_with_options(provider, self._path, device_memory_limit_bytes) for provider in chosen],
            )
        except Exception as error:  # the binding has a class for each status code and no common base
            raise EngineError(
                f"{path}: onnxruntime cannot load it ({_first_line(error)}); export the model again, or see whether "
                f"onnxruntime {ort.__version__} is too old for it"
            ) from error
        if self.providers[0] != chosen[0]:
            logger.warning("%s: %s could not start; running on %s", path, chosen[0], self.providers[0])
        self._inputs = tuple(_spec_from_node(node) for node in self._session.get_inputs())
        self._outputs = tuple(_spec_from_node(node) for node in self._session.get_outputs())

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self._path)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in its order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in its order."""
        return self._outputs

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the session really uses."""
        return tuple(self._session.get_providers())

    @property
    def device(self) -> str:
        """`cpu` or `cuda`, where `put` and `call` leave their results."""
        return "cuda" if self.providers[0] in _ON_CUDA else "cpu"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; see `Engine.run`."""
        feeds = checked_inputs(self.name, self._inputs, inputs)
        with self._explained(feeds):
            results = self._session.run(None, feeds)
        return {spec.name: result for spec, result in zip(self._outputs, results, strict=True)}

    def put(self, array: Array, name: str) -> DeviceArray:
        """See `Engine.put`."""
        return self._put(checked_array(self.name, self._inputs, array, name))

    def _put(self, array: Array) -> _OrtArray:
        return _OrtArray(require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy(array, self.device, 0))

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        """Run the graph once by IO binding; see `Engine.call`."""
        feeds = checked_inputs(self.name, self._inputs, inputs)
        binding = self._session.io_binding()
        for name, value in feeds.items():
            on_device = value if isinstance(value, _OrtArray) else self._put(_on_host(value))
            binding.bind_ortvalue_input(name, on_device.value)
        for spec in self._outputs:
            buffer = into.get(spec.name)
            if isinstance(buffer, _OrtArray):
                binding.bind_ortvalue_output(spec.name, buffer.value)
            else:
                binding.bind_output(spec.name, self.device)
        with self._explained(feeds):
            self._session.run_with_iobinding(binding)
        found = zip(self._outputs, binding.get_outputs(), strict=True)
        results: dict[str, DeviceArray] = {spec.name: _OrtArray(value) for spec, value in found}
        return {name: self._settled(name, value, into) for name, value in results.items()}

    def _settled(self, name: str, value: DeviceArray, into: Mapping[str, DeviceArray]) -> DeviceArray:
        """The caller's buffer in place of an output, copied into it where it is of another kind."""
        buffer = into.get(name)
        if buffer is None or isinstance(buffer, _OrtArray):
            return value
        check_buffer(self.name, name, buffer, value.shape, value.dtype)
        buffer.numpy()[...] = value.numpy()
        return buffer

    @contextlib.contextmanager
    def _explained(self, feeds: Mapping[str, Array | DeviceArray]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the binding has a class for each status code and no common base
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
            raise EngineError(
                f"{self.name}: onnxruntime failed ({_first_line(error)}) on {shapes}; "
                "try a smaller batch or other sizes"
            ) from error


def _on_host(value: Array | DeviceArray) -> Array:
    return value if isinstance(value, np.ndarray) else value.numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
