"""One call of `loadgen`: a bundle's model, a scenario, and the report."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from mi2rage_benchmarks.environment import environment
from mi2rage_benchmarks.loadgen import LoadGen, LoadGenSettings, Scenario
from mi2rage_benchmarks.loadgen_report import LoadGenReport, Rate
from mi2rage_benchmarks.loadgen_systems import SystemOptions, system_of
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt.bundle import Bundle

logger = logging.getLogger(__name__)

__all__ = ["LoadGenRequest", "run_loadgen"]

_LOADGEN = "mlcommons-loadgen"
_BUSY = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class LoadGenRequest:
    """What is measured, and how.

    Attributes:
        role: the component: `classifier`, `captioner` or `generator`.
        logs: the folder that a new folder for LoadGen's logs is made in.
        providers: ONNX Runtime's, in order of preference; none for the usual ones.
        threads: CPU threads; None takes the cores this process may use.
    """

    role: str
    scenario: Scenario
    settings: LoadGenSettings
    options: SystemOptions
    logs: Path
    providers: tuple[str, ...] = ()
    threads: int | None = None


def run_loadgen(folder: Path, request: LoadGenRequest) -> LoadGenReport:
    """Measure one model in one scenario.

    Raises:
        MissingExtraError: LoadGen is not installed.
        BundleError: the bundle is not whole, or has no such component.
        InputError: a number is out of range.
        DataError: the samples cannot be read.
        EngineError: the model failed, or LoadGen left no result.
    """
    scenario, settings = request.scenario, request.settings
    queries = settings.queries(scenario)
    bundle = Bundle.open(folder, providers=request.providers or None, threads=request.threads)
    system = system_of(request.role, bundle, request.options)
    here = _environment(request.threads or usable_cores())
    harness = LoadGen(system, settings, _new_folder(request.logs, f"{request.role}-{scenario}"))
    rate = _measured(harness, scenario)
    return LoadGenReport(
        scenario=scenario,
        bundle=str(folder),
        model=request.role,
        name=system.name,
        valid=harness.runs[-1].valid if rate is None else rate.held is not None,
        runs=tuple(harness.runs),
        rate=rate,
        min_seconds=settings.min_seconds,
        min_queries=queries,
        library=system.library,
        made_up=request.options.samples is None,
        batch_size=1 if scenario is Scenario.SINGLE_STREAM else system.batch_size,
        max_wait_ms=settings.max_wait_ms if scenario is Scenario.SERVER else None,
        seed=settings.seed,
        loadgen=importlib.metadata.version(_LOADGEN),
        logs=str(harness.logs),
        environment=here,
    )


def _environment(threads: int) -> dict[str, str]:
    found = environment(threads)
    busy = found.get("cores busy at start", "0")
    if float(busy) > _BUSY:
        logger.warning(
            "other processes keep %s of the machine's cores busy: latencies will be long and scattered", busy
        )
    return found


def _measured(harness: LoadGen[Any], scenario: Scenario) -> Rate | None:
    """Warm up, and make the runs of a scenario; of a server, the rate that was found."""
    warmth = harness.warm_up()
    if scenario is Scenario.OFFLINE:
        harness.offline(warmth)
    elif scenario is Scenario.SINGLE_STREAM:
        harness.single_stream(warmth)
    else:
        found, bound_ms = harness.server(warmth), harness.settings.target_p99_ms
        return Rate(held=found.held, confirmed=found.confirmed, failed=found.failed, bound_ms=bound_ms)
    return None


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that nothing is in yet, named by the time."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        folder = parent / (f"{now}-{name}" if number == 0 else f"{now}-{name}-{number + 1}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}: a thousand folders {now}-{name} are there")
