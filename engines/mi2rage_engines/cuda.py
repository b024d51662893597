"""What engines on device memory need of CUDA, by the driver's library: a stream, memory, copies, graphs, events.

The driver and not the runtime (`libcudart`): wherever a GPU works there is `libcuda`, of one name, and streams and
memory of its primary context are those that TensorRT, ONNX Runtime and PyTorch use.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mi2rage_engines.engine import Array
from mi2rage_engines.errors import EngineError

__all__ = ["Cuda", "CudaArray", "CudaEvent", "CudaGraph", "default_cuda"]

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor that for it
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate during a capture
_RELEASE_THRESHOLD = 4  # CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
_KEEP_ALL = 2**64 - 1
_SMALL_BYTES, _MOST_SOURCES = 65536, 1024


class CudaArray:
    """A `DeviceArray` in a GPU's memory, C-contiguous; the memory is given back when nobody holds it any more.

    Args:
        cuda: whose memory, and on whose stream it is used.
        shape, dtype: its sizes and type.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda = cuda
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self.address = cuda._allocate(max(self.nbytes, 1))  # an empty tensor needs an address too

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._cuda._release("cuMemFreeAsync", self.address)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """What its elements take."""
        return math.prod(self._shape) * self._dtype.itemsize

    def numpy(self) -> Array:
        """A copy on the host, after all work that was given to the stream before."""
        return self._cuda.fetch(self)


class CudaGraph:
    """Work of the stream, recorded once and launched as a whole; memory that it uses must outlive it."""

    def __init__(self, cuda: Cuda, handle: int) -> None:
        self._cuda, self._handle = cuda, handle

    def __del__(self) -> None:
        self._cuda._release("cuGraphExecDestroy", self._handle)

    def launch(self) -> None:
        """Put the recorded work on the stream.

        Raises:
            EngineError: the driver refused.
        """
        self._cuda._do("cuGraphLaunch", ctypes.c_void_p(self._handle), self._cuda._stream)


class CudaEvent:
    """A point of the stream that knows when the GPU came by it, see `Cuda.mark`."""

    def __init__(self, cuda: Cuda) -> None:
        handle = ctypes.c_void_p()
        cuda._do("cuEventCreate", ctypes.byref(handle), 0)
        self._cuda, self._handle = cuda, int(handle.value or 0)
        cuda._do("cuEventRecord", handle, cuda._stream)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._cuda._release("cuEventDestroy_v2", self._handle)

    def ms_since(self, earlier: CudaEvent) -> float:
        """Milliseconds on the GPU's clock, to about half a microsecond, from an earlier point; waits for this one.

        Raises:
            EngineError: the work before it failed.
        """
        elapsed = ctypes.c_float()
        here, there = ctypes.c_void_p(self._handle), ctypes.c_void_p(earlier._handle)
        with self._cuda.turn():
            self._cuda._do("cuEventSynchronize", here)
            self._cuda._do("cuEventElapsedTime", ctypes.byref(elapsed), there, here)
        return elapsed.value


class Cuda:
    """One stream of the first GPU, on which everything of ours runs in the order given.

    So memory may be given back, used anew, and shared by several engines as soon as the work that uses it was put on
    the stream. Threads take turns by `turn`; every method but `turn` and the arrays' own is called inside of it.

    Args:
        driver: the CUDA driver's library; by default the installed one.

    Raises:
        EngineError: there is no driver, or it refuses.
    """

    def __init__(self, driver: Any | None = None) -> None:
        self._driver = driver or _load_driver()
        self._lock = threading.RLock()
        self._garbage: collections.deque[tuple[str, int]] = collections.deque()
        self._sources: list[Array] = []  # that the driver may still read
        self._scratch: CudaArray | None = None
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuInit", 0)
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        with self.turn():
            self._do("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
            self._stream = stream
            # What was freed stays with the process: a loop gets the same addresses again, at no cost.
            pool, threshold = ctypes.c_void_p(), ctypes.c_uint64(_KEEP_ALL)
            self._do("cuDeviceGetDefaultMemPool", ctypes.byref(pool), device)
            self._do("cuMemPoolSetAttribute", pool, _RELEASE_THRESHOLD, ctypes.byref(threshold))

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Make the GPU's context this thread's, and let no other thread put work on the stream."""
        with self._lock:
            self._do("cuCtxPushCurrent_v2", self._context)
            try:
                yield
            finally:
                self._do("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> CudaArray:
        """Memory with whatever was in it.

        Raises:
            EngineError: the GPU's memory is full.
        """
        return CudaArray(self, shape, dtype)

    def put(self, array: Array) -> CudaArray:
        """A copy of a host array on the device; the array may change right after."""
        placed = self.empty(array.shape, array.dtype)
        self.write(placed, array)
        return placed

    def write(self, target: CudaArray, array: Array) -> None:
        """Copy a host array to the front of a device array, of any dtype, that is no smaller.

        The array may change right after: the driver may still read what it was given, so it is given a copy of what is
        small, and waited for with what is large.
        """
        if not array.nbytes:
            return
        is_small = array.nbytes <= _SMALL_BYTES
        source = np.array(array, order="C") if is_small else np.ascontiguousarray(array)
        size, address = ctypes.c_size_t(source.nbytes), ctypes.c_void_p(source.ctypes.data)
        self._do("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target.address), address, size, self._stream)
        self._sources.append(source)
        if not is_small or len(self._sources) == _MOST_SOURCES:
            self.synchronize()

    def copy(self, target: CudaArray, source: CudaArray) -> None:
        """Copy a device array to the front of another that is no smaller."""
        if source.nbytes:
            addresses = (ctypes.c_uint64(target.address), ctypes.c_uint64(source.address))
            self._do("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(source.nbytes), self._stream)

    def fill(self, target: CudaArray, byte: int) -> None:
        """Set every byte."""
        if target.nbytes:
            size = ctypes.c_size_t(target.nbytes)
            self._do("cuMemsetD8Async", ctypes.c_uint64(target.address), ctypes.c_ubyte(byte), size, self._stream)

    def fetch(self, source: CudaArray) -> Array:
        """A copy on the host. It takes its turn itself."""
        array = np.empty(source.shape, source.dtype)
        with self.turn():
            if array.nbytes:
                address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
                self._do("cuMemcpyDtoHAsync_v2", address, ctypes.c_uint64(source.address), size, self._stream)
            self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for everything on the stream.

        Raises:
            EngineError: some of it failed.
        """
        self._do("cuStreamSynchronize", self._stream)
        self._sources.clear()
        self._sweep()

    def mark(self) -> CudaEvent:
        """A point behind everything that was given to the stream so far."""
        return CudaEvent(self)

    def scratch(self, size: int) -> CudaArray:
        """The memory that engines compute in, at least `size` bytes and one for all: on one stream none overlap.

        It moves when it grows; who has noted the address compares it.
        """
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = None
            self._scratch = self.empty((size,), np.dtype(np.uint8))
        return self._scratch

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` puts on the stream, which does not run.

        Raises:
            EngineError: some of it cannot be recorded; the stream goes on as if nothing had been.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))  # leaves the mode, even where it fails
            if graph.value:
                self._driver.cuGraphDestroy(graph)
            raise
        self._do("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._do("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._driver.cuGraphDestroy(graph)
        return CudaGraph(self, int(executable.value or 0))

    def _allocate(self, size: int) -> int:
        self._sweep()
        address = ctypes.c_uint64()
        self._do("cuMemAllocAsync", ctypes.byref(address), ctypes.c_size_t(size), self._stream)
        return address.value

    def _release(self, function: str, handle: int) -> None:
        """Note what is to be given back. Python may collect it in any thread, and in the middle of a capture."""
        self._garbage.append((function, handle))

    def _sweep(self) -> None:
        while self._garbage:
            function, handle = self._garbage.popleft()
            if function == "cuMemFreeAsync":
                self._do(function, ctypes.c_uint64(handle), self._stream)
            else:
                self._do(function, ctypes.c_void_p(handle))

    def _do(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise EngineError(
                "CUDA: the GPU's memory is full; expected room for the weights and the batch; give a smaller "
                "--batch-size, or stop what else uses the GPU (see nvidia-smi)"
            )
        if code:
            raise EngineError(
                f"CUDA: {function} failed with {self._name_of(code)}; expected a GPU and a driver that work; see "
                "whether nvidia-smi does, or give --backend ort-cpu"
            )

    def _name_of(self, code: int) -> str:
        name = ctypes.c_char_p()
        known = self._driver.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value is not None
        return f"{name.value.decode()} ({code})" if known and name.value else f"error {code}"


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"CUDA: no driver ({error}); expected an NVIDIA GPU with its driver; give --backend ort-cpu"
        ) from error


@functools.cache
def default_cuda() -> Cuda:
    """The process's own: engines of all bundles share its stream, its memory and its scratch.

    Raises:
        EngineError: see `Cuda`.
    """
    return Cuda()
