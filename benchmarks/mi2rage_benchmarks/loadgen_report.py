"""What `loadgen` found: its record, and how it is shown."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from mi2rage_benchmarks.loadgen import Scenario
from mi2rage_benchmarks.loadgen_log import LoadGenRun
from mi2rage_rt.console import write_table

__all__ = ["LoadGenReport", "Rate", "write_report"]

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rate(_Record):
    """The highest rate found that holds the bound, in queries a second.

    Attributes:
        held: None where no rate held. confirmed: it held in two runs of different arrivals.
        failed: the lowest that did not hold; None where the runs ended before.
        bound_ms: of p99.
    """

    held: float | None
    confirmed: bool
    failed: float | None
    bound_ms: float


class LoadGenReport(_Record):
    """One scenario of one model.

    Attributes:
        model: the component; name: the model's own.
        valid: whether LoadGen called the run that counts valid: the last, or for a server the one at the rate found.
        runs: all of them, in order.
        rate: of a server, else None.
        min_seconds, min_queries, library, batch_size, max_wait_ms, seed: what was asked for; `max_wait_ms` is of a
            server only.
        made_up: whether the samples were, or came from a file.
        loadgen: its version.
        logs: the folder that LoadGen's logs are in, a folder a run.
    """

    schema_version: int = SCHEMA_VERSION
    scenario: Scenario
    bundle: str
    model: str
    name: str
    valid: bool
    runs: tuple[LoadGenRun, ...]
    rate: Rate | None = None
    min_seconds: float
    min_queries: int
    library: int
    made_up: bool
    batch_size: int
    max_wait_ms: float | None
    seed: int
    loadgen: str
    logs: str
    environment: dict[str, str]


def write_report(report: LoadGenReport) -> None:
    """Print the report for people."""
    import typer

    typer.echo(f"LoadGen {report.loadgen}, {report.scenario}: {report.model} {report.name} of {report.bundle}")
    typer.echo(_settings(report))
    write_table(_TITLES[report.scenario], [_row(report.scenario, run) for run in report.runs])
    typer.echo(_result(report))
    typer.echo(f"LoadGen's logs: {report.logs}")
    typer.echo("; ".join(f"{name} {value}" for name, value in report.environment.items()))


_TITLES = {
    Scenario.SINGLE_STREAM: ("run", "queries", "mean ms", "p50", "p90", "p95", "p99", "queries/s", "LoadGen says"),
    Scenario.OFFLINE: ("run", "samples", "seconds", "samples/s", "LoadGen says"),
    Scenario.SERVER: ("run", "asked/s", "came/s", "done/s", "queries", "p50 ms", "p99", "over bound", "LoadGen says"),
}


def _settings(report: LoadGenReport) -> str:
    library = f"{report.library} samples{', made up' if report.made_up else ''}"
    parts = [f"at least {report.min_seconds:g} s", library, f"seed {report.seed}"]
    if report.scenario is not Scenario.OFFLINE:
        parts.insert(1, f"at least {report.min_queries} queries a run")
    if report.scenario is not Scenario.SINGLE_STREAM:
        parts.append(f"batches of {report.batch_size}")
    if report.max_wait_ms is not None:
        parts.append(f"which wait {report.max_wait_ms:g} ms at most")
    return ", ".join(parts)


def _row(scenario: Scenario, run: LoadGenRun) -> list[str]:
    verdict = "VALID" if run.valid else f"INVALID: {'; '.join(run.reasons)}"
    number = run.folder.removeprefix("run-")

    def ms(name: str) -> str:
        return f"{run.latency_ms[name]:.3g}" if name in run.latency_ms else ""

    if scenario is Scenario.OFFLINE:
        samples = f"{run.settings.get('samples_per_query', '')}"
        return [number, samples, f"{run.seconds:.3g}", f"{run.rate:.4g}", verdict]
    if scenario is Scenario.SINGLE_STREAM:
        latencies = [ms(name) for name in ("mean", "p50", "p90", "p95", "p99")]
        return [number, str(run.queries), *latencies, f"{run.rate:.4g}", verdict]
    rates = [f"{value or 0:.4g}" for value in (run.asked_rate, run.scheduled_rate, run.rate)]
    return [number, *rates, str(run.queries), ms("p50"), ms("p99"), str(run.over_bound), verdict]


def _result(report: LoadGenReport) -> str:
    last = report.runs[-1]
    if report.rate is not None:
        return _rate_line(report.rate, len(report.runs))
    verdict = "" if report.valid else "INVALID by LoadGen, not to be quoted: "
    if report.scenario is Scenario.OFFLINE:
        return f"{verdict}{last.rate:.4g} samples/s"
    bound = "" if last.p90_bound_ms is None else f", with 99% confidence at most {last.p90_bound_ms:.3g} ms"
    p90 = f"{last.latency_ms['p90']:.3g} ms" if "p90" in last.latency_ms else "not told, too few queries"
    return f"{verdict}p90 {p90}{bound}"


def _rate_line(rate: Rate, runs: int) -> str:
    bound = f"p99 <= {rate.bound_ms:g} ms"
    if rate.held is None:
        return f"no rate held {bound} in {runs} runs; the lowest tried was {rate.failed:.4g} queries/s"
    above = "no higher one failed" if rate.failed is None else f"{rate.failed:.4g} did not hold"
    once = "in two runs of different arrivals" if rate.confirmed else "in one run only, for the runs were used up"
    return f"highest rate that holds {bound}: {rate.held:.4g} queries/s ({once}; {above}); {runs} runs"
