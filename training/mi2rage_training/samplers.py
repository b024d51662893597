"""diffusers' samplers: those a generator's own can be exchanged for, and their noise under our keys."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError, require

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEDULERS", "scheduler_class", "scheduler_noise"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}
"""Samplers that a generator's own one can be exchanged for, by their names on the command line."""


def scheduler_class(name: str) -> Any:
    if name not in SCHEDULERS:
        raise ModelFolderError(f"scheduler {name!r} is not known; expected one of {', '.join(SCHEDULERS)}")
    return getattr(require("diffusers", "train"), SCHEDULERS[name])


@contextlib.contextmanager
def scheduler_noise(
    scheduler: Any, draw: Callable[[tuple[int, ...], int], NDArray[np.floating[Any]]]
) -> Iterator[None]:
    """Within the block, the noise that `scheduler.step` adds is `draw(shape, step index)`.

    diffusers' schedulers call the function `randn_tensor` of their own module; it is replaced there and put back.
    Schedulers without that function add no noise and are left as they are.
    """
    import torch

    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield
        return

    calls = itertools.count()

    def keyed(shape: Sequence[int], *, device: Any = None, dtype: Any = None, **_: Any) -> torch.Tensor:
        # DDPM keeps no step index, but draws at every step from the first on: there the calls count the steps.
        call, index = next(calls), getattr(scheduler, "step_index", None)
        return torch.from_numpy(draw(tuple(shape), call if index is None else int(index))).to(
            device=device, dtype=dtype
        )

    setattr(module, "randn_tensor", keyed)  # noqa: B010 (mypy refuses the assignment to a module)
    try:
        yield
    finally:
        setattr(module, "randn_tensor", original)  # noqa: B010
