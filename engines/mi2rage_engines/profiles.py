"""Shape profiles: the smallest, usual and largest size of each dynamic axis that a plan is built for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec

__all__ = [
    "DEFAULT_RANGES",
    "ShapeProfile",
    "Shapes",
    "completed",
    "default_profile",
    "dynamic_axes",
    "misfit",
    "profile_from_text",
    "shapes_of",
]

DEFAULT_RANGES = {
    "batch": AxisRange(min=1, opt=4, max=16),
    "sequence": AxisRange(min=1, opt=8, max=32),
    "past": AxisRange(min=0, opt=16, max=32),
    "height": AxisRange(min=8, opt=32, max=64),
    "width": AxisRange(min=8, opt=32, max=64),
}
_LARGEST = 2**31 - 1
"""TensorRT takes no larger size."""

_ANY_AXIS = AxisRange(min=1, opt=8, max=64)

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""One tensor's shape at the smallest, the usual and the largest sizes."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShapeProfile:
    """The range of each axis by name; a plan holds several profiles and each run picks one."""

    axes: Mapping[str, AxisRange]

    def __str__(self) -> str:
        return ",".join(f"{name}={span.min}:{span.opt}:{span.max}" for name, span in self.axes.items())


def profile_from_text(text: str) -> ShapeProfile:
    """Read `batch=1:4:16,height=64`: min, opt and max of each axis, or one size for all three.

    Raises:
        InputError: it is not of that form, names an axis twice, or its sizes do not rise from min over opt to max.
    """
    axes: dict[str, AxisRange] = {}
    for part in text.split(","):
        name, equals, sizes = (piece.strip() for piece in part.partition("="))
        numbers = [size.strip() for size in sizes.split(":")]
        if not name or not equals or len(numbers) not in (1, 3) or not all(map(_is_size, numbers)):
            raise InputError(
                f"profile {text!r}: cannot read {part.strip()!r}; expected AXIS=MIN:OPT:MAX, or AXIS=SIZE for a fixed "
                f"size, joined by commas, e.g. batch=1:4:16,height=32:64:128; sizes are at most {_LARGEST}"
            )
        if name in axes:
            raise InputError(f"profile {text!r}: axis {name} is given twice; expected each once; leave one out")
        least, usual, most = map(int, numbers * (3 // len(numbers)))
        axes[name] = _checked_range(text, name, least, usual, most)
    return ShapeProfile(axes)


def _is_size(text: str) -> bool:
    # Python converts no text of thousands of digits.
    return text.isdecimal() and len(text) <= len(str(_LARGEST)) and int(text) <= _LARGEST


def _checked_range(text: str, name: str, least: int, usual: int, most: int) -> AxisRange:
    try:
        return AxisRange(min=least, opt=usual, max=most)
    except ValidationError as error:
        raise InputError(
            f"profile {text!r}: axis {name} is {least}:{usual}:{most}; expected 1 or more for opt and max, and "
            "min <= opt <= max; put them in order"
        ) from error


def dynamic_axes(graph: GraphSpec) -> tuple[str, ...]:
    """The names of the inputs' dynamic axes, in their order."""
    return tuple(dict.fromkeys(axis for tensor in graph.inputs for axis in tensor.shape if isinstance(axis, str)))


def default_profile(graph: GraphSpec) -> ShapeProfile:
    """The profile that the graph itself names.

    An axis without a range of its own takes one by its name from `DEFAULT_RANGES` (batch 1:4:16, sequence 1:8:32,
    past 0:16:32, height and width 8:32:64), and 1:8:64 by any other name.
    """
    return ShapeProfile(
        {axis: graph.axes.get(axis, DEFAULT_RANGES.get(axis, _ANY_AXIS)) for axis in dynamic_axes(graph)}
    )


def completed(
    profile: ShapeProfile, graph: GraphSpec, name: str, *, multiples: Mapping[str, int] | None = None
) -> ShapeProfile:
    """`profile` for one graph: axes that the graph lacks are left out, those it says nothing of keep their default.

    Args:
        profile: what was asked for; it may be meant for several graphs at once.
        graph: whose `axes` bound what can be asked for. `batch` is not bounded from above: no graph depends on it.
        name: what messages call the graph.
        multiples: by axis, what its sizes must be multiples of.

    Raises:
        InputError: a size lies outside of what the graph was exported and checked for, or is no multiple.
    """
    axes = dict(default_profile(graph).axes)
    for axis in axes:
        if axis in profile.axes:
            _check_allowed(profile, axis, graph, name)
            _check_multiple(profile, axis, (multiples or {}).get(axis, 1), name)
            axes[axis] = profile.axes[axis]
    return ShapeProfile(axes)


def _check_allowed(profile: ShapeProfile, axis: str, graph: GraphSpec, name: str) -> None:
    asked, known = profile.axes[axis], graph.axes.get(axis)
    least = known.min if known else (0 if axis == "past" else 1)
    most = known.max if known and axis != "batch" else None
    if asked.min < least or (most is not None and asked.max > most):
        expected = f"{least} to {most}" if most is not None else f"{least} or more"
        raise InputError(
            f"{name}: the profile {profile} gives axis {axis} {asked.min} to {asked.max}; expected {expected}, what "
            "the graph was exported for; narrow the profile, or export the model with a wider range"
        )


def _check_multiple(profile: ShapeProfile, axis: str, multiple: int, name: str) -> None:
    asked = profile.axes[axis]
    if any(size % multiple for size in (asked.min, asked.opt, asked.max)):
        raise InputError(
            f"{name}: the profile {profile} gives axis {axis} {asked.min}:{asked.opt}:{asked.max}; expected multiples "
            f"of {multiple}, for the UNet halves its latents on the way; round the sizes to them"
        )


def shapes_of(profile: ShapeProfile, tensor: TensorSpec, name: str) -> Shapes:
    """The smallest, usual and largest shape of one input.

    Raises:
        InputError: the profile lacks one of the tensor's axes.
    """
    missing = [axis for axis in tensor.shape if isinstance(axis, str) and axis not in profile.axes]
    if missing:
        raise InputError(
            f"{name}: the profile {profile} has no axis {', '.join(map(repr, missing))} of input {tensor.name} "
            f"({', '.join(map(str, tensor.shape))}); expected a range for each; add it to the profile"
        )

    def at(end: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else int(getattr(profile.axes[axis], end)) for axis in tensor.shape)

    return at("min"), at("opt"), at("max")


def misfit(
    profiles: Sequence[ShapeProfile], inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]
) -> str | None:
    """Why no profile holds these shapes, or None where one does.

    Args:
        profiles: a plan's.
        inputs: the graph's.
        shapes: the shapes of a run by input; inputs that are left out are not looked at.
    """
    reasons = [_first_outside(profile, inputs, shapes) for profile in profiles]
    return None if None in reasons else "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _first_outside(
    profile: ShapeProfile, inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]
) -> str | None:
    for tensor in inputs:
        shape = shapes.get(tensor.name)
        if shape is None:
            continue
        if len(shape) != len(tensor.shape):
            return f"input {tensor.name} has {len(shape)} axes, not {len(tensor.shape)}"
        for axis, size in zip(tensor.shape, shape, strict=True):
            if isinstance(axis, int):
                if size != axis:
                    return f"an axis of input {tensor.name} is {size}; it is fixed at {axis}"
            elif not profile.axes[axis].min <= size <= profile.axes[axis].max:
                span = profile.axes[axis]
                return f"axis {axis} of input {tensor.name} is {size}, outside of {span.min} to {span.max}"
    return None
