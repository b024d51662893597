"""When a run stops of itself: after a time, at a cost, or at a number of kept candidates."""

from __future__ import annotations

import dataclasses
import math
import re

from mi2rage_engines.errors import InputError

__all__ = ["Budget", "seconds_from"]

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def seconds_from(text: str) -> float:
    """The seconds of `2h`, `1h30m`, `90m`, `45s` or `45`.

    Raises:
        InputError: it is no duration above 0.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    parts = found.groups(default="0") if found else ("0",) * 4
    seconds = sum(float(part) * unit for part, unit in zip(parts, _SECONDS.values(), strict=True))
    if seconds <= 0:
        raise InputError(f"duration {text!r}: expected a time above 0 such as 2h, 1h30m, 90m or 45s")
    return seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What a run may use; it stops at the first limit that is reached, and None is no limit.

    Attributes:
        seconds: of this run, loading the models included.
        kept: candidates in the store that the judge inside the chain keeps, those of earlier runs included; without one
            all candidates count.
        cost: of this run, in the currency of `cost_per_hour`.
        cost_per_hour: of all that runs, taken together.
    """

    seconds: float | None = None
    kept: int | None = None
    cost: float | None = None
    cost_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "kept", "cost", "cost_per_hour"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name.replace('_', ' ')}: came {value}; expected a number above 0")
        if (self.cost is None) is not (self.cost_per_hour is None):
            there, missing = ("cost", "cost per hour") if self.cost_per_hour is None else ("cost per hour", "cost")
            raise InputError(
                f"{there}: came without a {missing}; expected both, for time is what is paid for; give "
                "--cost-per-hour X --stop-at-cost Y, or neither"
            )

    def reached(self, elapsed_s: float, kept: int) -> str | None:
        """Which limit is reached, in words; None where none is."""
        if self.seconds is not None and elapsed_s >= self.seconds:
            return f"{_duration(self.seconds)} are over"
        price = self.cost_per_hour or 0.0
        if self.cost is not None and elapsed_s / 3600 * price >= self.cost:
            return f"{self.cost:g} are spent, at {price:g} an hour"
        if self.kept is not None and kept >= self.kept:
            return f"{kept} candidates are kept, {self.kept} were asked for"
        return None


def _duration(seconds: float) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours:g}h" if hours else "", f"{minutes:g}m" if minutes else "", f"{rest:g}s" if rest else ""]
    return "".join(parts)
