"""Ctrl-C, SIGTERM, a full disk, lack of memory in each phase of an export: no debris, and what was there stays."""

from __future__ import annotations

import errno
import shutil
import signal
import tempfile

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_export import bundle_writer, in_precision, recording, sources
from mi2rage_export.bundle_writer import export_bundle
from mi2rage_export.request import ExportRequest
from mi2rage_rt import cli
from tests.runtime.tiny_bundle import build_bundle

PHASES = {
    "loading": (sources, "load_models"),
    "asking the whole model": (recording, "record_component"),
    "asking a graph": (recording, "record_graph"),
    "tracing": (in_precision, "export_in_precision"),
    "quantising": (in_precision, "quantized"),
    "checking": (bundle_writer, "check_in_process"),
}
CAUSES = {
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted; "),
    "termination": (lambda: signal.raise_signal(signal.SIGTERM), 130, "interrupted; "),
    "disk full": (lambda: _raise(OSError(errno.ENOSPC, "No space left on device")), 1, "error: OUT: No space left"),
    "out of memory": (lambda: _raise(MemoryError()), 1, "error: OUT: out of memory; expected room for"),
}


def _raise(error):
    raise error


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A bundle that is to be replaced."""
    return build_bundle(tmp_path_factory.mktemp("standing") / "bundle", parts=("classifier",))


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
def test_each_phase(tiny_classifier, standing, tmp_path, monkeypatch, capfd, phase, cause):
    happens, code, words = CAUSES[cause]
    _quick(monkeypatch, phase)
    monkeypatch.setattr(*PHASES[phase], lambda *_, **__: happens())
    folder = shutil.copytree(standing, tmp_path / "bundle")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    options = ("--classifier", str(tiny_classifier), "--precision", "int8-dynamic", "--force")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--out", str(folder), *options])
    said = capfd.readouterr()
    assert end.value.code == code and said.out == ""
    assert said.err.splitlines()[-1].startswith(words.replace("OUT", str(folder))), said.err
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    open_manifest(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "temporary"}
    assert list((tmp_path / "temporary").iterdir()) == []


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
