from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_engines.errors import BundleError
from tests.runtime.tiny_bundle import build_bundle


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("engines") / "bundle", parts=("classifier",))


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "bundle.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_whole_bundle_opens(bundle: Path) -> None:
    manifest = open_manifest(bundle)
    assert manifest.classifier is not None and manifest.generator is None
    assert set(manifest.files) == {"classifier/model.onnx", "classifier/tokenizer.json"}


def test_missing_things(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        open_manifest(bundle / "nowhere")
    (bundle / "classifier" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"classifier/model\.onnx is missing"):
        open_manifest(bundle)
    (bundle / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"no readable bundle\.json"):
        open_manifest(bundle)


def test_changed_files(bundle: Path) -> None:
    path = bundle / "classifier" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"classifier/model\.onnx was changed"):
        open_manifest(bundle)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"classifier/model\.onnx has \d+ bytes, expected \d+"):
        open_manifest(bundle)


def test_another_version_is_told_before_anything_else(bundle: Path) -> None:
    _edit(bundle, lambda document: document.update(schema_version=99, something_new=1))
    with pytest.raises(BundleError, match="schema version 99; this release reads 1 to 2"):
        open_manifest(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(extra=1), "extra"),
        (lambda document: document["classifier"].pop("labels"), r"classifier\.labels"),
        (lambda document: document["files"].pop("classifier/tokenizer.json"), r"tokenizer\.json of the classifier"),
    ],
)
def test_damaged_manifests(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_manifest(bundle)


def test_a_manifest_that_is_no_json(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        open_manifest(bundle)


def test_a_bundle_of_the_first_schema_still_opens(bundle: Path) -> None:
    def older(document: dict) -> None:
        document["schema_version"] = 1
        document["precision"] = "float32"
        del document["licences"]
        for component in ("generator", "captioner", "classifier"):
            for graph in (document[component] or {"graphs": {}})["graphs"].values():
                for key in ("precision", "kept_fp32", "axes"):
                    del graph[key]

    _edit(bundle, older)
    manifest = open_manifest(bundle)
    assert (manifest.schema_version, manifest.precision, manifest.licences) == (2, "fp32", {})
