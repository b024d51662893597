"""What fp16 cannot hold, and the parts of a module that are left in fp32 for it.

fp16 ends at 65504. The module is run in fp32 and every operation's largest value is noted with the submodule in whose
code it arose; where one comes too near the end, the smallest enclosing submodule whose own inputs and outputs fit is
kept in fp32. Then the module is run with every operation's result rounded to fp16, which shows what noting values
cannot (a small number that becomes 0 and divides), until nothing is NaN or Inf any more. All this happens before a
weight is converted, so nothing has to be kept twice or restored.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mi2rage_engines.errors import InputError
from mi2rage_export.finite import arguments_from, floating, hooked
from mi2rage_export.reference import Array

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph

__all__ = ["LARGEST", "SAFE_SHARE", "WHOLE", "find_overflow", "known_parts", "outermost"]

logger = logging.getLogger(__name__)

LARGEST = 65504.0
"""The largest fp16 number."""

SAFE_SHARE = 0.25
"""Values on a few inputs may reach this share of it: other inputs can be four times as large."""

WHOLE = "*"
"""Among the names of kept submodules: the whole graph stays in fp32."""

_MASK = -1e30
"""Below this a value says "not here": masks hold the smallest fp32 number, which becomes the smallest fp16 number."""


@dataclasses.dataclass
class _Call:
    """One call of a submodule: the largest value of its inputs and outputs, and of what its code computes."""

    name: str
    parent: _Call | None
    border: float = 0.0
    inside: float = 0.0

    def upward(self) -> Iterator[_Call]:
        """The call itself and those it is part of, the root last."""
        call: _Call | None = self
        while call is not None:
            yield call
            call = call.parent


def _peak(tensor: Tensor) -> float:
    """Largest absolute value but for masks; infinite where there is NaN or Inf."""
    if not tensor.numel():
        return 0.0
    low, high = (float(value) for value in torch.aminmax(tensor.detach()))
    if low <= _MASK:
        tensor = tensor[tensor > _MASK]
        low, high = (float(value) for value in torch.aminmax(tensor)) if tensor.numel() else (0.0, 0.0)
    # NaN compares as false with everything.
    return max(-low, high) if -low < float("inf") and high < float("inf") else float("inf")


def _rounded(tensor: Tensor) -> Tensor:
    return torch.where(tensor <= _MASK, -LARGEST, tensor).half().to(tensor.dtype)


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation's values under the submodule that is running; `rounding` as if it were in fp16."""

    def __init__(self, kept: Collection[str], *, rounding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.rounding = rounding
        self.calls: list[_Call] = []
        self._running: _Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        call = self._running
        if call is None or func.is_view:
            return outputs
        if self.rounding and not _covered(call, self.kept):
            if func._schema.is_mutable:
                for tensor in floating(outputs):
                    tensor.copy_(_rounded(tensor))
            else:
                outputs = _map_floating(_rounded, outputs)
        call.inside = max([call.inside, *map(_peak, floating(outputs))])
        return outputs

    def before(self, name: str, _: nn.Module, inputs: Any) -> None:
        # Noted before the call begins: what goes in arose in the code around it.
        border = max([0.0, *map(_peak, floating(inputs))])
        self._running = _Call(name, self._running, border)

    def after(self, name: str, _: nn.Module, __: Any, outputs: Any) -> Any:
        call = self._running
        assert call is not None
        self.calls.append(call)
        self._running = call.parent
        call.border = max([call.border, *map(_peak, floating(outputs))])
        if call.parent is not None:
            call.parent.inside = max(call.parent.inside, call.border)
        return _map_floating(_rounded, outputs) if self.rounding and name in self.kept else None


def _map_floating(function: Any, values: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def _covered(call: _Call, kept: Collection[str]) -> bool:
    return WHOLE in kept or any(outer.name in kept for outer in call.upward())


def _observe(
    graph: Graph, samples: Sequence[Mapping[str, Array]], kept: Collection[str], *, rounding: bool
) -> list[_Call]:
    """All calls of all submodules, in the order in which they ended."""
    observer = _Observer(kept, rounding=rounding)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), hooked(graph.module.eval(), observer.before, observer.after):
        for arrays in samples:
            arguments = arguments_from(graph, arrays)
            with observer:
                graph.module(*arguments)
    return observer.calls


def _holder(call: _Call, borders: Mapping[str, float], limit: float, kept: Collection[str]) -> str:
    """The nearest submodule around a call that fits at its borders and is not kept yet."""
    for outer in call.upward():
        if outer.name and outer.name not in kept and borders[outer.name] <= limit:
            return outer.name
    return WHOLE


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names, sorted, without those of submodules of others among them."""
    chosen = set(names)
    if WHOLE in chosen:
        return (WHOLE,)
    return tuple(
        sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen if other != name))
    )


def known_parts(graph: Graph, keep: Iterable[str]) -> set[str]:
    """The names as a set.

    Raises:
        InputError: one of them is no submodule of the graph's module.
    """
    named = set(keep)
    known = {name for name, _ in graph.module.named_modules() if name}
    unknown = sorted(named - known - {WHOLE})
    if unknown:
        raise InputError(
            f"{graph.name}: has no submodule {', '.join(unknown)}; it has {', '.join(sorted(known)[:12])} and so on; "
            f"name one of its submodules, or {WHOLE} for the whole graph"
        )
    return named


def _with_large_weights(graph: Graph) -> set[str]:
    names = set()
    for name, layer in graph.module.named_modules():
        own = floating([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])
        if any(_peak(tensor) > LARGEST for tensor in own):
            names.add(name or WHOLE)
    return names


def find_overflow(
    graph: Graph, samples: Iterable[Mapping[str, Array]], *, keep: Iterable[str] = (), share: float = SAFE_SHARE
) -> tuple[str, ...]:
    """The submodules that have to stay in fp32 when the graph is lowered to fp16.

    Args:
        graph: its module is in fp32, with finite answers, and is not changed.
        samples: inputs by name, as many and as real as can be had.
        keep: submodules that stay in fp32 in any case, by their names in `graph.module`.
        share: of 65504, the largest value that is allowed on the samples.

    Returns:
        Names in `graph.module`, sorted, none inside another; `("*",)` where nothing less than the whole graph will do.

    Raises:
        InputError: `keep` names a submodule that is not there.
    """
    cases = list(samples)
    limit = share * LARGEST
    kept = known_parts(graph, keep) | _with_large_weights(graph)
    borders: dict[str, float] = {}
    calls = _observe(graph, cases, kept, rounding=False)
    for call in calls:
        borders[call.name] = max(borders.get(call.name, 0.0), call.border)
    for call in calls:
        if call.inside > limit and not _covered(call, kept):
            kept.add(_holder(call, borders, limit, kept))
    while WHOLE not in kept:
        rounded = _observe(graph, cases, kept, rounding=True)
        first = next((call for call in rounded if call.inside == float("inf")), None)
        if first is None:
            break
        kept.add(_holder(first, borders, limit, kept))
    names = outermost(kept)
    if names == (WHOLE,):
        logger.warning(
            "%s: fp16 cannot hold what its outermost code computes; the whole graph stays in fp32", graph.name
        )
    elif names:
        logger.info("%s: kept in fp32: %s", graph.name, ", ".join(names))
    return names
