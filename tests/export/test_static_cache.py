"""`export --static-cache`: a second decoder graph in the bundle, checked as the first one, and the same captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.errors import InputError
from mi2rage_export import bundle_writer, commands
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.calibration import inputs_of_graphs
from mi2rage_export.given_data import GivenData
from mi2rage_export.request import ExportRequest
from mi2rage_export.verify import check_bundle
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_training.pytorch_captioner import CaptionDecoding, TorchCaptioner
from tests.models.tiny_captioner import random_images
from tests.models.tiny_classifier import random_samples

PREFIXES = ["", "a photo of", "the dog", "", "a red"]


@pytest.fixture(scope="module")
def static_bundle(tiny_captioner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "bundle"
    export_bundle(folder, ExportRequest(captioner=tiny_captioner, static_cache=True))
    return folder


def measures(manifest: Manifest, subject: str) -> set[str]:
    return {record.measure for record in manifest.parity if record.subject == subject}


def test_the_bundle_holds_it_and_what_it_was_checked_for(static_bundle: Path) -> None:
    found = open_manifest(static_bundle)
    assert found.graphs.keys() == {"captioner/vision", "captioner/decoder", "captioner/decoder_static"}
    assert {"captioner/decoder_static.onnx", "parity/captioner-decoder_static.npz"} <= found.files.keys()
    graph = found.graphs["captioner/decoder_static"]
    assert [tensor.name for tensor in graph.inputs][:2] == ["input_ids", "position"]
    assert graph.axes["length"].min <= 8 and "past" not in graph.axes
    # As a graph, and with the captions that are written with it.
    assert measures(found, "captioner/decoder_static") == measures(found, "captioner/decoder") | measures(
        found, "captioner"
    )
    again = check_bundle(static_bundle, threads=1).records
    assert {record.subject for record in again} == {record.subject for record in found.parity}
    assert all(record.passed for record in again)


@pytest.mark.parametrize(("seeds", "beams"), [(None, 1), ([4, 5, 6, 7, 8], 1), (None, 3)], ids=["greedy", "drawn", "3"])
def test_captions_are_those_of_pytorch(
    static_bundle: Path, captioner: TorchCaptioner, seeds: Any, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioner, "decoding", CaptionDecoding(beams=beams))
    images = list(random_images(5, seed=7))
    expected = captioner.caption(images, PREFIXES, seeds)
    bundle = Bundle.open(static_bundle, threads=1)
    for static in (None, False, True):
        options = CaptionOptions(beams=beams, static_cache=static)
        runtime = bundle.captioner(options)
        assert ("decoder_static" in runtime._decoders) == bool(static)
        assert runtime.caption(images, PREFIXES, seeds) == expected
    with pytest.raises(InputError, match="no graph decoder_static is loaded"):
        bundle.captioner().caption(images, options=CaptionOptions(static_cache=True))


@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
def test_lower_precisions_hold_their_bounds(tiny_captioner: Path, tmp_path: Path, precision: Any) -> None:
    request = ExportRequest(captioner=tiny_captioner, static_cache=True, precisions={"": precision})
    found = export_bundle(tmp_path / "bundle", request)
    assert found.graphs["captioner/decoder_static"].precision == precision
    assert measures(found, "captioner/decoder_static") >= {"max_abs_scaled", "caption_agreement"}
    runtime = Bundle.open(tmp_path / "bundle", threads=1).captioner(CaptionOptions(static_cache=True))
    images = list(random_images(3, seed=7))
    assert runtime.caption(images) == runtime.caption(images)


def test_both_decoders_are_calibrated(static_bundle: Path) -> None:
    samples, images = random_samples(3), random_images(3, seed=1)
    data = GivenData(Path("rows.jsonl"), tuple(samples), tuple(images))
    calls = inputs_of_graphs(static_bundle, open_manifest(static_bundle), "captioner", data)
    assert len(calls["decoder"]) > 1 and len(calls["decoder_static"]) == len(calls["decoder"])
    assert [call["position"].tolist() for call in calls["decoder_static"][:3]] == [[0], [1], [2]]


def test_without_a_captioner_it_is_refused(tiny_classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="static cache: came with classifier alone; expected a captioner"):
        export_bundle(tmp_path / "bundle", ExportRequest(classifier=tiny_classifier, static_cache=True))
    assert list(tmp_path.iterdir()) == []


def test_the_option(static_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    manifest = open_manifest(static_bundle)

    def export(out: Path, request: ExportRequest, **_: Any) -> Manifest:
        requests.append(request)
        return manifest

    monkeypatch.setattr(bundle_writer, "export_bundle", export)
    app = typer.Typer()
    app.command()(commands.export)
    for more in ([], ["--static-cache"]):
        run = CliRunner().invoke(app, ["--out", str(tmp_path / "b"), "--captioner", "x", *more])
        assert run.exit_code == 0, run.output
    assert [request.static_cache for request in requests] == [False, True]
