"""The comparison with PyTorch: what it records, and that it times nothing that differs. No figure is judged here."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from mi2rage_benchmarks import commands
from mi2rage_benchmarks.bench import BenchReport, run_bench
from mi2rage_benchmarks.probes import Timing, busy_cores, environment, time_alternating
from mi2rage_engines.errors import BundleError, InputError, MissingExtraError, ModelFolderError, ParityError
from tests.models.tiny_classifier import build_classifier
from tests.models.tiny_generator import build_generator


@pytest.fixture(scope="module")
def report(exported_bundle, tiny_classifier, tiny_generator):
    return run_bench(
        exported_bundle, classifier=tiny_classifier, generator=tiny_generator, batch_sizes=(1, 3), threads=1, repeats=7
    )


def test_a_cell_for_every_call_and_batch_size(report):
    assert [(cell.name, cell.batch_size) for cell in report.cells] == [
        ("classifier", 1),
        ("classifier", 3),
        ("generator step (UNet)", 1),
        ("generator step (UNet)", 3),
    ]
    for cell in report.cells:
        assert cell.sizes["batch"] == cell.batch_size
        assert cell.difference <= 1e-4
        assert 0 < cell.ratio.p25 <= cell.ratio.median <= cell.ratio.p75
        for side in (cell.pytorch, cell.onnxruntime):
            # Whole windows of five, so seven become ten; the warm-up is kept apart.
            assert (len(side.samples_ms), len(side.warmup_ms), side.window) == (10, 3, 5)
            assert min(side.samples_ms) <= side.p25_ms <= side.median_ms <= side.p75_ms <= max(side.samples_ms)


def test_the_report_says_where_it_was_measured_and_survives_a_file(report):
    assert {"cpu", "cores", "threads", "python", "torch", "onnxruntime", "date"} <= report.environment.keys()
    assert report.environment["threads"] == "1"
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_torchs_threads_are_put_back(exported_bundle, tiny_classifier):
    before = torch.get_num_threads()
    run_bench(exported_bundle, classifier=tiny_classifier, batch_sizes=(1,), threads=before + 1, repeats=1)
    assert torch.get_num_threads() == before


def test_sides_take_turns_and_the_ratio_is_of_neighbours():
    calls: list[str] = []
    first, second = time_alternating(lambda: calls.append("a"), lambda: calls.append("b"), repeats=10, warmup=2)
    assert "".join(calls) == "aabb" + "a" * 6 + "b" * 6 + "b" * 6 + "a" * 6
    assert len(first.samples_ms) == len(second.samples_ms) == 10

    slow = Timing.from_samples([4.0] * 5 + [9.0] * 5, [], 5)
    fast = Timing.from_samples([2.0] * 5 + [3.0] * 5, [], 5)
    ratio = slow.ratio_to(fast)
    assert (ratio.median, ratio.p25, ratio.p75) == (2.5, 2.25, 2.75)
    assert (slow.median_ms, slow.p25_ms, slow.p75_ms) == (6.5, 4.0, 9.0)


def test_another_model_is_not_timed(exported_bundle, tmp_path):
    other = build_classifier(tmp_path / "classifier", seed=1)
    with pytest.raises(ParityError, match="classifier: the bundle's graph and the PyTorch model differ by"):
        run_bench(exported_bundle, classifier=other, repeats=1)
    larger = build_generator(tmp_path / "generator", text_width=48)
    with pytest.raises(BundleError, match=r"takes encoder_hidden_states .*32.*, the given model .*48"):
        run_bench(exported_bundle, generator=larger, repeats=1)


def test_wrong_input_is_refused(exported_bundle, tiny_classifier, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no model was given"):
        run_bench(exported_bundle)
    for wrong in ({"batch_sizes": (0,)}, {"threads": 0}, {"repeats": 0}):
        with pytest.raises(InputError, match="0 is too small; expected 1 or more"):
            run_bench(exported_bundle, classifier=tiny_classifier, **wrong)
    with pytest.raises(BundleError, match="no such folder"):
        run_bench(tmp_path / "nothing", classifier=tiny_classifier)
    with pytest.raises(ModelFolderError, match="no such folder"):
        run_bench(exported_bundle, classifier=tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"mi2rage-rt\[train\]"):
        run_bench(exported_bundle, classifier=tiny_classifier)


def test_a_bundle_without_the_component_is_refused(exported_bundle, tiny_classifier, tmp_path):
    folder = shutil.copytree(exported_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps(manifest | {"classifier": None}), encoding="utf-8")
    with pytest.raises(BundleError, match="this bundle has no classifier; leave --classifier out"):
        run_bench(folder, classifier=tiny_classifier)


def test_the_command_prints_a_table_or_json_and_writes_a_file(report, tmp_path, monkeypatch):
    import mi2rage_benchmarks.bench as module

    monkeypatch.setattr(module, "run_bench", lambda *_, **__: report)
    app = typer.Typer()
    app.command()(commands.bench)
    arguments = ["bundle", "--classifier", "c", "--batch-size", "1", "--batch-size", "3"]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "results.json")])
    assert run.exit_code == 0, run.output
    rows = [line for line in run.output.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert rows[0].startswith("| call ")
    assert BenchReport.model_validate_json((tmp_path / "results.json").read_text(encoding="utf-8")) == report
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert BenchReport.model_validate_json(run.output) == report


def test_the_environment_names_the_processor():
    found = environment(3)
    assert found["threads"] == "3"
    assert found["cpu"]
    assert np.int64(found["cores"]) >= 1
    busy = busy_cores(0.05)
    assert busy is None or busy >= 0
