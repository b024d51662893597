"""What a check says: findings, ordered by how much they spoil."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import StrEnum

__all__ = ["EXAMPLES", "Finding", "Severity", "by_severity", "places"]

EXAMPLES = 5
"""How many rows a finding names: enough to look at, few enough to read."""


class Severity(StrEnum):
    """From what makes measured scores worthless down to what is good to know."""

    LEAK = "leak"
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        severity: how much it spoils.
        kind: a short fixed name, for programs.
        what: the fault in one sentence.
        evidence: the numbers it rests on.
        advice: what to do next.
        examples: where to look, at most `EXAMPLES`.
    """

    severity: Severity
    kind: str
    what: str
    evidence: str
    advice: str
    examples: tuple[str, ...] = ()


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, the worst first, otherwise in their order."""
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def places(found: Iterable[str]) -> tuple[str, ...]:
    """The first few of them."""
    return tuple(found)[:EXAMPLES]
