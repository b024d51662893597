"""The ceilings of a run and what is held against them: rates of a matrix product and of a copy, counted operations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from mi2rage_benchmarks.probes import call_ms

if TYPE_CHECKING:
    from mi2rage_benchmarks.baselines import TorchPlace

__all__ = ["Ceilings", "CopyRate", "GemmRate", "OperationCounter", "attainable_gflops", "counted"]

T = TypeVar("T")

_SIZE, _DEVICE_SIZE = 1536, 8192

_COPY_BYTES = 128 << 20
"""Far more than caches hold, so that memory is what is measured."""

_SAMPLE_SECONDS = 0.5
"""Between two measurements of the ceilings: cells of short calls have many turns."""


class GemmRate:
    """The best rate of `torch.mm` on squares that was seen in a run, on the threads that torch is set to.

    Args:
        size: of the squares; the usual one is large enough for full speed and takes some hundredths of a second.
        device, dtype: where, and of what, e.g. `torch.bfloat16`; by default float32.
    """

    def __init__(self, size: int | None = None, device: str = "cpu", dtype: Any = None) -> None:
        import torch

        size = size or (_SIZE if device == "cpu" else _DEVICE_SIZE)
        draws = torch.Generator().manual_seed(0)
        self._left, self._right = (torch.randn(size, size, generator=draws).to(device, dtype) for _ in range(2))
        self._result = torch.empty_like(self._left)
        self._flop = 2 * size**3
        self._device = device
        self.gflops = 0.0
        self.samples_gflops: list[float] = []

    def sample(self) -> None:
        """Measure it once more: one untimed product, then one that counts if it is the best so far."""
        import torch

        def product() -> None:
            torch.mm(self._left, self._right, out=self._result)
            _finish(self._device)

        product()
        self.samples_gflops.append(self._flop / call_ms(product) / 1e6)
        self.gflops = max(self.gflops, self.samples_gflops[-1])


class CopyRate:
    """The best rate of copying memory that was seen in a run, in GB/s read and written together, on torch's threads.

    Args:
        size_bytes: of what is copied.
        device: whose memory.
    """

    def __init__(self, size_bytes: int | None = None, device: str = "cpu") -> None:
        import torch

        size_bytes = size_bytes or (_COPY_BYTES if device == "cpu" else 8 * _COPY_BYTES)
        self._device = device
        self._source = torch.ones(size_bytes // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._bytes = 2 * self._source.numel() * self._source.element_size()
        self.gbps = 0.0

    def sample(self) -> None:
        """Measure it once more: one untimed copy, then one that counts if it is the best so far."""

        def copy() -> None:
            self._target.copy_(self._source)
            _finish(self._device)

        copy()
        self.gbps = max(self.gbps, self._bytes / call_ms(copy) / 1e6)


def _finish(device: str) -> None:
    """Wait for what a device was asked to do."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


class Ceilings:
    """Both rates, measured together between turns; not more often than twice a second.

    Attributes:
        gemm, copy: the rates.
    """

    def __init__(self, gemm: GemmRate | None = None, copy: CopyRate | None = None) -> None:
        self.gemm = gemm or GemmRate()
        self.copy = copy or CopyRate()
        self._last: float | None = None

    @classmethod
    def at(cls, place: TorchPlace) -> Ceilings:
        """Those of where PyTorch's sides run, the product in their precision."""
        return cls(GemmRate(device=place.device, dtype=place.dtype), CopyRate(device=place.device))

    def sample(self) -> None:
        """Measure both once more, if the last time is long enough ago."""
        if self._last is not None and time.monotonic() - self._last < _SAMPLE_SECONDS:
            return
        self.gemm.sample()
        self.copy.sample()
        self._last = time.monotonic()


def attainable_gflops(flop: float, moved_bytes: float, gflops: float, gbps: float) -> float:
    """What the roofline allows: the product's rate, or what memory can feed at this intensity.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009: min(peak, intensity
    times bandwidth), intensity in operations a byte.
    """
    return min(gflops, flop / moved_bytes * gbps) if moved_bytes else gflops


class OperationCounter:
    """Counts the floating-point operations of matrix products, convolutions and attention, what they move, and the
    largest tensor.

    A product of (m, k) and (k, n) is 2 m k n operations; all else is left out. It moves its operands, weights among
    them, and its result, each once: what lies between such operations is taken for fused into them.

    Attributes:
        flop: operations so far. moved_bytes: what they moved.
        largest_bytes: the largest single tensor that an operation made.
    """

    def __init__(self) -> None:
        self.flop = 0
        self.moved_bytes = 0
        self.largest_bytes = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block this thread's operations are counted."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode, flop_registry

        # torch's own table lacks the kernel that CPUs take for attention.
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        operations = frozenset({kernel, *flop_registry})
        with _bytes(self, operations), FlopCounterMode(display=False, custom_mapping={kernel: _attention_flop}) as mode:
            yield
        self.flop += mode.get_total_flops()


@contextlib.contextmanager
def _bytes(counter: OperationCounter, counted_operations: frozenset[Any]) -> Iterator[None]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = [_size(item) for item in _tensors(result)]
            counter.largest_bytes = max(counter.largest_bytes, *made, 0)
            if func._overloadpacket in counted_operations:
                # Of an attention the first result is the answer; what else it gives, e.g. for gradients, nobody reads.
                counter.moved_bytes += sum(made[:1]) + sum(_size(item) for item in _tensors(args))
            return result

    def _tensors(value: Any) -> list[Any]:
        items = value if isinstance(value, tuple | list) else (value,)
        return [item for item in items if isinstance(item, torch.Tensor)]

    def _size(tensor: Any) -> int:
        return int(tensor.numel() * tensor.element_size())

    with Bytes():  # type: ignore[no-untyped-call]
        yield


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (B, heads, T, size), (B, heads, S, size), (B, heads, S, value size)."""
    batch, heads, length, size = query
    return int(2 * batch * heads * length * key[2] * (size + value[3]))


def counted(call: Callable[[], T]) -> tuple[T, OperationCounter]:
    """A call's answer and its operations."""
    counter = OperationCounter()
    with counter.counting():
        answer = call()
    return answer, counter
