"""What a study measures beside the scores: where label information is lost, and how well teachers are calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mi2rage_training import microworld
from mi2rage_training.chain_config import Given
from mi2rage_training.microworld.probe import AttributeProbe
from mi2rage_training.pairs import Pair, pairs_from_candidates
from mi2rage_training.store import Candidate
from mi2rage_training.study_material import Material
from mi2rage_training.study_results import Diagnostic

__all__ = ["cue_rate", "diagnostics_of", "job_measures"]

_STORES = ("independent", "chain", "judged")
_REAL = "real"


def cue_rate(
    material: Material, candidates: Sequence[Candidate], weights: Sequence[float] | None = None
) -> float | None:
    """Share (0 to 1) of made samples that show, or name, the object which the label was decided by.

    None where that is not known: outside the micro-world, or without candidates. Measured by the world's own facts and
    the attribute probe; nothing is trained on it.
    """
    if material.recipe.data.world is None or not candidates:
        return None
    facts = microworld.read_facts(material.place.folder / "world")
    if material.given is Given.TEXT:
        found = _cues_seen(pairs_from_candidates(candidates))
    else:
        found = [_cue_named(candidate.sample.text) for candidate in candidates]
    right = [cue == facts[item.provenance.parent].cue for cue, item in zip(found, candidates, strict=True)]
    return float(np.average(right, weights=weights))


def _cues_seen(pairs: Sequence[Pair]) -> list[str | None]:
    images = [image for pair in pairs if (image := pair.load()) is not None]
    return AttributeProbe.load().cues(images)


def _cue_named(text: str) -> str | None:
    named = [name.removeprefix("cue:") for name in microworld.attributes_in(text) if name.startswith("cue:")]
    return named[0] if len(named) == 1 else None


def job_measures(material: Material) -> dict[str, Any]:
    """The measures of one setting and seed: cue rates by link, and the teachers' calibration and bounds."""
    links = range(1, material.chain.links + 1)
    rates: dict[str, list[float | None]] = {}
    teachers: dict[str, dict[str, float]] = {}
    for name in _STORES:
        if not material.has_store(name):
            continue
        candidates = material.store(name)
        rates[name] = [cue_rate(material, [c for c in candidates if c.provenance.link == link]) for link in links]
        for rounds in material.rounds_scored(name):
            scores = material.scores(name, rounds)
            teachers[f"{name}, {rounds} round{'s' if rounds > 1 else ''}"] = {
                "calibration_error_before": scores.calibration_error_before,
                "calibration_error": scores.calibration_error,
                "temperature": float(np.mean(scores.temperatures)),
                "label_entropy_nats": scores.label_entropy_nats,
                "bound_nats": scores.bound_nats,
                "real_bound_nats": scores.real_bound_nats,
                "weighted_bound_nats": float(np.average(scores.information_nats, weights=scores.weights)),
            }
    if material.recipe.data.world is not None and material.given is Given.TEXT:
        rates[_REAL] = [_real_rate(material), *[None] * (len(links) - 1)]
    return {"cue_rates": rates, "teachers": teachers}


def _real_rate(material: Material) -> float:
    facts = microworld.read_facts(material.place.folder / "world")
    pairs = material.real["train"]
    cues = _cues_seen(pairs)
    return float(np.mean([cue == facts[pair.sample.id].cue for cue, pair in zip(cues, pairs, strict=True)]))


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    name: str
    title: str
    scale: float = 1.0


_NATS = (
    _Column("label_entropy_nats", "H(Y)"),
    _Column("real_bound_nats", "real modality"),
    _Column("bound_nats", "both"),
    _Column("weighted_bound_nats", "both, weighted"),
)
_CALIBRATION = (
    _Column("calibration_error_before", "before", 100.0),
    _Column("calibration_error", "after", 100.0),
)


def diagnostics_of(measures: Mapping[Given, Sequence[Mapping[str, Any]]]) -> list[Diagnostic]:
    """Tables of what all jobs of each setting measured, means over the seeds."""
    tables = []
    for given, jobs in measures.items():
        rates = _means([job["cue_rates"] for job in jobs])
        rows = {name: [None if rate is None else 100 * rate for rate in row] for name, row in rates.items()}
        if any(rate is not None for row in rows.values() for rate in row):
            links = max(len(row) for row in rows.values())
            what = "shown in the image" if given is Given.TEXT else "named in the text"
            tables.append(
                Diagnostic(
                    setting=given.value,
                    name="cue-rate",
                    title=f"The deciding object, {what}, by link",
                    unit="%",
                    columns=[f"link {link}" for link in range(1, links + 1)],
                    rows=rows,
                )
            )
        for name, title, unit, columns in (
            ("calibration", "Teachers: expected calibration error before and after the temperature", "%", _CALIBRATION),
            ("bounds", "Teachers: Barber-Agakov bounds on the information about the label", "nats", _NATS),
        ):
            values = _means(
                [
                    {
                        row: [column.scale * found[column.name] for column in columns]
                        for row, found in job["teachers"].items()
                    }
                    for job in jobs
                ]
            )
            if values:
                titles = [column.title for column in columns]
                tables.append(
                    Diagnostic(setting=given.value, name=name, title=title, unit=unit, columns=titles, rows=values)
                )
    return tables


def _means(jobs: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, list[float | None]]:
    """Row by row the mean of the values that are there."""
    names = list(dict.fromkeys(name for job in jobs for name in job))
    result: dict[str, list[float | None]] = {}
    for name in names:
        columns = zip(*(job[name] for job in jobs if name in job), strict=True)
        present = [[value for value in column if value is not None] for column in columns]
        result[name] = [float(np.mean(values)) if values else None for values in present]
    return result
