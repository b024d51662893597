"""What LoadGen wrote about a run: its detail log, read into one record; no figure is from a timer of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mi2rage_engines.errors import EngineError

__all__ = ["DETAIL_LOG", "LoadGenRun", "read_run"]

DETAIL_LOG = "mlperf_log_detail.txt"
_MARK = ":::MLLOG "
_PERCENTILES = {"p50": (50, 1), "p90": (90, 64), "p95": (95, 100), "p99": (99, 1000)}
"""Percentiles, and the queries below which each says too little to be shown."""
_RATES = {
    "SingleStream": "result_qps_with_loadgen_overhead",
    "Offline": "result_samples_per_second",
    "Server": "result_completed_samples_per_sec",
}
_UNMET = {
    "result_min_duration_met": "shorter than the least duration",
    "result_min_queries_met": "fewer queries than the least number",
    "result_perf_constraints_met": "p99 above the bound",
    "early_stopping_met": "too few queries within the bound for 99% confidence",
}


class LoadGenRun(BaseModel):
    """One run as LoadGen judged it.

    Attributes:
        folder: of its logs, inside the report's folder of logs.
        valid: LoadGen's own verdict; reasons: what it says is unmet, empty where valid.
        queries: issued. seconds: of the whole run, by LoadGen's clock.
        asked_rate: queries a second that were scheduled for (server) or expected (offline); else None.
        rate: samples a second that were completed.
        scheduled_rate: of the Poisson arrivals as they were drawn; server only.
        latency_ms: mean, and percentiles where there are queries enough; empty for offline, which is one query.
        p90_bound_ms: what the 90th percentile stays below with 99% confidence; single stream only.
        over_bound: queries slower than the bound; server only.
        settings: LoadGen's effective ones.
        errors: what LoadGen logged as errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    valid: bool
    reasons: tuple[str, ...]
    queries: int
    seconds: float
    asked_rate: float | None = None
    rate: float
    scheduled_rate: float | None = None
    latency_ms: dict[str, float]
    p90_bound_ms: float | None = None
    over_bound: int | None = None
    settings: dict[str, Any]
    errors: tuple[str, ...] = ()

    @property
    def too_short(self) -> bool:
        """Whether all that is wrong is that LoadGen had made too few queries for the least duration."""
        return self.reasons == (_UNMET["result_min_duration_met"],)


def read_run(folder: Path) -> LoadGenRun:
    """The run whose logs LoadGen wrote to a folder.

    Raises:
        EngineError: there is no log, or no result in it.
    """
    values, errors = _entries(folder / DETAIL_LOG)
    scenario = str(values.get("effective_scenario"))
    try:
        queries = int(values["result_query_count"])
        rate = float(values[_RATES[scenario]])
        valid = values["result_validity"] == "VALID"
        asked = {"Server": "effective_target_qps", "Offline": "effective_target_qps"}.get(scenario)
        return LoadGenRun(
            folder=folder.name,
            valid=valid,
            reasons=() if valid else _reasons(values),
            queries=queries,
            seconds=_seconds(values, scenario, queries, rate),
            asked_rate=None if asked is None else float(values[asked]),
            rate=rate,
            scheduled_rate=values.get("result_scheduled_samples_per_sec"),
            latency_ms={} if scenario == "Offline" else _latencies(values, queries),
            p90_bound_ms=_bound(values) if scenario == "SingleStream" else None,
            over_bound=values["result_overlatency_query_count"] if scenario == "Server" else None,
            settings={
                key.removeprefix("effective_"): value for key, value in values.items() if key.startswith("effective_")
            },
            errors=errors,
        )
    except KeyError as error:
        raise EngineError(
            f"{folder / DETAIL_LOG}: has no entry {error}; expected a log of LoadGen 5.1 or later with a result; "
            f"{'; '.join(errors) or 'look into it, and run again'}"
        ) from error


def _entries(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The log's values by key, the last of a key counting, and its errors."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); expected LoadGen's log; run again") from error
    values: dict[str, Any] = {}
    errors: list[str] = []
    for line in lines:
        if not line.startswith(_MARK):
            continue
        try:
            entry = json.loads(line.removeprefix(_MARK))
        except ValueError:
            # Git messages of LoadGen's own build stand in its log unescaped.
            continue
        values[entry["key"]] = entry["value"]
        if entry.get("metadata", {}).get("is_error"):
            errors.append(f"{entry['key']}: {entry['value']}")
    return values, tuple(errors)


def _reasons(values: Mapping[str, Any]) -> tuple[str, ...]:
    unmet = [words for key, words in _UNMET.items() if values.get(key) is False]
    if values.get("result_perf_constraints_met") is False:
        # That p99 is over the bound says it all: the other verdict follows from it.
        unmet = [words for words in unmet if words != _UNMET["early_stopping_met"]]
    return tuple(unmet) or (" ".join(str(values.get("result_invalid_reason", "")).split()) or "LoadGen gave no reason",)


def _latencies(values: Mapping[str, Any], queries: int) -> dict[str, float]:
    found = {"mean": values["result_mean_latency_ns"] / 1e6}
    for name, (percent, least) in _PERCENTILES.items():
        if queries >= least:
            found[name] = values[f"result_{percent:.2f}_percentile_latency_ns"] / 1e6
    return found


def _bound(values: Mapping[str, Any]) -> float | None:
    found = values.get("early_stopping_latency_ss")
    return found / 1e6 if found else None


def _seconds(values: Mapping[str, Any], scenario: str, queries: int, rate: float) -> float:
    if scenario == "Offline":
        return float(values["result_max_latency_ns"]) / 1e9
    return queries / rate if rate else 0.0
