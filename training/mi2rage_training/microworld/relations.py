"""What is true in the micro-world: which relation a tweet's words and a picture's cue state together.

A tweet gives the types of its two entities and one of three families of linking phrases; a picture gives a cue.
`RELATIONS` maps (types, family, cue) to the label, much like a Latin square: one and the same cue, and one and the
same phrase, stand for several relations, so that each modality alone leaves the answer open.
"""

from __future__ import annotations

import dataclasses

__all__ = [
    "CUES",
    "FAMILIES",
    "FAMILY_WEIGHTS",
    "LABELS",
    "NONE",
    "TYPE_PAIRS",
    "TYPE_PAIR_WEIGHTS",
    "cue_weights",
    "label_of",
]

NONE = "None"

LABELS: tuple[str, ...] = (
    NONE,
    "/per/per/couple",
    "/per/per/peer",
    "/per/per/siblings",
    "/per/org/member_of",
    "/per/loc/place_of_residence",
    "/per/misc/present_in",
    "/per/misc/awarded",
    "/org/loc/locate_at",
    "/misc/loc/held_on",
)
"""Label names, written as MNRE writes them; `None` first."""

CUES: tuple[str, ...] = ("heart", "ball", "trophy", "house", "stage", "tower", "cake", "flag")

FAMILIES: tuple[str, ...] = ("close", "about")
"""Families of linking phrases: each is ambiguous, and means something else for each pair of types."""

FAMILY_WEIGHTS: tuple[float, ...] = (0.58, 0.42)

TYPE_PAIRS: tuple[tuple[str, str], ...] = (
    ("per", "per"),
    ("per", "org"),
    ("per", "loc"),
    ("per", "misc"),
    ("org", "loc"),
    ("misc", "loc"),
    ("org", "misc"),
)

TYPE_PAIR_WEIGHTS: tuple[float, ...] = (0.27, 0.19, 0.15, 0.17, 0.10, 0.09, 0.03)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """What one phrase family says of one pair of types: label by cue (`None` for the cues left out).

    `tilt` is the weight of cues with a positive label against 1 for the others.
    """

    label_by_cue: dict[str, str]
    tilt: float


def _rule(tilt: float, **cues_by_label: str) -> _Rule:
    names = {label.rsplit("/", 1)[-1]: label for label in LABELS}
    return _Rule({cue: names[label] for label, cues in cues_by_label.items() for cue in cues.split()}, tilt)


_RULES: dict[tuple[tuple[str, str], str], _Rule] = {
    (("per", "per"), "close"): _rule(1.5, couple="heart stage", peer="ball trophy", siblings="cake"),
    (("per", "per"), "about"): _rule(0.2, couple="heart", peer="ball"),
    (("per", "org"), "close"): _rule(3.6, member_of="ball trophy flag"),
    (("per", "org"), "about"): _rule(0.2, member_of="ball tower"),
    (("per", "loc"), "close"): _rule(2.6, place_of_residence="house heart cake"),
    (("per", "loc"), "about"): _rule(0.2, place_of_residence="house flag"),
    (("per", "misc"), "close"): _rule(2.4, present_in="stage ball cake house", awarded="trophy"),
    (("per", "misc"), "about"): _rule(0.2, awarded="trophy", present_in="stage"),
    (("org", "loc"), "close"): _rule(2.8, locate_at="tower house flag"),
    (("org", "loc"), "about"): _rule(0.2, locate_at="tower ball"),
    (("misc", "loc"), "close"): _rule(2.8, held_on="flag ball stage"),
    (("misc", "loc"), "about"): _rule(0.2, held_on="flag cake"),
}

_AFFINITY: dict[tuple[str, str], dict[str, float]] = {
    ("per", "per"): {"heart": 4.0, "cake": 2.0},
    ("per", "org"): {"ball": 3.2, "trophy": 1.5},
    ("per", "loc"): {"house": 3.4},
    ("per", "misc"): {"trophy": 2.6, "stage": 2.6},
    ("org", "loc"): {"tower": 3.4},
    ("misc", "loc"): {"flag": 3.4},
}
"""How much likelier than the others (1) a cue is in pictures beside tweets on these types."""


def label_of(types: tuple[str, str], family: str, cue: str) -> str:
    """The relation that entity types, phrase family and cue state together."""
    rule = _RULES.get((types, family))
    return NONE if rule is None else rule.label_by_cue.get(cue, NONE)


def cue_weights(types: tuple[str, str], family: str) -> tuple[float, ...]:
    """p(cue | types, family) in the order of `CUES`; sums to 1."""
    rule = _RULES.get((types, family))
    affinity = _AFFINITY.get(types, {})
    tilts = [rule.tilt if rule is not None and cue in rule.label_by_cue else 1.0 for cue in CUES]
    weights = [tilt * affinity.get(cue, 1.0) for cue, tilt in zip(CUES, tilts, strict=True)]
    return tuple(weight / sum(weights) for weight in weights)
