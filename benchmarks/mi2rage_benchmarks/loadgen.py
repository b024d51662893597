"""MLPerf LoadGen over a model: the scenarios, what LoadGen is told, and the search of a server's rate.

LoadGen asks, keeps the time and judges; `loadgen_answers` answers it, `loadgen_log` reads what it wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

from mi2rage_benchmarks.loadgen_answers import Answering, System
from mi2rage_benchmarks.loadgen_log import LoadGenRun, read_run
from mi2rage_benchmarks.loadgen_search import RateSearch, highest_rate
from mi2rage_engines.errors import InputError, require
from mi2rage_rt.progress import steps

__all__ = ["LEAST_QUERIES", "LoadGen", "LoadGenSettings", "Scenario", "Warmth", "loadgen_module"]

T = TypeVar("T")

LEAST_QUERIES = {"server": 459, "single-stream": 64, "offline": 1}
"""Fewer queries LoadGen never calls valid: it wants its percentile with 99% confidence."""

_ENOUGH_QUERIES = {"server": 1000, "single-stream": 100, "offline": 1}
_LONG_ENOUGH = 3
"""Runs at most until LoadGen has made queries enough for the least duration."""
_LEAST_EXPECTED_NS = 10_000
"""LoadGen makes all queries of a single stream beforehand, as many as the least duration could hold."""


class Scenario(StrEnum):
    """MLPerf's: one query after the other; all samples at once; queries at random times of a given rate."""

    SINGLE_STREAM = "single-stream"
    OFFLINE = "offline"
    SERVER = "server"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadGenSettings:
    """What LoadGen is told, and how the server is searched.

    Attributes:
        min_seconds: of a run; MLPerf's own rules ask for 600.
        min_queries: of a run; None takes 1,000 for a server, 100 for a single stream, and for offline, which is one
            query, 1.
        target_p99_ms: the server's bound.
        start_rate: queries a second that the search begins with; None takes half of what one at a time would give.
        max_runs: of the search.
        precision: the search ends where the lowest rate that fails is so close above the highest that holds.
        max_wait_ms: how long a server's batch waits for more, see `BatchOptions`.
        seed: of LoadGen's choices of samples and of its arrivals; the arrivals of every run of a search are others.

    Raises:
        InputError: a number is out of range.
    """

    min_seconds: float = 10.0
    min_queries: int | None = None
    target_p99_ms: float = 100.0
    start_rate: float | None = None
    max_runs: int = 16
    precision: float = 0.05
    max_wait_ms: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {"seconds": self.min_seconds, "target p99 (ms)": self.target_p99_ms, "precision": self.precision}
        numbers |= {"runs": self.max_runs}
        optional = {"queries": self.min_queries, "rate": self.start_rate}
        numbers |= {name: value for name, value in optional.items() if value is not None}
        for name, value in numbers.items():
            if not value > 0:
                raise InputError(f"{name}: came {value}; expected a number above 0")
        if self.seed < 0:
            raise InputError(f"seed: came {self.seed}; expected 0 or more, for LoadGen's seeds have no sign")

    def queries(self, scenario: Scenario) -> int:
        """The least number of queries of a run.

        Raises:
            InputError: it is one with which no run of a server could be valid, so that no rate would be found.
        """
        count = self.min_queries or _ENOUGH_QUERIES[scenario]
        if scenario is Scenario.SERVER and count < LEAST_QUERIES[scenario]:
            raise InputError(
                f"queries: came {count}; LoadGen calls no run of a server with a p99 bound valid below "
                f"{LEAST_QUERIES[scenario]}; give that many or more, e.g. {_ENOUGH_QUERIES[scenario]}"
            )
        return count


@dataclasses.dataclass(frozen=True, slots=True)
class Warmth:
    """What the warm-up took, by our own timer: LoadGen's expectations are set by it, and nothing is reported of it.

    Attributes:
        one_s: of a call with one item. best_s: of the fastest of them.
        item_s: of an item in a full batch.
    """

    one_s: float
    best_s: float
    item_s: float


def loadgen_module() -> Any:
    """The package `mlperf_loadgen`.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("mlperf_loadgen", "bench")


class LoadGen(Generic[T]):
    """Runs LoadGen on a system, in this process and one run at a time.

    Args:
        system: what answers.
        settings: see `LoadGenSettings`.
        logs: the folder that every run has a folder of its own in, with all that LoadGen writes.

    Raises:
        MissingExtraError: LoadGen is not installed.
        InputError: a setting is out of range.
    """

    def __init__(self, system: System[T], settings: LoadGenSettings, logs: Path) -> None:
        self.system = system
        self.settings = settings
        self.logs = logs
        self.runs: list[LoadGenRun] = []
        self._lg = loadgen_module()
        self._requests = itertools.count()

    def warm_up(self) -> Warmth:
        """Call the system as the scenarios will, with one item and with a full batch; untimed by LoadGen."""
        size = self.system.batch_size

        def seconds(count: int) -> float:
            items = [self._item(row % self.system.library) for row in range(count)]
            start = time.perf_counter()
            self.system.call(items)
            return time.perf_counter() - start

        one = [seconds(1) for _ in range(5)][2:]
        full = [seconds(size) for _ in range(3)][1:]
        return Warmth(statistics.median(one), min(one), statistics.median(full) / size)

    def single_stream(self, warmth: Warmth) -> LoadGenRun:
        """One sample after the other, each a call of its own; repeated where LoadGen had made too few for its time."""
        expected_s = warmth.one_s / 2
        for _ in range(_LONG_ENOUGH):
            run = self._run(
                Scenario.SINGLE_STREAM,
                {"single_stream_expected_latency_ns": max(_LEAST_EXPECTED_NS, int(1e9 * expected_s))},
            )
            if not run.too_short:
                break
            expected_s /= 2
        return run

    def offline(self, warmth: Warmth) -> LoadGenRun:
        """All samples in one query; repeated with more of them where they took less than the least duration."""
        expected = 1 / warmth.item_s
        for _ in range(_LONG_ENOUGH):
            run = self._run(Scenario.OFFLINE, {"offline_expected_qps": expected})
            if not run.too_short:
                break
            expected = 1.2 * max(run.rate, expected)
        return run

    def server(self, warmth: Warmth) -> RateSearch:
        """The highest rate of Poisson arrivals whose p99 stays within the bound, see `highest_rate`.

        Raises:
            InputError: the bound is below what a sample takes alone, so that no rate could hold it.
        """
        bound_ms = self.settings.target_p99_ms
        if 1e3 * warmth.best_s > bound_ms:
            raise InputError(
                f"target p99 (ms): came {bound_ms:g}; {self.system.name} takes {1e3 * warmth.best_s:.3g} ms for one "
                "sample alone, so that no rate holds it; give a larger bound"
            )

        def holds(rate: float) -> bool:
            asked = {"server_target_qps": rate, "server_target_latency_ns": int(1e6 * bound_ms)}
            return self._run(Scenario.SERVER, asked).valid

        start = self.settings.start_rate or 0.5 / warmth.one_s
        return highest_rate(holds, start, runs=self.settings.max_runs, precision=self.settings.precision)

    def _item(self, index: int) -> T:
        return self.system.request(index, next(self._requests))

    def _run(self, scenario: Scenario, expectations: dict[str, Any]) -> LoadGenRun:
        number = len(self.runs) + 1
        folder = self.logs / f"run-{number:02d}"
        folder.mkdir(parents=True)
        asked = self._test_settings(scenario, expectations, number)
        with steps(f"{scenario}, run {number}"), Answering(self._lg, self._item, self.system) as answering:
            if scenario is Scenario.SERVER:
                answer = answering.batched(self.settings.max_wait_ms)
            else:
                answer = answering.in_pieces if scenario is Scenario.OFFLINE else answering.one_by_one
            self._start(answer, asked, folder)
        self.runs.append(read_run(folder))
        return self.runs[-1]

    def _test_settings(self, scenario: Scenario, expectations: dict[str, Any], number: int) -> Any:
        asked = self._lg.TestSettings()
        kinds = self._lg.TestScenario
        asked.scenario = {
            Scenario.SINGLE_STREAM: kinds.SingleStream,
            Scenario.OFFLINE: kinds.Offline,
            Scenario.SERVER: kinds.Server,
        }[scenario]
        asked.mode = self._lg.TestMode.PerformanceOnly
        asked.min_duration_ms = max(1, round(1e3 * self.settings.min_seconds))
        asked.min_query_count = self.settings.queries(scenario)
        asked.qsl_rng_seed = asked.sample_index_rng_seed = self.settings.seed
        asked.schedule_rng_seed = self.settings.seed + number
        for name, value in expectations.items():
            setattr(asked, name, value)
        return asked

    def _start(self, answer: Callable[[Sequence[Any]], None], asked: Any, folder: Path) -> None:
        lg, count = self._lg, self.system.library
        output, logging = lg.LogOutputSettings(), lg.LogSettings()
        output.outdir = str(folder)
        logging.log_output, logging.enable_trace = output, False
        sut = lg.ConstructSUT(answer, lambda: None)
        library = lg.ConstructQSL(count, count, lambda _: None, lambda _: None)
        try:
            # Without the last argument LoadGen would obey a file `audit.config` in the working folder.
            lg.StartTestWithLogSettings(sut, library, asked, logging, str(folder / "audit.config"))
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(sut)
