"""A GPU of plain memory behind the CUDA driver's functions, and a TensorRT whose kernel runs on it.

Strict where a real one only may be: nothing on the stream runs before it is waited for, freed memory is overwritten, a
copy from the host reads the host's memory late, addresses need 64 bits, and a CUDA graph whose context was changed
after the recording gives rubbish.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

BASE = 0x7F00_0000_0000
NOT_PERMITTED = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
Work = Callable[[], None]


def value_of(argument: Any) -> int:
    return int(argument if isinstance(argument, int) else argument.value or 0)


class Driver:
    """The calls of libcuda that `cuda.py` makes; `fail` names one that is to return an error, and which."""

    def __init__(self, size: int = 1 << 25) -> None:
        self.memory = np.zeros(size, np.uint8)
        self.free: list[tuple[int, int]] = [(0, size)]
        self.sizes: dict[int, int] = {}
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.depth = self.launches = self.handles = 0
        self.events: dict[int, float | None] = {}  # when each was reached, by a clock that a run of work moves on
        self.now_ms = 0.0
        self.fail: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if not name.startswith("cu") or name == "cuGetErrorName":
            return attribute
        code = self.fail.get(name, 0)
        needs_context = name not in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2")
        if needs_context and not self.depth:
            return lambda *arguments: 201  # CUDA_ERROR_INVALID_CONTEXT
        return (lambda *arguments: code) if code else lambda *arguments: attribute(*arguments) or 0

    def enqueue(self, work: Work) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def at(self, address: int, size: int) -> np.ndarray:
        start = address - BASE
        held = next(((s, n) for s, n in self.sizes.items() if s <= start and start + size <= s + n), None)
        assert held is not None, "outside of what was allocated"
        return self.memory[start : start + size]

    def cuInit(self, flags: int) -> None: ...  # noqa: N802

    def cuDeviceGet(self, device: Any, index: int) -> None: ...  # noqa: N802

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:  # noqa: N802
        context._obj.value = 7

    def cuCtxPushCurrent_v2(self, context: Any) -> None:  # noqa: N802
        assert context.value == 7
        self.depth += 1

    def cuCtxPopCurrent_v2(self, context: Any) -> None:  # noqa: N802
        self.depth -= 1

    def cuStreamCreate(self, stream: Any, flags: int) -> None:  # noqa: N802
        assert flags == 1
        stream._obj.value = 0x55_0000_0001

    def cuDeviceGetDefaultMemPool(self, pool: Any, device: Any) -> None:  # noqa: N802
        pool._obj.value = 9

    def cuMemPoolSetAttribute(self, pool: Any, attribute: int, value: Any) -> None:  # noqa: N802
        assert (pool.value, attribute, value._obj.value) == (9, 4, 2**64 - 1)

    def cuMemAllocAsync(self, address: Any, size: Any, stream: Any) -> int | None:  # noqa: N802
        if self.recording is not None:
            return NOT_PERMITTED
        wanted = -(-size.value // 256) * 256
        for index, (start, room) in enumerate(self.free):
            if room >= wanted:
                self.free[index] = (start + wanted, room - wanted)
                self.sizes[start] = wanted
                address._obj.value = BASE + start
                return None
        return 2

    def cuMemFreeAsync(self, address: Any, stream: Any) -> int | None:  # noqa: N802
        if self.recording is not None:
            return NOT_PERMITTED
        start = address.value - BASE
        size = self.sizes.pop(start)
        self.free.insert(0, (start, size))
        self.enqueue(lambda: self.memory[start : start + size].fill(0xCD))
        return None

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:  # noqa: N802
        self.at(to.value, size.value)
        start, end = to.value - BASE, to.value - BASE + size.value

        def copy() -> None:
            self.memory[start:end] = np.frombuffer(ctypes.string_at(source.value, size.value), np.uint8)

        self.enqueue(copy)

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:  # noqa: N802
        view = self.at(source.value, size.value)
        self.enqueue(lambda: ctypes.memmove(to.value, view.tobytes(), size.value))

    def cuMemcpyDtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:  # noqa: N802
        target, view = self.at(to.value, size.value), self.at(source.value, size.value)
        self.enqueue(lambda: np.copyto(target, view))

    def cuMemsetD8Async(self, to: Any, byte: Any, size: Any, stream: Any) -> None:  # noqa: N802
        target = self.at(to.value, size.value)
        self.enqueue(lambda: target.fill(byte.value))

    def cuStreamSynchronize(self, stream: Any) -> int | None:  # noqa: N802
        if self.recording is not None:
            return NOT_PERMITTED
        queue, self.queue = self.queue, []
        for work in queue:
            work()
            self.now_ms += 0.5
        return None

    def cuEventCreate(self, event: Any, flags: int) -> None:  # noqa: N802
        assert flags == 0  # with the flag that turns the time off there would be none
        self.handles += 1
        event._obj.value = self.handles
        self.events[self.handles] = None

    def cuEventRecord(self, event: Any, stream: Any) -> None:  # noqa: N802
        handle = event.value
        self.enqueue(lambda: self.events.update({handle: self.now_ms}))

    def cuEventSynchronize(self, event: Any) -> None:  # noqa: N802
        if self.events[event.value] is None:
            self.cuStreamSynchronize(None)

    def cuEventElapsedTime(self, elapsed: Any, start: Any, end: Any) -> int | None:  # noqa: N802
        first, last = self.events[start.value], self.events[end.value]
        if first is None or last is None:
            return 600  # CUDA_ERROR_NOT_READY
        elapsed._obj.value = last - first
        return None

    def cuEventDestroy_v2(self, event: Any) -> None:  # noqa: N802
        del self.events[event.value]

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> None:  # noqa: N802
        assert mode == 1 and self.recording is None
        self.recording = []

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> None:  # noqa: N802
        self.handles += 1
        graph._obj.value = self.handles
        self.graphs[self.handles] = self.recording or []
        self.recording = None

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> None:  # noqa: N802
        self.handles += 1
        executable._obj.value = self.handles
        self.graphs[self.handles] = self.graphs[graph.value]

    def cuGraphDestroy(self, graph: Any) -> None:  # noqa: N802
        del self.graphs[graph.value]

    def cuGraphExecDestroy(self, executable: Any) -> None:  # noqa: N802
        del self.graphs[executable.value]

    def cuGraphLaunch(self, executable: Any, stream: Any) -> None:  # noqa: N802
        self.launches += 1
        self.queue += self.graphs[executable.value]

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = f"CUDA_ERROR_{code}".encode()
        return 0


class Context:
    """Runs `y = x * scale + 1` by way of the scratch memory, and `count`, the elements of each row above 0."""

    def __init__(self, engine: Engine, strategy: Any) -> None:
        assert strategy == "USER_MANAGED"
        self.engine, self.driver = engine, engine.driver
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch, self.version, self.is_set_up, self.profile = (0, 0), 0, False, -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch, self.version = (address, size), self.version + 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.batches[self.profile]
        self.shapes[name], self.version, self.is_set_up = shape, self.version + 1, False
        return name != "x" or low <= shape[0] <= high

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "y" else (self.shapes["x"][0] if not self.engine.is_open else -1,)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.addresses.get(name) != address:
            self.version += 1
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0x55_0000_0001
        is_recorded = self.driver.recording is not None
        if (is_recorded and (not self.is_set_up or not self.engine.is_recordable)) or self.engine.fails:
            return False
        self.is_set_up = True
        self.engine.runs.append((self.profile, is_recorded))
        at, shape, addresses, version = self.driver.at, self.shapes["x"], dict(self.addresses), self.version
        size, (memory, room) = 4 * shape[0] * shape[1], self.scratch
        assert room >= size, "too little scratch memory"
        wrong = self.engine.replay_error if is_recorded else 0.0

        def kernel() -> None:
            x = at(addresses["x"], size).view(np.float32)
            scratch, y = at(memory, size).view(np.float32), at(addresses["y"], size).view(np.float32)
            scratch[:] = x * at(addresses["scale"], 4).view(np.float32)
            y[:] = scratch + 1 + wrong if not is_recorded or self.version == version else -777
            at(addresses["count"], 8 * shape[0]).view(np.int64)[:] = (x.reshape(shape) > 0).sum(1)

        self.driver.enqueue(kernel)
        return True


class Engine:
    """The loaded plan; its attributes say what is to go wrong."""

    def __init__(self, driver: Driver, batches: list[tuple[int, int]], width: int) -> None:
        self.driver, self.batches, self.width = driver, batches, width
        self.kinds = {"x": "FLOAT", "scale": "FLOAT", "y": "FLOAT", "count": "INT64"}
        self.locations: dict[str, str] = {}
        self.num_optimization_profiles = len(batches)
        self.is_recordable, self.is_open, self.fails, self.replay_error = True, False, False, 0.0
        self.runs: list[tuple[int, bool]] = []
        self.contexts: list[Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.kinds)

    def get_tensor_name(self, index: int) -> str:
        return list(self.kinds)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kinds[name])

    def get_tensor_location(self, name: str) -> str:
        return self.locations.get(name, "DEVICE")

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 4 * self.batches[index][1] * self.width

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy="DISABLED")
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, how: Any) -> Context:
        self.config = how
        self.contexts.append(Context(self, getattr(how, "strategy", how)))
        return self.contexts[-1]


def module_parts(engine: Engine | None, **extra: Any) -> dict[str, Any]:
    """What `fake_api` is given beside its own, to load `engine` from any plan, or from none."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: Any) -> Engine | None:
            assert bytes(content) == b"a plan"
            if engine is None:
                self.logger.log(SimpleNamespace(name="ERROR"), "no such GPU")
            return engine

    return {
        "Runtime": Runtime,
        "ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        "TensorLocation": SimpleNamespace(DEVICE="DEVICE", HOST="HOST"),
        **extra,
    }
