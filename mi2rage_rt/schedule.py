"""Denoising steps as the affine maps of a `ScheduleTable` (see there for the formula)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.spec import ScheduleTable

__all__ = ["Latents", "Schedule", "full_steps", "guided_steps", "interval_from_text", "schedule_for"]

Latents = NDArray[np.float32]

_COLUMNS = ("timesteps", "input_scale", "sample_coefficient", "output_coefficient", "noise_coefficient")


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A table, applied.

    Raises:
        BundleError: a column of the table has not `steps` numbers.
    """

    table: ScheduleTable

    def __post_init__(self) -> None:
        for column in _COLUMNS:
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
        sigma = np.float32(self.table.init_noise_sigma)
        return noise if sigma == 1 else noise * sigma

    def scaled(self, latents: Latents, step: int) -> Latents:
        """What the UNet sees of the latents at `step`; the latents themselves where they are not scaled."""
        scale = np.float32(self.table.input_scale[step])
        return latents if scale == 1 else latents * scale

    def coefficients(self, step: int) -> NDArray[np.float32]:
        """The numbers of `step`, float32 `(4,)`: input scale, then the factors of sample, output and noise."""
        return np.array([getattr(self.table, column)[step] for column in _COLUMNS[1:]], dtype=np.float32)

    def first_steps(self, count: int) -> Schedule:
        """A schedule of the first steps alone: no usable latents come of it, but their cost does."""
        first = {column: getattr(self.table, column)[:count] for column in _COLUMNS}
        return Schedule(self.table.model_copy(update={"steps": count, **first}))

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


def guided_steps(steps: int, interval: tuple[float, float]) -> tuple[bool, ...]:
    """For each step whether guidance is on: from the first share of the steps on and before the last.

    Guidance on an interval of the noise levels (Kynkaanniemi et al. 2024): at the highest levels it costs variety and
    at the lowest it changes next to nothing, and a step without it is half the work.

    Args:
        steps: of the schedule, in the order they are done: from much noise to none.
        interval: shares of the steps; (0, 1) is all of them, (0, 0.5) the first half.

    Raises:
        InputError: they are not shares in rising order.
    """
    first, last = interval
    if not 0 <= first <= last <= 1:
        raise InputError(
            f"guidance interval {first:g}:{last:g}: expected two shares of the steps from 0 to 1 in rising order, "
            "e.g. 0:0.5 for the first half; correct it"
        )
    return tuple(first <= step / steps < last for step in range(steps))


def full_steps(guided: Sequence[bool], interval: int) -> tuple[bool, ...]:
    """For each step whether the whole UNet runs, rather than its outer layers on the feature that was kept.

    Every `interval`-th does, from the first on (Ma, Fang, Wang 2024, section 3.2), and where guidance begins or ends:
    the feature has a row for each of the UNet's.

    Args:
        guided: for each step whether it is guided.
        interval: 1 is no caching.

    Raises:
        InputError: the interval is no whole number from 1 on.
    """
    if interval < 1:
        raise InputError(
            f"feature cache {interval}: expected a whole number of steps from 1 on, of which the first runs the whole "
            "UNet; 1 is off; give another"
        )
    return tuple(step % interval == 0 or guided[step] != guided[step - 1] for step in range(len(guided)))


def interval_from_text(text: str) -> tuple[float, float]:
    """Read `0:0.5`, two shares of the steps.

    Raises:
        InputError: it is not of that form.
    """
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError as error:
        raise InputError(
            f"guidance interval {text!r}: expected FIRST:LAST, two shares of the steps from 0 to 1, e.g. 0:0.5; "
            "correct it"
        ) from error
