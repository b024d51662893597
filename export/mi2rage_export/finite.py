"""NaN and Inf: an export that gives them fails, and the first layer that made them is named."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi2rage_engines.errors import ParityError
from mi2rage_export.reference import Array

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph

__all__ = ["NonFinite", "NonFiniteError", "arguments_from", "demand_finite", "find_non_finite", "floating", "hooked"]

Before = Callable[[str, nn.Module, Any], None]
After = Callable[[str, nn.Module, Any, Any], Any]


class NonFiniteError(ParityError):
    """A graph gives NaN or Inf; `found` says where they arise."""

    def __init__(self, message: str, found: NonFinite) -> None:
        super().__init__(message)
        self.found = found


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first layer in order of execution that gave NaN or Inf though what it was given was in order.

    Attributes:
        layer: the submodule's name, empty for the graph's own code.
        kind: its class.
        weights: its own parameters and buffers that hold NaN or Inf.
        what: `NaN`, `Inf` or `NaN and Inf`.
        count, size: values of its outputs that are not finite, and all values.
    """

    layer: str
    kind: str
    weights: tuple[str, ...]
    what: str
    count: int
    size: int


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """fp16 convolutions on the CPU in fp32 arithmetic: PyTorch's own are a hundred times slower there.

    Products are summed in fp32 and rounded once, as GPUs and ONNX Runtime do it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].dtype == torch.float16 and args[0].is_cpu:
            wide = [item.float() if isinstance(item, Tensor) else item for item in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


def floating(values: Any) -> list[Tensor]:
    """The floating tensors in nested inputs or outputs of a module."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def arguments_from(graph: Graph, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
    """The module's arguments: arrays by input name, in the graph's order, dtypes and on the module's device."""
    weight = next(graph.module.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    return tuple(
        torch.from_numpy(arrays[item.name]).to(device=device, dtype=getattr(torch, item.dtype)) for item in graph.inputs
    )


@contextlib.contextmanager
def hooked(module: nn.Module, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Call `before(name, module, inputs)` and `after(name, module, inputs, outputs)` at every call of a submodule.

    The module itself has the empty name. What `after` returns replaces the outputs, unless it is None.
    """
    handles = []

    def entering(name: str) -> Callable[..., None]:
        return lambda layer, args, kwargs: before(name, layer, (args, kwargs)) if before else None

    def leaving(name: str) -> Callable[..., Any]:
        return lambda layer, args, kwargs, outputs: after(name, layer, (args, kwargs), outputs) if after else None

    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(layer.register_forward_hook(leaving(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _usable(inputs: Any) -> bool:
    # -Inf is what masks are made of; it is no fault of the layer that hands it on.
    return not any(bool((torch.isnan(item) | (item == torch.inf)).any()) for item in floating(inputs))


def _run(graph: Graph, arrays: Mapping[str, Array]) -> list[Tensor]:
    with torch.no_grad(), _Convolutions():  # type: ignore[no-untyped-call]
        return floating(graph.module.eval()(*arguments_from(graph, arrays)))


def _describe(name: str, layer: nn.Module, tensors: list[Tensor]) -> NonFinite:
    state = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    nan = sum(int(torch.isnan(item).sum()) for item in tensors)
    inf = sum(int(torch.isinf(item).sum()) for item in tensors)
    return NonFinite(
        layer=name,
        kind=type(layer).__name__,
        weights=tuple(key for key, value in state if not torch.isfinite(value).all()),
        what=" and ".join(word for word, number in (("NaN", nan), ("Inf", inf)) if number),
        count=nan + inf,
        size=sum(item.numel() for item in tensors),
    )


def find_non_finite(graph: Graph, arrays: Mapping[str, Array]) -> NonFinite | None:
    """Where NaN or Inf in the graph's outputs come from; None where all outputs are finite.

    Args:
        graph: its module is run in the precision it is in.
        arrays: its inputs, by name.
    """
    if all(bool(torch.isfinite(item).all()) for item in _run(graph, arrays)):
        return None
    found: list[NonFinite] = []

    def after(name: str, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        tensors = floating(outputs)
        if not found and not all(bool(torch.isfinite(item).all()) for item in tensors) and _usable(inputs):
            found.append(_describe(name, layer, tensors))

    with hooked(graph.module, after=after):
        outputs = _run(graph, arrays)
    # Inputs that hold NaN themselves leave no layer to blame but the graph.
    return found[0] if found else _describe("", graph.module, outputs)


def demand_finite(graph: Graph, samples: Iterable[Mapping[str, Array]]) -> None:
    """Refuse a graph that gives NaN or Inf for one of the inputs.

    Raises:
        NonFiniteError: the message names the first layer that made them, and its weights where they are the cause.
    """
    for arrays in samples:
        found = find_non_finite(graph, arrays)
        if found is None:
            continue
        place = f"its layer {found.layer} ({found.kind})" if found.layer else f"its own code ({found.kind})"
        dtype = next((str(item.dtype).removeprefix("torch.") for item in graph.module.parameters()), "float32")
        held = f"its weights {', '.join(found.weights)} hold NaN or Inf themselves" if found.weights else ""
        if dtype != "float32":
            cause = f"{held or 'its weights are finite'}; keep that layer in fp32, or export in bf16 or fp32"
        elif held:
            cause = f"{held}; get the model again, or train it again with a smaller learning rate"
        else:
            cause = "its weights are finite, so it is what it computes; the model cannot be used as it is"
        raise NonFiniteError(
            f"{graph.name}: {place} is the first to give {found.what}, in {found.count} of {found.size} values, "
            f"in {dtype}, expected finite answers; {cause}",
            found,
        )
