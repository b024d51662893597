"""Plans on TensorRT 10, 11 and TensorRT-RTX: everything on the device, a context a profile, CUDA graphs."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_engines.cuda import Cuda, CudaArray, CudaEvent, CudaGraph
from mi2rage_engines.engine import NOTHING, Array, DeviceArray, check_buffer, checked_array, checked_inputs
from mi2rage_engines.errors import EngineError, OutsideProfileError
from mi2rage_engines.plan import Present, check_plan, read_record
from mi2rage_engines.profiles import ShapeProfile, misfit
from mi2rage_engines.spec import GraphSpec, TensorSpec
from mi2rage_engines.trt_api import TrtApi
from mi2rage_engines.trt_load import check_tensors, errors_in, load_plan
from mi2rage_engines.trt_monitor import LogLine, collected_log

logger = logging.getLogger(__name__)

__all__ = ["TrtEngine"]

_SLOT_BYTES = 65536
"""Inputs up to this size are copied to a place of the engine's own: so a CUDA graph depends on large ones alone."""
_MOST_GRAPHS = 16
_MOST_CALLS = 256
_MOST_SHAPES = 1024
_TOLERANCE = {"float16": 1e-2, "float32": 1e-3}
"""Of the largest value: kernels that add in no fixed order differ from run to run, a wrong address by far more."""

_Shapes = tuple[tuple[int, ...], ...]
_Key = tuple[object, ...]
"""Profile, shapes and addresses: all that a CUDA graph is recorded with."""


@dataclasses.dataclass
class _Context:
    """An execution context; it has no memory of its own."""

    handle: Any
    scratch: int = 0
    shapes: _Shapes | None = None


@dataclasses.dataclass
class _Recorded:
    """A CUDA graph, and the context it was recorded from, which must stay as it was then."""

    graph: CudaGraph
    context: _Context


class TrtEngine:
    """One plan. Its results are `CudaArray`s; host arrays are copied to the device and, by `run`, back.

    All engines of a `Cuda` run on its one stream, compute in one scratch memory, and may be used from any thread:
    calls take turns. On TensorRT a call that comes again with the same shapes and addresses is recorded as a CUDA
    graph, compared once with what the plan gives without it, and replayed from then on; TensorRT-RTX records its own.

    Args:
        plan: the file; its record lies beside it.
        graph: what it was built from.
        api: the library.
        cuda: stream and memory, see `default_cuda`.
        present: what is here, which the plan must have been built for.
        cuda_graphs: whether CUDA graphs are used.

    Raises:
        BundleError: the plan was built for something else, or is damaged.
        EngineError: the library does not load it.
    """

    device = "cuda"

    def __init__(
        self, plan: Path, graph: GraphSpec, api: TrtApi, cuda: Cuda, *, present: Present, cuda_graphs: bool = True
    ) -> None:
        record = read_record(plan)
        check_plan(plan, record, present)
        self._path, self._graph, self._api, self._cuda = plan, graph, api, cuda
        self._profiles = [ShapeProfile(axes) for axes in record.request.profiles] or [ShapeProfile({})]
        # RTX compiles kernels for the shapes it meets while it runs, and knows itself when they can be recorded.
        self._records_itself = cuda_graphs and hasattr(api.module, "CudaGraphStrategy")
        self._records = cuda_graphs and not self._records_itself
        self._contexts: dict[int, _Context] = {}
        self._output_shapes: dict[_Shapes, dict[str, tuple[int, ...]]] = {}
        self._graphs: OrderedDict[_Key, _Recorded | None] = OrderedDict()  # None: without one
        self._once: OrderedDict[_Key, None] = OrderedDict()
        with cuda.turn(), collected_log(api) as (collector, lines):
            self._runtime, self._engine = load_plan(plan, api, collector, lines)  # it must outlive its engine
            self._bound = check_tensors(plan, self._engine, graph, api, len(self._profiles))
            sizes = [self._engine.get_device_memory_size_for_profile_v2(index) for index in range(len(self._profiles))]
            self._scratch_bytes = max(sizes)
            cuda.scratch(self._scratch_bytes)
            one_byte = np.dtype(np.uint8)
            self._slots = {name: cuda.empty((_SLOT_BYTES,), one_byte) for name in self._bound_inputs}

    @property
    def name(self) -> str:
        """The plan's path."""
        return str(self._path)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in its order."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in its order."""
        return self._graph.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the plan once; see `Engine.run`."""
        return {name: value.numpy() for name, value in self.call(inputs).items()}

    def put(self, array: Array, name: str) -> DeviceArray:
        """See `Engine.put`."""
        checked = checked_array(self.name, self.inputs, array, name)
        with self._cuda.turn():
            return self._cuda.put(checked)

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        """Run the plan once; see `Engine.call`."""
        feeds = checked_inputs(self.name, self.inputs, inputs)
        profile = self._profile_for({name: tuple(value.shape) for name, value in feeds.items()})
        with self._cuda.turn(), collected_log(self._api) as (_, lines):
            # Held until the work is on the stream; what is freed after that is used again only behind it.
            placed = {name: self._placed(name, feeds[name]) for name in self._bound_inputs}
            shapes: _Shapes = tuple(tuple(feeds[name].shape) for name in self._bound_inputs)
            outputs = self._outputs_for(profile, shapes, into, lines)
            taken = {array.address for array in placed.values()}
            if clash := [name for name, array in outputs.items() if array.address in taken]:
                raise EngineError(
                    f"{self.name}: the buffer of output {clash[0]} is an input of the same call; expected another one"
                )
            self._execute(profile, shapes, {**placed, **outputs}, lines)
        return {name: self._settled(name, array, into) for name, array in outputs.items()}

    def mark(self) -> CudaEvent:
        """A point behind all calls so far, to take the time by: `call` returns before its work is done."""
        with self._cuda.turn():
            return self._cuda.mark()

    @property
    def _bound_inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs if spec.name in self._bound)

    def _profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The narrowest profile that holds the shapes: its kernels were chosen for sizes like these."""
        fitting = [
            index for index, profile in enumerate(self._profiles) if misfit([profile], self.inputs, shapes) is None
        ]
        if not fitting:
            held = " or ".join(map(str, self._profiles))
            raise OutsideProfileError(
                f"{self.name}: {misfit(self._profiles, self.inputs, shapes)}; expected what it was built for, {held}; "
                "give such shapes, or build the plan again with a wider --profile"
            )
        return min(fitting, key=lambda index: math.prod(span.max for span in self._profiles[index].axes.values()))

    def _placed(self, name: str, value: Array | DeviceArray) -> CudaArray:
        """An input on the device: a small one in its slot, whose address never changes."""
        slot = self._slots[name]
        if isinstance(value, CudaArray):
            if value.nbytes > _SLOT_BYTES:
                return value
            self._cuda.copy(slot, value)
            return slot
        array = np.asarray(value if isinstance(value, np.ndarray) else value.numpy())
        if array.nbytes > _SLOT_BYTES:
            return self._cuda.put(array)
        self._cuda.write(slot, array)
        return slot

    def _outputs_for(
        self, profile: int, shapes: _Shapes, into: Mapping[str, DeviceArray], lines: Sequence[LogLine]
    ) -> dict[str, CudaArray]:
        if shapes not in self._output_shapes:
            if len(self._output_shapes) == _MOST_SHAPES:
                self._output_shapes.clear()
            context = self._shaped(self._context(profile, lines), shapes, lines)
            found = {spec.name: tuple(context.handle.get_tensor_shape(spec.name)) for spec in self.outputs}
            unknown = [name for name, shape in found.items() if any(size < 0 for size in shape)]
            if unknown:
                raise EngineError(
                    f"{self.name}: the shape of output {unknown[0]} depends on the values of the inputs; expected one "
                    "that follows from their shapes; run this graph on ONNX Runtime (--backend ort-cuda)"
                )
            self._output_shapes[shapes] = found
        outputs = {}
        for spec in self.outputs:
            shape, dtype, buffer = self._output_shapes[shapes][spec.name], np.dtype(spec.dtype), into.get(spec.name)
            if buffer is not None:
                check_buffer(self.name, spec.name, buffer, shape, dtype)
            outputs[spec.name] = buffer if isinstance(buffer, CudaArray) else self._cuda.empty(shape, dtype)
        return outputs

    def _settled(self, name: str, array: CudaArray, into: Mapping[str, DeviceArray]) -> DeviceArray:
        """The caller's buffer in place of an output, copied into it where it is of another kind."""
        buffer = into.get(name)
        if buffer is None or isinstance(buffer, CudaArray):
            return array
        buffer.numpy()[...] = array.numpy()
        return buffer

    def _context(self, profile: int, lines: Sequence[LogLine]) -> _Context:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile, lines)
        return self._contexts[profile]

    def _new_context(self, profile: int, lines: Sequence[LogLine]) -> _Context:
        trt = self._api.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._records_itself:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            handle = self._engine.create_execution_context(config)
        else:
            handle = self._engine.create_execution_context(managed)
        if handle is None or not handle.set_optimization_profile_async(profile, self._cuda.stream):
            raise self._failure("cannot make a context", lines)
        return _Context(handle)

    def _shaped(self, context: _Context, shapes: _Shapes, lines: Sequence[LogLine]) -> _Context:
        scratch = self._cuda.scratch(self._scratch_bytes)
        if context.scratch != scratch.address:
            context.handle.set_device_memory(scratch.address, scratch.nbytes)
            context.scratch = scratch.address
        if context.shapes != shapes:
            context.shapes = None
            for name, shape in zip(self._bound_inputs, shapes, strict=True):
                if not context.handle.set_input_shape(name, shape):
                    raise self._failure(f"refuses the shape {shape} of input {name}", lines)
            context.shapes = shapes
        return context

    def _execute(
        self, profile: int, shapes: _Shapes, tensors: Mapping[str, CudaArray], lines: Sequence[LogLine]
    ) -> None:
        scratch = self._cuda.scratch(self._scratch_bytes).address
        key = (profile, shapes, scratch, *(array.address for array in tensors.values()))
        if (known := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            known.graph.launch()
            return
        self._enqueue(self._context(profile, lines), shapes, tensors, lines)
        if not self._records or key in self._graphs:
            return
        if key not in self._once:
            self._once[key] = None
            if len(self._once) > _MOST_CALLS:
                self._once.popitem(last=False)
            return
        del self._once[key]
        self._graphs[key] = self._recorded(profile, shapes, tensors, lines)
        if len(self._graphs) > _MOST_GRAPHS:
            self._cuda.synchronize()  # it may still run
            self._graphs.popitem(last=False)

    def _enqueue(
        self, context: _Context, shapes: _Shapes, tensors: Mapping[str, CudaArray], lines: Sequence[LogLine]
    ) -> None:
        self._shaped(context, shapes, lines)
        for name, array in tensors.items():
            if not context.handle.set_tensor_address(name, array.address):
                raise self._failure(f"refuses the address of {name}", lines)
        if not context.handle.execute_async_v3(self._cuda.stream):
            raise self._failure("failed", lines)

    def _recorded(
        self, profile: int, shapes: _Shapes, tensors: Mapping[str, CudaArray], lines: Sequence[LogLine]
    ) -> _Recorded | None:
        """A CUDA graph of the call whose outputs were just computed; None where there is none that gives the same.

        The context is the graph's own: changing one after its work was recorded leaves the graph undefined.
        """
        outputs = {spec.name: tensors[spec.name] for spec in self.outputs}
        eager = {name: array.numpy() for name, array in outputs.items()}
        try:
            context = self._new_context(profile, lines)
            self._enqueue(context, shapes, tensors, lines)  # what a first run sets up cannot be recorded
            self._cuda.synchronize()
            graph = self._cuda.capture(lambda: self._enqueue(context, shapes, tensors, lines))
            for array in outputs.values():
                self._cuda.fill(array, 0xFF)  # NaN: a graph that writes elsewhere shall not pass
            graph.launch()
            differing = [name for name, array in outputs.items() if not _agree(eager[name], array.numpy())]
            problem = f"gives another {', '.join(differing)}" if differing else ""
        except EngineError as error:
            problem = f"cannot be recorded ({error})"
        if not problem:
            return _Recorded(graph, context)
        logger.warning("%s: its CUDA graph %s; going on without it, on %s", self.name, problem, _text(shapes))
        self._enqueue(self._context(profile, lines), shapes, tensors, lines)
        return None

    def _failure(self, what: str, lines: Iterable[LogLine]) -> EngineError:
        return EngineError(
            f"{self.name}: {self._api.label} {what}{errors_in(lines)}; expected it to run; try a smaller batch, or "
            "another --backend"
        )


def _text(shapes: _Shapes) -> str:
    return ", ".join(map(str, shapes))


def _agree(eager: Array, replayed: Array) -> bool:
    if eager.dtype.kind != "f":
        return np.array_equal(eager, replayed)
    finite = np.isfinite(eager)
    if not np.array_equal(finite, np.isfinite(replayed)):
        return False
    known, again = eager[finite].astype(np.float64), replayed[finite].astype(np.float64)
    bound = _TOLERANCE.get(str(eager.dtype), 1e-3) * np.abs(known).max(initial=0.0)
    return bool((np.abs(known - again) <= bound).all())
