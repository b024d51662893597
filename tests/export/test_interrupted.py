"""Ctrl-C, a full disk, lack of memory in each phase of an export: nothing is left, and what was there stays whole."""

from __future__ import annotations

import errno
import shutil

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_export import bundle_writer, in_precision, recording, sources
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.request import ExportRequest

PHASES = {
    "loading": (sources, "load_models"),
    "asking the whole model": (recording, "record_component"),
    "asking a graph": (recording, "record_graph"),
    "tracing": (in_precision, "export_in_precision"),
    "quantising": (in_precision, "quantized"),
    "checking": (bundle_writer, "check_in_process"),
}
CAUSES = {
    "Ctrl-C": KeyboardInterrupt(),
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "out of memory": MemoryError(),
}


@pytest.fixture(scope="module")
def standing(exported_bundle, tmp_path_factory):
    """A bundle of the classifier alone that is to be replaced."""
    folder = tmp_path_factory.mktemp("standing") / "bundle"
    folder.mkdir()
    for name in ("classifier", "parity"):
        shutil.copytree(exported_bundle / name, folder / name)
    return folder


def _quick(monkeypatch, phase):
    """Let the phases before the one in question pass without doing their work."""
    order = list(PHASES)
    quick = {
        "asking the whole model": lambda references, *_: references,
        "asking a graph": lambda *_: None,
        "tracing": lambda graph, path, file, request: _spec_of(graph, path, file),
        "quantising": lambda path, spec, *_: spec,
    }
    for name in order[: order.index(phase)]:
        if name in quick:
            monkeypatch.setattr(*PHASES[name], quick[name])


def _spec_of(graph, path, file):
    from mi2rage_engines.spec import GraphSpec

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a graph")
    inputs = tuple(item.spec for item in graph.inputs)
    return GraphSpec(file=file, inputs=inputs, outputs=graph.outputs, opset=20)


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("phase", PHASES)
def test_each_phase(tiny_classifier, standing, tmp_path, monkeypatch, phase, cause):
    def fails(*_: object, **__: object) -> None:
        raise CAUSES[cause]

    _quick(monkeypatch, phase)
    monkeypatch.setattr(*PHASES[phase], fails)
    folder = shutil.copytree(standing, tmp_path / "bundle")
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    request = ExportRequest(classifier=tiny_classifier, precisions={"": "int8-dynamic"})
    with pytest.raises(type(CAUSES[cause])):
        export_bundle(folder, request, force=True)
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_cannot_be_written(tiny_classifier, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        export_bundle(tmp_path / "file" / "bundle", ExportRequest(classifier=tiny_classifier))


def test_the_same_request_gives_the_same_hashes(tiny_classifier, tmp_path):
    request = ExportRequest(classifier=tiny_classifier, precisions={"": "fp16"})
    first, second = (export_bundle(tmp_path / name, request) for name in ("first", "second"))
    assert first.files == second.files
    assert (tmp_path / "first/bundle.json").read_bytes() == (tmp_path / "second/bundle.json").read_bytes()
    assert open_manifest(tmp_path / "first").graphs["classifier/classifier"].precision == "fp16"
