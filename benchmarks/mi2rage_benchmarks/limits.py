"""The ceiling of a run and what is held against it: the rate of a matrix product, and counted operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mi2rage_benchmarks.probes import call_ms

__all__ = ["GemmRate", "OperationCounter", "counted"]

T = TypeVar("T")

_SIZE = 1536


class GemmRate:
    """The best rate of `torch.mm` on float32 squares that was seen in a run, on the threads that torch is set to.

    Args:
        size: of the squares; the usual one is large enough for full speed and takes some hundredths of a second.
    """

    def __init__(self, size: int = _SIZE) -> None:
        import torch

        draws = torch.Generator().manual_seed(0)
        self._left, self._right = (torch.randn(size, size, generator=draws) for _ in range(2))
        self._result = torch.empty(size, size)
        self._flop = 2 * size**3
        self.gflops = 0.0

    def sample(self) -> None:
        """Measure it once more: one untimed product, then one that counts if it is the best so far."""
        import torch

        def product() -> None:
            torch.mm(self._left, self._right, out=self._result)

        product()
        self.gflops = max(self.gflops, self._flop / call_ms(product) / 1e6)


class OperationCounter:
    """Counts the floating-point operations of matrix products, convolutions and attention, and the largest tensor.

    A product of (m, k) and (k, n) is 2 m k n operations; all else is left out.

    Attributes:
        flop: operations so far.
        largest_bytes: the largest single tensor that an operation made.
    """

    def __init__(self) -> None:
        self.flop = 0
        self.largest_bytes = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block this thread's operations are counted."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        # torch's own table lacks the kernel that CPUs take for attention.
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with _largest(self), FlopCounterMode(display=False, custom_mapping={kernel: _attention_flop}) as mode:
            yield
        self.flop += mode.get_total_flops()


@contextlib.contextmanager
def _largest(counter: OperationCounter) -> Iterator[None]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else (result,):
                if isinstance(item, torch.Tensor):
                    counter.largest_bytes = max(counter.largest_bytes, item.numel() * item.element_size())
            return result

    with Largest():  # type: ignore[no-untyped-call]
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
