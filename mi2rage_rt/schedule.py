"""Denoising steps as the affine maps of a `ScheduleTable` (see there for the formula)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.spec import ScheduleTable

__all__ = ["Schedule", "schedule_for"]

Latents = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A table, applied.

    Raises:
        BundleError: a column of the table has not `steps` numbers.
    """

    table: ScheduleTable

    def __post_init__(self) -> None:
        columns = ("timesteps", "input_scale", "sample_coefficient", "output_coefficient", "noise_coefficient")
        for column in columns:
            length = len(getattr(self.table, column))
            if length != self.table.steps:
                raise BundleError(
                    f"schedule {self.table.scheduler}: {column} has {length} numbers; expected {self.table.steps}; "
                    "export again"
                )

    @property
    def steps(self) -> int:
        """The number of denoising steps."""
        return self.table.steps

    def initial(self, noise: Latents) -> Latents:
        """The latents that step 0 starts from; `noise` is standard normal, float32 of any shape."""
        return noise * np.float32(self.table.init_noise_sigma)

    def scaled(self, latents: Latents, step: int) -> Latents:
        """What the UNet sees of the latents at `step`."""
        return latents * np.float32(self.table.input_scale[step])

    def needs_noise(self, step: int) -> bool:
        """Whether `step` adds noise."""
        return self.table.noise_coefficient[step] != 0.0

    def advance(self, latents: Latents, output: Latents, step: int, noise: Latents | None = None) -> Latents:
        """The latents after `step`; all arrays float32 and of one shape.

        Args:
            latents: before the step (unscaled).
            output: the UNet's answer, after guidance.
            step: 0 to `steps` - 1.
            noise: standard normal, needed where `needs_noise(step)`.
        """
        result = latents * np.float32(self.table.sample_coefficient[step])
        result += output * np.float32(self.table.output_coefficient[step])
        if noise is not None:
            result += noise * np.float32(self.table.noise_coefficient[step])
        return result


def schedule_for(tables: Sequence[ScheduleTable], steps: int) -> Schedule:
    """The schedule with `steps` steps.

    Raises:
        InputError: no table has that many; the message names those there are.
    """
    for table in tables:
        if table.steps == steps:
            return Schedule(table)
    allowed = ", ".join(str(table.steps) for table in sorted(tables, key=lambda table: table.steps))
    raise InputError(
        f"steps {steps}: this bundle has no schedule of that length; expected one of {allowed}; "
        "choose one, or export with that number"
    )
