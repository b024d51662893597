"""The comparison with PyTorch: what it records, and that it times nothing that differs. No figure is judged here."""

from __future__ import annotations

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from mi2rage_benchmarks import commands
from mi2rage_benchmarks.bench import BenchRequest, run_bench
from mi2rage_benchmarks.bench_markdown import markdown
from mi2rage_benchmarks.report import EAGER, BenchReport
from mi2rage_benchmarks.subjects import SUBJECTS
from mi2rage_engines.errors import BundleError, InputError, MissingExtraError, ModelFolderError, ParityError
from tests.models.tiny_classifier import build_classifier
from tests.models.tiny_generator import build_generator

QUICK = {"threads": 1, "repeats": 2, "tokens": 4, "texts": 3}


@pytest.fixture(scope="module")
def also(exported_bundle, tmp_path_factory):
    return shutil.copytree(exported_bundle, tmp_path_factory.mktemp("also") / "second")


@pytest.fixture(scope="module")
def report(exported_bundle, tiny_classifier, tiny_generator):
    request = BenchRequest(
        classifier=tiny_classifier, generator=tiny_generator, batch_sizes=(1, 3), threads=1, repeats=7
    )
    return run_bench(exported_bundle, request)


@pytest.fixture(scope="module")
def everything(exported_bundle, also):
    return run_bench(exported_bundle, BenchRequest(also=(also,), subjects=("all",), batch_sizes=(2,), **QUICK))


def test_without_subjects_the_graph_calls_of_the_models_given(report):
    assert [(cell.title, cell.kind, cell.batch_size) for cell in report.cells] == [
        ("classifier", "graph", 1),
        ("classifier", "graph", 3),
        ("generator step (UNet)", "graph", 1),
        ("generator step (UNet)", "graph", 3),
    ]
    for cell in report.cells:
        assert cell.sizes["batch"] == cell.items == cell.batch_size
        assert [side.name for side in cell.sides] == [EAGER, "ONNX Runtime fp32"]
        eager, runtime = cell.sides
        assert eager.ratio is None
        assert runtime.ratio.median > 0
        (check,) = runtime.checks
        assert (check.measure, check.threshold, check.passed) == ("max_abs_scaled", 1e-4, True)
        for side in cell.sides:
            # Whole windows of five, so seven become ten, unless the machine is so slow that windows are shorter.
            assert len(side.timing.samples_ms) % side.timing.window == 0
            assert 7 <= len(side.timing.samples_ms) <= 10
            assert side.timing.p25_ms <= side.timing.median_ms <= side.timing.p75_ms
            assert side.gemm_fraction == pytest.approx(cell.flop / side.timing.median_ms / 1e6 / report.gemm_gflops)


def test_pytorch_may_run_in_another_precision_and_is_held_against_fp32(exported_bundle):
    """What a fair baseline takes where it is faster; the bundle's answers are held against fp32 all the same."""
    subjects = ("classifier", "unet", "classify", "generate", "caption")
    found = run_bench(exported_bundle, BenchRequest(precision="bf16", subjects=subjects, batch_sizes=(2,), **QUICK))
    assert {cell.subject for cell in found.cells} == set(subjects)
    for cell in found.cells:
        assert cell.title.endswith(", PyTorch in bf16 on cpu")
        eager, runtime = cell.sides
        assert eager.timing is not None and runtime.ratio is not None
        measured = {check.measure: check.value for check in (*eager.checks, *runtime.checks) if check.value}
        assert measured and len(eager.checks) == len(runtime.checks)
    (logits,) = (cell for cell in found.cells if cell.subject == "classifier")
    apart = [side.checks[0].value for side in logits.sides]
    assert apart[0] > 1e-4 > apart[1]  # eager alone is in bf16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "fp8"), "PyTorch in 'fp8': not known; expected one of fp32, fp16, bf16"),
        (("--backend", "ort-cuda"), "backend ort-cuda: "),
        (("--backend", "vulkan"), "backend 'vulkan': there is none of that name"),
        (("--device", "cuda"), "cuda"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these are missing where there is no GPU")
def test_what_cannot_run_is_refused_before_anything_is_measured(exported_bundle, options, message):
    app = typer.Typer()
    app.command()(commands.bench)
    answer = CliRunner().invoke(app, [str(exported_bundle), *options])
    assert isinstance(answer.exception, InputError) and message in str(answer.exception)


def test_every_subject_has_its_cells_and_every_bundle_its_row(everything):
    assert {cell.subject for cell in everything.cells} == set(SUBJECTS)
    names = [EAGER, "ONNX Runtime fp32 (bundle)", "ONNX Runtime fp32 (second)"]
    for cell in everything.cells:
        assert [side.name for side in cell.sides if "alone" not in side.name] == names
        assert all(side.failed is None and side.timing is not None for side in cell.sides)
        assert all(side.checks and all(check.passed for check in side.checks) for side in cell.sides[1:2])
        assert cell.flop > 0
    whole = [cell for cell in everything.cells if cell.kind == "whole" and cell.subject != "chain"]
    for cell in whole:
        assert all(0 < side.outside_share < 1 and side.outside_ms > 0 for side in cell.sides[1:])
    titles = [cell.title for cell in whole if cell.subject == "generate"]
    assert titles == ["generation, 4 steps, guided", "generation, 4 steps, no guidance"]
    guided, alone = (cell.flop for cell in whole if cell.subject == "generate")
    assert 1.5 < guided / alone < 2  # everything but the decoder runs twice


def test_a_chain_is_held_against_its_generation_alone(everything):
    (chain,) = (cell for cell in everything.cells if cell.subject == "chain")
    assert (chain.items, chain.sizes["texts"], chain.sizes["links"]) == (6, 3, 2)
    runtime, alone = chain.sides[1:3]
    assert alone.name == f"{runtime.name}, generation alone"
    assert runtime.of_generation.median > 0
    assert alone.gemm_fraction is None
    assert alone.of_generation is None


def test_compiled_modules_are_a_side_too(exported_bundle, monkeypatch):
    # Traced as ever, run as traced: compiling for real takes minutes here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    subjects = ("classifier", "text-encoder", "vae-decoder", "caption")
    report = run_bench(exported_bundle, BenchRequest(subjects=subjects, compile=True, batch_sizes=(2,), **QUICK))
    for cell in report.cells:
        side = cell.sides[1]
        assert (side.name, side.failed) == ("torch.compile", None)
        assert side.checks[0].passed
        assert side.first_ms > 0


def test_a_side_that_fails_is_a_row_that_says_why(exported_bundle, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", refuse)
    report = run_bench(exported_bundle, BenchRequest(subjects=("classifier",), compile=True, **QUICK))
    eager, compiled, runtime = report.cells[0].sides
    assert (compiled.failed, compiled.timing) == ("RuntimeError: no compiler here", None)
    assert eager.timing is not None
    assert runtime.timing is not None
    assert "failed: RuntimeError: no compiler here" in markdown(report)


def test_a_lower_precision_that_drifts_is_a_row_and_not_an_end(exported_bundle, tmp_path, monkeypatch):
    from mi2rage_export import parity

    other = shutil.copytree(exported_bundle, tmp_path / "half")
    manifest = json.loads((other / "bundle.json").read_text(encoding="utf-8"))
    for graph in manifest["classifier"]["graphs"].values():
        graph["precision"] = "fp16"
    (other / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    strict = parity.Bounds(-1.0, 2.0, -1.0, 200.0, None, 1.0, 0.0)
    monkeypatch.setitem(parity.BOUNDS, "fp16", strict)
    report = run_bench(exported_bundle, BenchRequest(also=(other,), subjects=("classifier",), **QUICK))
    side = report.cells[0].sides[-1]
    assert side.name == "ONNX Runtime fp16, fp32"
    assert side.failed.startswith("max_abs_scaled is ")
    assert "the bound is -1" in side.failed
    assert side.timing is None


def test_the_report_says_where_it_was_measured_and_survives_a_file(report):
    assert {"cpu", "cores", "threads", "python", "torch", "onnxruntime", "date"} <= report.environment.keys()
    assert report.environment["threads"] == "1"
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_torchs_threads_are_put_back(exported_bundle):
    before = torch.get_num_threads()
    run_bench(exported_bundle, BenchRequest(subjects=("classifier",), batch_sizes=(1,), threads=before + 1, repeats=1))
    assert torch.get_num_threads() == before


def test_a_cell_of_its_own_process_is_as_one_of_this(exported_bundle):
    request = BenchRequest(subjects=("classify",), batch_sizes=(2,), isolated=True, again=True, **QUICK)
    report = run_bench(exported_bundle, request, command="the command")
    (cell,) = report.cells
    names = [EAGER, "ONNX Runtime fp32", "ONNX Runtime fp32, again"]
    assert ([side.name for side in cell.sides], cell.failed) == (names, None)
    eager, runtime, again = cell.sides
    assert (runtime.of_itself, again.of_itself.windows) == (None, again.ratio.windows)
    assert set(runtime.stages_ms) == set(again.stages_ms) != set()
    assert sum(runtime.stages_ms.values()) < runtime.timing.median_ms * 1.5
    assert set(eager.stages_ms) == {"classifier"}
    assert cell.moved_bytes > 0
    assert cell.conditions.looks >= 0
    assert all(side.timing.ended == "repeats" and side.roofline_fraction > 0 for side in cell.sides)
    assert (report.isolated, report.command, report.schema_version) == (True, "the command", 2)
    assert report.copy_gbps > 0
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_another_model_is_a_row_where_cells_have_processes(exported_bundle, tmp_path):
    other = build_classifier(tmp_path / "classifier", seed=1)
    request = BenchRequest(
        classifier=other, subjects=("classifier",), batch_sizes=(1,), isolated=True, threads=1, repeats=1
    )
    report = run_bench(exported_bundle, request)
    assert "and the PyTorch model differ: max_abs_scaled is" in report.cells[0].failed
    assert report.failures == (f"classifier, batch 1: {report.cells[0].failed}",)
    assert "| every side" in markdown(report)


def test_another_model_is_not_timed(exported_bundle, tmp_path):
    other = build_classifier(tmp_path / "classifier", seed=1)
    with pytest.raises(ParityError, match=r"classifier: .* and the PyTorch model differ: max_abs_scaled is"):
        run_bench(exported_bundle, BenchRequest(classifier=other, repeats=1))
    larger = build_generator(tmp_path / "generator", text_width=48)
    with pytest.raises(BundleError, match=r"takes encoder_hidden_states .*32.*, the given model .*48"):
        run_bench(exported_bundle, BenchRequest(generator=larger, repeats=1))


def test_wrong_input_is_refused(exported_bundle, tiny_classifier, tmp_path, monkeypatch):
    for wrong in ({"batch_sizes": (0,)}, {"threads": 0}, {"repeats": 0}, {"soak": 0}):
        with pytest.raises(InputError, match="0 is too small; expected 1 or more"):
            BenchRequest(**wrong)
    with pytest.raises(InputError, match=r"budget: 0\.0 s is no time to measure in; expected seconds above 0"):
        BenchRequest(budget_seconds=0.0)
    with pytest.raises(InputError, match="subject 'teacher': not known; expected some of classifier, unet"):
        run_bench(exported_bundle, BenchRequest(subjects=("teacher",)))
    with pytest.raises(BundleError, match="no such folder"):
        run_bench(tmp_path / "nothing")
    with pytest.raises(ModelFolderError, match="no such folder"):
        run_bench(exported_bundle, BenchRequest(classifier=tmp_path / "nothing"))
    with pytest.raises(InputError, match="there is a classifier already"):
        run_bench(exported_bundle, BenchRequest(classifier=tiny_classifier, random_weights=("bert-clip",)))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"mi2rage-rt\[train\]"):
        run_bench(exported_bundle)


def _with_manifest(exported_bundle, folder, **changes):
    copied = shutil.copytree(exported_bundle, folder)
    manifest = json.loads((copied / "bundle.json").read_text(encoding="utf-8"))
    (copied / "bundle.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
    return copied


def test_a_bundle_without_the_component_is_refused(exported_bundle, tiny_classifier, tmp_path):
    folder = _with_manifest(exported_bundle, tmp_path / "bundle", classifier=None)
    with pytest.raises(BundleError, match="this bundle has no classifier; leave --classifier out"):
        run_bench(folder, BenchRequest(classifier=tiny_classifier))
    with pytest.raises(BundleError, match="has not all of classifier/classifier, which the subject 'classify' takes"):
        run_bench(folder, BenchRequest(subjects=("classify",)))


def test_a_source_that_is_not_there_is_asked_for(exported_bundle, tmp_path):
    folder = _with_manifest(exported_bundle, tmp_path / "bundle", source={"classifier": "someone/far-away"})
    with pytest.raises(InputError, match="came from 'someone/far-away', which is not there; expected --classifier"):
        run_bench(folder, BenchRequest(subjects=("classifier",)))


def test_memory_and_soak_are_measured_in_processes_of_their_own(exported_bundle):
    request = BenchRequest(subjects=("classifier",), batch_sizes=(1,), threads=1, repeats=1, memory=True, soak=40)
    report = run_bench(exported_bundle, request)
    assert [(row.subject, row.side, row.failed) for row in report.memory] == [
        ("classification", EAGER, None),
        ("classification", "ONNX Runtime fp32", None),
    ]
    for row in report.memory:
        assert row.weights_bytes > 10_000
        assert row.peak_bytes > 0
        assert row.largest_bytes == report.memory[0].largest_bytes > 0
    (soak,) = report.soak
    assert soak.requests == (4, 20, 40)
    assert all(size > 10_000_000 for size in soak.resident_bytes)
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    shown = markdown(report)
    assert "| classification | " in shown
    assert "after so many classifications: 4: " in shown


def test_the_command_prints_a_table_or_json_and_writes_a_file(report, tmp_path, monkeypatch):
    import mi2rage_benchmarks.bench as module

    asked = []
    monkeypatch.setattr(module, "run_bench", lambda *args, **_: asked.append(args) or report)
    app = typer.Typer()
    app.command()(commands.bench)
    arguments = ["bundle", "--classifier", "c", "--batch-size", "1", "--batch-size", "3", "--also", "other"]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "results.json")])
    assert run.exit_code == 0, run.output
    rows = [line for line in run.output.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 8
    assert rows[0].startswith("| call ")
    assert len({len(row) for row in rows}) == 1
    assert BenchReport.model_validate_json((tmp_path / "results.json").read_text(encoding="utf-8")) == report
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert BenchReport.model_validate_json(run.output) == report
    request = asked[0][1]
    assert (request.batch_sizes, [str(path) for path in request.also]) == ((1, 3), ["other"])
    assert np.all([side.timing.median_ms > 0 for cell in report.cells for side in cell.sides])


def test_feature_caching_is_a_cell_of_its_own_with_its_price(cached_bundle, tiny_generator, exported_bundle):
    request = BenchRequest(
        generator=tiny_generator,
        subjects=("generate",),
        feature_cache=2,
        batch_sizes=(2,),
        steps=5,
        threads=1,
        repeats=2,
    )
    report = run_bench(cached_bundle, request)
    titles = [f"generation, 5 steps, {words}" for words in ("guided", "no guidance")]
    assert [cell.title for cell in report.cells] == [*titles, *(f"{title}, feature cache 2" for title in titles)]
    checks = [cell.sides[1].checks[0] for cell in report.cells]
    assert {check.measure for check in checks} == {"image_psnr_db"}
    assert [check.threshold for check in checks] == [40.0, 40.0, None, None]
    assert all(whole.value > 60 > cached.value > 10 for whole, cached in zip(checks[:2], checks[2:], strict=True))
    assert {"denoise_step_full", "denoise_step_shallow"} <= report.cells[2].sides[1].stages_ms.keys()
    assert "denoise_step_shallow" not in report.cells[0].sides[1].stages_ms
    # PyTorch's operations are not those of a bundle that leaves some out.
    assert [all(side.gemm_fraction is None for side in cell.sides) for cell in report.cells] == [
        False,
        False,
        True,
        True,
    ]
    lines = markdown(report).splitlines()
    said = [line for line in lines if line.endswith(" dB")]
    assert said == [
        f"- {cell.title}, batch 2, ONNX Runtime fp32: PSNR {check.value:.1f} dB"
        for cell, check in zip(report.cells[2:], checks[2:], strict=True)
    ]
    with pytest.raises(InputError, match=r"feature cache 2: .* exported with --feature-cache"):
        run_bench(exported_bundle, request)
    with pytest.raises(InputError, match="feature cache: 0 is too small"):
        BenchRequest(feature_cache=0)
