"""A bundle against the answers it carries, and the task's own figures on given data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import numpy as np
import onnx_ir
import pytest
from typer.testing import CliRunner

from mi2rage_engines import open_engine
from mi2rage_engines.backend import Findings
from mi2rage_engines.bundle import MANIFEST_NAME, open_manifest, record_files
from mi2rage_engines.errors import (
    BundleError,
    DataError,
    EngineError,
    InputError,
    OutsideProfileError,
    ParityError,
)
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.given_data import first_equal_images, read_data
from mi2rage_export.reference import read_answers, write_answers
from mi2rage_export.request import ExportRequest
from mi2rage_export.verify import check_bundle, check_in_process
from mi2rage_rt import images
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.classifier_batches import distinct_images
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import write_samples
from tests.models.tiny_captioner import random_images
from tests.models.tiny_classifier import random_samples
from tests.runtime.tiny_bundle import build_bundle


@pytest.fixture(scope="module")
def data(classifier, tmp_path_factory):
    """24 labelled samples, most of them with an image."""
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for row, (sample, image) in enumerate(zip(random_samples(24), random_images(24, seed=3), strict=True)):
        name = f"{row}.png"
        (folder / name).write_bytes(encode_image(image))
        label = classifier.labels[row % len(classifier.labels)]
        samples.append(dataclasses.replace(sample, id=str(row), label=label, image=name if row % 4 else None))
    write_samples(folder / "rows.jsonl", samples)
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def measured(tiny_classifier, data, tmp_path_factory):
    """The tiny classifier in int8 by calibration, measured on the data."""
    folder = tmp_path_factory.mktemp("measured") / "bundle"
    request = ExportRequest(classifier=tiny_classifier, precisions={"": "int8-qdq"}, calibration=data, verify=data)
    export_bundle(folder, request)
    return folder


def _command(*arguments):
    import typer

    from mi2rage_export import commands

    app = typer.Typer()
    app.command()(commands.verify)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _changed(folder, name, change):
    """Change answers, and let the manifest agree: a fault that hashes cannot show."""
    write_answers(folder, name, {key: change(array) for key, array in read_answers(folder, name).items()})
    _let_the_manifest_agree(folder)


def _let_the_manifest_agree(folder):
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    document["files"] = {file: record.model_dump() for file, record in record_files(folder).items()}
    (folder / MANIFEST_NAME).write_text(json.dumps(document), encoding="utf-8")


def test_a_whole_bundle_holds_and_one_that_answers_otherwise_does_not(exported_bundle, tmp_path):
    run = _command(exported_bundle, "--component", "classifier", "--json")
    assert run.exit_code == 0, run.output
    parity = json.loads(run.output)["parity"]
    assert {record["subject"] for record in parity} == {"classifier/image", "classifier/classifier", "classifier"}
    folder = shutil.copytree(exported_bundle, tmp_path / "bundle")
    _changed(folder, "classifier", lambda logits: logits + np.float32(0.1))
    run = _command(folder, "--component", "classifier")
    assert isinstance(run.exception, ParityError)
    assert "FAILED" in run.output


def test_the_check_is_a_process_of_its_own_without_torch(exported_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # of no use to this process any more
    assert check_in_process(exported_bundle, components=("classifier",))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Exception, match="the process that checks it ended"):
        check_in_process(exported_bundle)


def test_errors_of_that_process_are_passed_on(tmp_path):
    with pytest.raises(InputError, match="no such folder; expected a bundle"):
        check_in_process(tmp_path / "missing")
    with pytest.raises(
        InputError, match="has no component captoner; expected some of generator, captioner, classifier"
    ):
        check_in_process(build_bundle(tmp_path / "whole"), components=("captoner",))
    with pytest.raises(InputError, match="holds no reference cases"):
        check_in_process(build_bundle(tmp_path / "hand-made"))


def test_the_task_is_measured_before_and_after(measured, data):
    manifest = open_manifest(measured)
    found = {record.measure: record for record in manifest.parity if record.subject == "data/classifier"}
    assert {"decision_agreement", "f1_before", "f1_after", "f1_change"} == set(found)
    assert found["f1_change"].value == pytest.approx(abs(found["f1_after"].value - found["f1_before"].value))
    assert found["f1_change"].cases == 24
    again = check_bundle(measured, data=read_data(data)).records
    assert {record.measure: record.value for record in again if record.subject == "data/classifier"} == {
        name: pytest.approx(record.value) for name, record in found.items()
    }


def test_int8_by_calibration_names_what_it_is(measured, exported_bundle):
    graph = open_manifest(measured).graphs["classifier/classifier"]
    assert graph.precision == "int8-qdq"
    whole = (exported_bundle / "classifier" / "classifier.onnx").stat().st_size
    assert (measured / graph.file).stat().st_size < 0.8 * whole


def test_int8_by_calibration_is_held_to_a_bound(measured, tmp_path):
    assert all(record.passed for record in check_bundle(measured).records)
    folder = shutil.copytree(measured, tmp_path / "bundle")
    model = onnx_ir.load(folder / "classifier" / "classifier.onnx")
    for value in model.graph.initializers.values():
        if value.dtype == onnx_ir.DataType.INT8 and len(value.shape) == 2:
            value.const_value = onnx_ir.tensor(np.zeros(value.const_value.shape, np.int8), name=value.name)
    onnx_ir.save(model, folder / "classifier" / "classifier.onnx")
    _let_the_manifest_agree(folder)
    failed = {(record.subject, record.measure) for record in check_bundle(folder).records if not record.passed}
    assert ("classifier/classifier", "cosine") in failed


def test_other_data_than_that_of_the_export_are_refused(measured, exported_bundle, data, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    with pytest.raises(DataError, match=r"is not the file that .* was exported with \(rows.jsonl"):
        check_bundle(measured, data=read_data(other, images=data.parent))
    with pytest.raises(DataError, match="was exported without data"):
        check_bundle(exported_bundle, components=("classifier",), data=read_data(data))


def test_answers_that_are_gone_or_damaged(measured, tmp_path):
    for name, damage in (("gone", lambda path: path.unlink()), ("damaged", lambda path: path.write_bytes(b"no zip"))):
        folder = shutil.copytree(measured, tmp_path / name)
        damage(folder / "parity" / "classifier.npz")
        with pytest.raises(BundleError, match=r"classifier\.npz"):
            check_bundle(folder)


def test_what_ran_is_said_and_what_cannot_run_is_refused(exported_bundle):
    run = _command(exported_bundle, "--component", "classifier", "--backend", "ort-cpu")
    assert run.exit_code == 0 and "figures hold, on CPUExecutionProvider" in run.output
    checks = check_bundle(exported_bundle, components=("classifier",))
    assert set(checks.ran_on) == {"classifier/image", "classifier/classifier"} and checks.left_out == {}
    for arguments, said in (
        (("--backend", "tensorrt"), "backend tensorrt: "),
        (("--backend", "ort-cpu", "--provider", "CPUExecutionProvider"), "came with the providers"),
        (("--provider", "Foo"), "provider Foo: is not in this onnxruntime"),
    ):
        error = _command(exported_bundle, *arguments).exception
        assert isinstance(error, InputError) and said in str(error)


def test_a_provider_that_falls_back_is_no_check(exported_bundle, monkeypatch):
    monkeypatch.setattr(
        open_engine, "look_around", lambda: Findings(("CUDAExecutionProvider", "CPUExecutionProvider"), None, ())
    )
    monkeypatch.setattr(open_engine, "OrtEngine", lambda path, providers, **options: OrtEngine(path, **options))
    with pytest.raises(EngineError, match=r"provider CUDAExecutionProvider: .*could not start"):
        check_bundle(exported_bundle, components=("classifier",), providers=("CUDAExecutionProvider",))


def test_warnings_of_the_checking_process_are_passed_on(exported_bundle, tmp_path, monkeypatch, caplog):
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\necho "CUDA could not start" >&2\necho \'{"records": [], "ran_on": {}, "left_out": {}}\'\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    check_in_process(exported_bundle)
    assert "CUDA could not start" in caplog.messages


def test_cases_outside_of_a_plan_are_left_out_and_counted(exported_bundle, monkeypatch):
    run = OrtEngine.run

    def run_small(engine, inputs):
        if engine.name.endswith("image.onnx") and len(inputs["pixel_values"]) > 1:
            raise OutsideProfileError("image.plan: batch is 2; expected 1")
        return run(engine, inputs)

    monkeypatch.setattr(OrtEngine, "run", run_small)
    checks = check_bundle(exported_bundle, components=("classifier",), backend="ort-cpu")
    assert "cases are outside of the plan's profiles" in checks.left_out["classifier/image"]
    counted = {record.subject: record.cases for record in checks.records}
    assert counted.get("classifier/image", 0) < counted["classifier/classifier"]


def test_images_are_read_when_needed_and_give_the_same(data, measured, monkeypatch):
    read = []
    monkeypatch.setattr(images, "load_image", lambda file, load=images.load_image: read.append(file) or load(file))
    given = read_data(data)
    assert read == []
    whole = list(given.images)
    assert first_equal_images(given.images) == distinct_images(whole)
    shown = [*whole, whole[1].copy(), None]
    assert first_equal_images(shown) == distinct_images(shown)
    runtime = Bundle.open(measured, "ort-cpu", threads=1).classifier()
    lazily = runtime.logits(given.samples, given.images, first_equal_images(given.images))
    np.testing.assert_array_equal(lazily, runtime.logits(given.samples, whole))


def test_an_image_that_cannot_be_decoded_is_named_with_its_sample(data, tmp_path):
    folder = shutil.copytree(data.parent, tmp_path / "data")
    (folder / "5.png").write_bytes(b"no image")
    given = read_data(folder / "rows.jsonl")
    with pytest.raises(DataError, match=r"sample 5: .*5\.png"):
        first_equal_images(given.images)


def test_a_limit_that_is_too_low_is_said(measured, data):
    with pytest.raises(DataError, match="came with its first 5 rows; expected 24 of them"):
        check_bundle(measured, data=read_data(data, limit=5))
