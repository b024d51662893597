"""LoadGen over systems of known speed, over the models of a tiny bundle, and by the command."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time

import numpy as np
import pytest

from mi2rage_benchmarks.loadgen import LoadGen, LoadGenSettings, Scenario, loadgen_module
from mi2rage_benchmarks.loadgen_answers import System
from mi2rage_benchmarks.loadgen_log import DETAIL_LOG, read_run
from mi2rage_benchmarks.loadgen_report import LoadGenReport
from mi2rage_benchmarks.loadgen_run import LoadGenRequest, run_loadgen
from mi2rage_benchmarks.loadgen_systems import SystemOptions, system_of
from mi2rage_engines.errors import BundleError, DataError, EngineError, InputError, MissingExtraError
from mi2rage_rt import cli, progress
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span, write_samples
from tests.runtime.tiny_bundle import build_bundle

ROLES = ("classifier", "captioner", "generator")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def bundle(folder):
    return Bundle.open(folder, providers=("CPUExecutionProvider",), threads=1)


class Sleeper:
    """A system that sleeps so long a call and so long an item, and notes what it was asked."""

    def __init__(self, call_s: float = 0.0, item_s: float = 0.0) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.threads: set[str] = set()
        self._call_s, self._item_s = call_s, item_s

    def __call__(self, items):
        self.calls.append(items)
        self.threads.add(threading.current_thread().name)
        time.sleep(self._call_s + self._item_s * len(items))
        return items

    def system(self, batch_size: int = 4) -> System[tuple[int, int]]:
        return System("sleeper", 16, lambda index, number: (index, number), self, batch_size)


def harness(system, tmp_path, **settings):
    pytest.importorskip("mlperf_loadgen")
    return LoadGen(system, LoadGenSettings(**settings), tmp_path / "logs")


def entry(key, value, *, is_error=False):
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": {"is_error": is_error}})


def test_single_stream_gives_the_p90_of_a_known_latency(tmp_path):
    sleeper = Sleeper(call_s=0.003)
    test = harness(sleeper.system(), tmp_path, min_seconds=0.4, min_queries=70)
    run = test.single_stream(test.warm_up())
    assert run.valid, run.reasons
    assert 3.0 <= run.latency_ms["p50"] <= run.latency_ms["p90"] < 15
    assert run.p90_bound_ms >= run.latency_ms["p90"]
    assert run.queries >= 70
    assert run.seconds >= 0.4
    assert run.rate <= 1 / 0.003
    assert all(len(call) == 1 for call in sleeper.calls[-run.queries :])
    assert (run.settings["scenario"], run.settings["min_query_count"]) == ("SingleStream", 70)
    assert (tmp_path / "logs/run-01/mlperf_log_summary.txt").is_file()


def test_offline_gives_the_rate_of_a_known_cost(tmp_path):
    sleeper = Sleeper(item_s=0.001)
    test = harness(sleeper.system(batch_size=8), tmp_path, min_seconds=0.3)
    warmth = test.warm_up()
    run = test.offline(warmth)
    assert run.valid, run.reasons
    assert 300 < run.rate <= 1000
    assert run.seconds >= 0.3
    assert run.latency_ms == {}
    asked = [number for call in sleeper.calls for _, number in call]
    assert len(set(asked)) == len(asked), "no two requests are alike"


def test_offline_is_repeated_where_loadgen_had_made_too_few_samples(tmp_path):
    test = harness(Sleeper(item_s=0.0005).system(), tmp_path, min_seconds=0.2)
    warmth = test.warm_up()
    run = test.offline(type(warmth)(warmth.one_s, warmth.best_s, item_s=0.005))
    assert len(test.runs) >= 2
    assert not test.runs[0].valid
    assert test.runs[0].too_short
    assert run.valid, run.reasons


def test_a_server_is_searched_for_the_rate_it_can_do(tmp_path):
    # Two items a call of 2 ms: 1,000 a second, and none beyond.
    sleeper = Sleeper(call_s=0.002)
    settings = {"min_seconds": 0.1, "min_queries": 470, "target_p99_ms": 120.0, "start_rate": 350.0, "max_runs": 6}
    test = harness(sleeper.system(batch_size=2), tmp_path, precision=0.5, max_wait_ms=1.0, **settings)
    found = test.server(test.warm_up())
    assert found.held is not None
    assert found.held < 1400
    assert found.runs == len(test.runs) == len(list((tmp_path / "logs").iterdir()))
    assert [run.valid for run in test.runs].count(True) >= 1
    slow = next(run for run in test.runs if not run.valid)
    assert slow.reasons
    assert slow.asked_rate > found.held
    assert slow.over_bound > 0
    seeds = [run.settings["schedule_rng_seed"] for run in test.runs]
    assert len(set(seeds)) == len(seeds), "every run has arrivals of its own"
    assert any(len(call) == 2 for call in sleeper.calls), "requests are batched"


def test_a_bound_below_one_sample_is_refused_before_any_run(tmp_path):
    test = harness(Sleeper(call_s=0.01).system(), tmp_path, target_p99_ms=1.0)
    with pytest.raises(InputError, match="no rate holds it"):
        test.server(test.warm_up())
    assert test.runs == []


def test_too_few_queries_are_reported_as_invalid(tmp_path):
    test = harness(Sleeper(call_s=0.001).system(), tmp_path, min_seconds=0.005, min_queries=10)
    run = test.single_stream(test.warm_up())
    assert not run.valid
    assert run.reasons == ("too few queries within the bound for 99% confidence",)
    assert "p90" not in run.latency_ms


@pytest.mark.parametrize("scenario", ["single_stream", "offline", "server"])
def test_an_error_of_the_model_comes_out_and_ends_the_run(tmp_path, scenario):
    sleeper = Sleeper()

    def call(items):
        if any(number > 60 for _, number in items):
            raise EngineError("broken")
        return sleeper(items)

    system = System("broken", 16, lambda index, number: (index, number), call, 4)
    test = harness(system, tmp_path, min_seconds=0.2, min_queries=470, start_rate=2000.0)
    with pytest.raises(EngineError, match="broken"):
        getattr(test, scenario)(test.warm_up())
    assert test.runs == []


def test_ctrl_c_comes_out_of_loadgen_as_itself(tmp_path, caplog):
    calls = []

    def call(items):
        calls.append(len(items))
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return items

    system = System("interrupted", 16, lambda index, number: number, call, 4)
    test = harness(system, tmp_path, min_seconds=0.2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        test.single_stream(test.warm_up())
    assert len(calls) == 20
    assert signal.getsignal(signal.SIGINT) is before
    assert [record.getMessage() for record in caplog.records if "Ctrl-C ends at once" in record.getMessage()]


@pytest.mark.parametrize(
    "wrong", [{"min_seconds": 0}, {"min_queries": -1}, {"target_p99_ms": 0}, {"start_rate": 0}, {"max_runs": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="expected a number above 0"):
        LoadGenSettings(**wrong)


def test_a_seed_without_meaning_for_loadgen_is_refused():
    with pytest.raises(InputError, match="seed"):
        LoadGenSettings(seed=-1)


def test_a_server_of_too_few_queries_is_refused():
    with pytest.raises(InputError, match="459"):
        LoadGenSettings(min_queries=100).queries(Scenario.SERVER)
    assert LoadGenSettings().queries(Scenario.SERVER) == 1000
    assert LoadGenSettings(min_queries=64).queries(Scenario.SINGLE_STREAM) == 64


def test_a_log_without_a_result_is_an_error_that_names_loadgens_own(tmp_path):
    with pytest.raises(EngineError, match="cannot be read"):
        read_run(tmp_path)
    lines = [entry("effective_scenario", "Server"), entry("error_runtime", "out of luck", is_error=True)]
    (tmp_path / DETAIL_LOG).write_text("\n".join(["noise", *lines, ':::MLLOG {"key": "cut', ""]), encoding="utf-8")
    with pytest.raises(EngineError, match=r"result_query_count.*error_runtime: out of luck"):
        read_run(tmp_path)


@pytest.mark.parametrize("role", ROLES)
def test_a_systems_requests_differ_and_its_answers_are_the_models_own(bundle, role):
    system = system_of(role, bundle, SystemOptions(library=5))
    assert system.library == 5
    first, again, other = system.request(2, 0), system.request(2, 1), system.request(3, 2)
    if role == "generator":
        assert first[0] != again[0] != other[0]
        assert len({first[1], again[1], other[1]}) == 3
    else:
        pixels = [request[1] if role == "classifier" else request for request in (first, again)]
        assert (pixels[0] != pixels[1]).any(axis=-1).sum() == 1
    answers = list(system.call([first, again, other]))
    assert len(answers) == 3
    for item, answer in zip((first, again, other), answers, strict=True):
        np.testing.assert_array_equal(np.asarray(next(iter(system.call([item])))), np.asarray(answer))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    home = tmp_path_factory.mktemp("rows")
    image = np.full((9, 7, 3), 200, dtype=np.uint8)
    (home / "a.png").write_bytes(encode_image(image))
    words = ("tim", "leads", "apple")
    samples = [Sample(str(n), words, Span(0, 1), Span(2, 3), image="a.png" if n < 2 else None) for n in range(3)]
    write_samples(home / "rows.jsonl", samples)
    write_samples(home / "bare.jsonl", samples[2:])
    return home


def test_samples_come_from_a_file_and_their_images_are_resized_before_the_run(bundle, rows):
    options = SystemOptions(samples=rows / "rows.jsonl")
    classifier = system_of("classifier", bundle, options)
    assert classifier.library == 3
    sample, image = classifier.request(0, 7)
    assert (sample.tokens, image.shape) == (("tim", "leads", "apple"), (6, 6, 3))
    assert classifier.request(2, 8)[1] is None
    assert system_of("captioner", bundle, options).library == 2
    assert system_of("generator", bundle, options).request(0, 5)[0] == "tim leads apple 5"
    with pytest.raises(DataError, match="has an image"):
        system_of("captioner", bundle, SystemOptions(samples=rows / "bare.jsonl"))


def test_a_bundle_without_the_model_is_refused(tmp_path):
    only = Bundle.open(build_bundle(tmp_path / "b", ("generator",)), providers=("CPUExecutionProvider",), threads=1)
    with pytest.raises(BundleError, match="no classifier"):
        system_of("classifier", only, SystemOptions())


@pytest.mark.parametrize("role", ROLES)
def test_a_model_of_a_bundle_is_measured_in_a_single_stream(folder, tmp_path, role):
    pytest.importorskip("mlperf_loadgen")
    settings = LoadGenSettings(min_seconds=0.1, min_queries=64)
    options = SystemOptions(library=4, tokens=3 if role == "captioner" else None)
    request = LoadGenRequest(role, Scenario.SINGLE_STREAM, settings, options, tmp_path / "logs", threads=1)
    report = run_loadgen(folder, request)
    assert report.valid, report.runs
    assert report.model == role
    assert report.name == f"tiny-{role}"
    assert (report.batch_size, report.rate, report.max_wait_ms) == (1, None, None)
    assert LoadGenReport.model_validate_json(report.model_dump_json()) == report


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main(["loadgen", *map(str, arguments), "--quiet"])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    yield run
    progress.be_quiet(False)


def test_the_command_prints_a_table_and_writes_the_report(call, folder, tmp_path):
    pytest.importorskip("mlperf_loadgen")
    logs, out = tmp_path / "logs", tmp_path / "report.json"
    quick = ("--seconds", 0.05, "--queries", 64, "--threads", 1, "--logs", logs, "--library", 4)
    code, text, err = call(folder, *quick, "--out", out)
    assert (code, err) == (0, "")
    report = LoadGenReport.model_validate_json(out.read_text(encoding="utf-8"))
    assert f"{report.runs[0].latency_ms['p90']:.3g} ms" in text
    assert "VALID" in text
    assert report.logs in text
    code, text, _ = call(folder, *quick, "--scenario", "offline", "--batch-size", 2, "--json")
    report = LoadGenReport.model_validate_json(text)
    assert (code, report.scenario, report.batch_size, report.min_queries) == (0, Scenario.OFFLINE, 2, 64)
    assert len(list(logs.iterdir())) == 2


def test_a_run_that_loadgen_calls_invalid_is_said_to_be_and_exits_with_1(call, folder, tmp_path):
    pytest.importorskip("mlperf_loadgen")
    code, text, err = call(folder, "--seconds", 0.001, "--queries", 5, "--threads", 1, "--logs", tmp_path / "logs")
    assert (code, err) == (1, "")
    assert "INVALID by LoadGen, not to be quoted" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "teacher"), ("teacher", "classifier, captioner, generator")),
        (("--scenario", "multi-stream"), ("multi-stream", "single-stream, offline, server")),
        (("--target-p99-ms", 5), ("--target-p99-ms", "server")),
        (("--scenario", "server", "--queries", 100), ("100", "459")),
        (("--seconds", 0), ("seconds", "above 0")),
        (("--samples", "/nowhere.jsonl"), ("/nowhere.jsonl", "cannot be read")),
    ],
)
def test_wrong_input_is_refused_with_2(call, folder, tmp_path, arguments, words):
    pytest.importorskip("mlperf_loadgen")
    code, text, err = call(folder, *arguments, "--logs", tmp_path / "logs")
    assert (code, text) == (2, "")
    assert err.startswith("error: ")
    assert all(word in err for word in words), err
    assert not (tmp_path / "logs").exists()


def test_without_the_wheel_the_command_names_the_extra(call, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingExtraError):
        loadgen_module()
    code, _, err = call(folder)
    assert code == 2
    assert "mi2rage-rt[bench]" in err
