"""Ways to break an export, its check and its page: each ends with one line that helps, exit code 2 and no debris.

What breaks in the middle of the work stands in `test_interrupted`, what breaks a build in `tests/runtime/test_build`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from mi2rage_engines.bundle import record_files
from mi2rage_engines.errors import EngineError, InputError, Mi2rageError
from mi2rage_export import bundle_writer, destination, to_onnx
from mi2rage_export.given_data import check_labels
from mi2rage_export.memory import naming_lack_of_memory
from mi2rage_export.request import ExportRequest
from mi2rage_export.verify import check_in_process
from mi2rage_rt import cli
from mi2rage_rt.samples import write_samples
from tests.models.tiny_classifier import LABELS, random_samples
from tests.models.tiny_generator import build_generator
from tests.runtime.tiny_bundle import build_bundle

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current folder, with a folder of its own for temporary files beside it; both must stay as they were."""
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "here"


@pytest.fixture
def models(tiny_generator, tiny_captioner, tiny_classifier):
    return {"generator": tiny_generator, "captioner": tiny_captioner, "classifier": tiny_classifier}


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("whole") / "bundle", parts=("classifier",))


def _listing(place: Path) -> dict[Path, tuple[int, int] | None]:
    """Every path there; of files the size and when they were written."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in place.parent.rglob("*")
        if not {".ses", "torchinductor_root"} & set(path.parts)  # PyTorch keeps these
    }


def _refused(capfd, place: Path, words: tuple[str, ...], *args: object) -> None:
    before = _listing(place)
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    said = capfd.readouterr()
    assert end.value.code == 2 and said.out == "" and "Traceback" not in said.err, said.err
    line = said.err.splitlines()[-1]
    assert line.startswith("error: ") and ";" in line, said.err  # behind it stands what to do
    assert all(word in line for word in words), line
    assert _listing(place) == before


def _edited(file: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text(encoding="utf-8"))
        for name, value in fields.items():
            document[name] = document[name] | value if isinstance(value, dict) else value
        (folder / file).write_text(json.dumps(document), encoding="utf-8")

    return change


def _cut(file: str) -> Change:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def _with(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def _without(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _with_part_of_another(part: str, **options: Any) -> Change:
    def change(folder: Path) -> None:
        other = build_generator(folder.parent / "other", **options)
        shutil.rmtree(folder / part)
        (other / part).rename(folder / part)

    return change


def _with_larger_ids(file: str) -> Change:
    """As if the tokenizer were a larger model's."""

    def change(folder: Path) -> None:
        document = json.loads(tokenizers.Tokenizer.from_file(str(folder / file)).to_str())
        vocabulary = document["model"]["vocab"]
        document["model"]["vocab"] = {word: index + 9000 * (index > 20) for word, index in vocabulary.items()}
        (folder / file).write_text(json.dumps(document), encoding="utf-8")

    return change


FOLDERS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "empty folder": ("generator", _emptied, ("no file named model_index.json", "check the folder")),
    "unsupported class": (
        "captioner",
        _edited("config.json", architectures=["BertModel"]),
        ("its class is BertModel", "BlipForConditionalGeneration", "give another captioner"),
    ),
    "weights truncated": ("classifier", _cut("model.safetensors"), ("incomplete metadata", "'mi2rage-rt train'")),
    "weights gone": ("captioner", _without("model.safetensors"), ("no file named model.safetensors",)),
    "a part's weights truncated": (
        "generator",
        _cut("unet/diffusion_pytorch_model.safetensors"),
        ("Unable to load weights", "unet"),
    ),
    "configuration no JSON": ("captioner", _with("config.json", b"{not json"), ("not a valid JSON file",)),
    "configuration no object": ("captioner", _with("config.json", b"[]"), ("cannot be loaded", "check the folder")),
    "configuration no text": (
        "classifier",
        _with("classifier.json", b"\xff\xfe"),
        ("can't decode", "check the folder"),
    ),
    "unknown encoder": (
        "classifier",
        _edited("classifier.json", text_encoder={"model_type": "nonsense"}),
        ("cannot be loaded", "nonsense"),
    ),
    "tokenizer missing": ("captioner", _without("tokenizer.json"), ("tokenizer.json: no such file", "save the")),
    "tokenizer damaged": ("classifier", _with("tokenizer.json", b"{"), ("tokenizer.json: no tokenizer",)),
    "another model's tokenizer": (
        "captioner",
        _with_larger_ids("tokenizer.json"),
        ("PyTorch cannot run it", "index out of range", "all from one place"),
    ),
    "another pipeline's tokenizer": (
        "generator",
        _with_larger_ids("tokenizer/tokenizer.json"),
        ("PyTorch cannot run it", "index out of range"),
    ),
    "another generator's text encoder": (
        "generator",
        _with_part_of_another("text_encoder", text_width=48),
        ("PyTorch cannot run it", "48", "all from one place"),
    ),
    "another generator's autoencoder": (
        "generator",
        _with_part_of_another("vae", vae="tiny"),
        ("cannot be loaded", "check the folder"),
    ),
    "image height that does not fit": ("generator", _edited("mi2rage.json", height=20), ("20 x 24", "multiples of 8")),
    "image height no number": ("generator", _edited("mi2rage.json", height="tall"), ("cannot be loaded", "TypeError")),
    "another preprocessor's height": (
        "classifier",
        _edited("classifier.json", preprocessing={"height": 30}),
        ("PyTorch cannot run it", "30*24"),
    ),
    "more ids than positions": ("classifier", _edited("classifier.json", max_length=400), ("PyTorch cannot run it",)),
    "preprocessor missing": ("captioner", _without("preprocessor_config.json"), ("preprocessor_config.json",)),
}


@pytest.mark.parametrize("way", FOLDERS)
def test_model_folders(models, place, capfd, monkeypatch, way):
    role, change, words = FOLDERS[way]
    folder = shutil.copytree(models[role], place / role)
    change(folder)
    monkeypatch.setattr(bundle_writer._Writer, "_export", None)
    _refused(capfd, place, words, "export", "--out", place / "new" / "bundle", f"--{role}", folder)


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no model": ((), ("no model was given", "--generator")),
    "wrong folder": (("--classifier", "CAPTIONER"), ("classifier.json is missing", "'mi2rage-rt train'")),
    "no folder": (("--captioner", "./none"), ("no such captioner folder", "check the path")),
    "opset": (("--classifier", "CLASSIFIER", "--opset", "26"), ("opset 26", "18 to 25")),
    "precision": (("--classifier", "CLASSIFIER", "--precision", "half"), ("'half'", "fp16", "int8-qdq")),
    "precision of no graph": (("--classifier", "CLASSIFIER", "--precision", "unet=fp16"), ("no such graph", "'unet'")),
    "precision twice": (("--classifier", "CLASSIFIER", *("--precision", "fp16") * 2), ("was given before",)),
    "scales from nothing": (("--classifier", "CLASSIFIER", "--precision", "int8-qdq"), ("give samples", "--calib")),
    "part without a graph": (("--classifier", "CLASSIFIER", "--keep-fp32", "head"), ("GRAPH=PART",)),
    "preprocessing of no captioner": (
        ("--classifier", "CLASSIFIER", "--preprocess-in-graph"),
        ("preprocess in graph: came with classifier alone", "give --captioner"),
    ),
    "sampler": (("--generator", "GENERATOR", "--scheduler", "heun"), ("'heun'", "euler-ancestral")),
    "random weights": (("--random-weights", "sd16"), ("'sd16'", "sd15")),
    "two for one role": (("--generator", "GENERATOR", "--random-weights", "sdxl"), ("a generator already",)),
    "calibration file missing": (("--classifier", "CLASSIFIER", "--calibration", "none"), ("none: cannot be read",)),
    "calibration without images": (
        ("--captioner", "CAPTIONER", "--precision", "int8-qdq", "--calibration", "plain.jsonl"),
        ("plain.jsonl: no sample has an image", "another --precision"),
    ),
    "classifier's calibration without images": (
        ("--classifier", "CLASSIFIER", "--precision", "int8-qdq", "--calibration", "plain.jsonl"),
        ("plain.jsonl: no sample has an image", "the classifier another --precision"),
    ),
    "calibration image missing": (
        ("--classifier", "CLASSIFIER", "--calibration", "pictured.jsonl"),
        ("sample s0", "'gone.png'", "--images"),
    ),
    "data empty": (("--classifier", "CLASSIFIER", "--verify", "empty.jsonl"), ("no samples in it",)),
    "data with unknown labels": (
        ("--classifier", "CLASSIFIER", "--verify", "strange.jsonl"),
        ("strange.jsonl, sample s0", "'/un/known'", LABELS[1]),
    ),
    "out is a file": (("--classifier", "CLASSIFIER", "--out", "empty.jsonl"), ("is a file",)),
    "out below a file": (("--classifier", "CLASSIFIER", "--out", "empty.jsonl/b"), ("empty.jsonl is no folder",)),
    "out exists": (("--classifier", "CLASSIFIER", "--out", "model"), ("is not empty", "--force")),
    "out is the model": (("--classifier", "model", "--out", "model", "--force"), ("is no bundle", "to replace")),
    "out is here": (("--classifier", "CLASSIFIER", "--out", ".", "--force"), ("is the current folder",)),
}


@pytest.fixture
def filled(models, place):
    """Files that the options name."""
    samples = random_samples(3)
    write_samples(place / "plain.jsonl", samples)
    write_samples(place / "pictured.jsonl", [dataclasses.replace(sample, image="gone.png") for sample in samples])
    write_samples(place / "strange.jsonl", [dataclasses.replace(sample, label="/un/known") for sample in samples])
    (place / "empty.jsonl").touch()
    shutil.copytree(models["classifier"], place / "model")
    return {name.upper(): str(folder) for name, folder in models.items()}


@pytest.mark.parametrize("way", OPTIONS)
def test_options(filled, place, capfd, monkeypatch, way):
    args, words = OPTIONS[way]
    monkeypatch.setattr(bundle_writer._Writer, "_export", None)
    out = () if "--out" in args else ("--out", "new/bundle")
    _refused(capfd, place, words, "export", *out, *(filled.get(arg, arg) for arg in args))


def test_a_hub_that_cannot_be_asked_or_knows_nothing(place, capfd, monkeypatch):
    import huggingface_hub

    call = ("export", "--out", "bundle", "--captioner", "nobody/nothing")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _refused(capfd, place, ("nobody/nothing", "cannot be asked", "offline mode", "give a folder"), *call)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: False)
    _refused(capfd, place, ("nobody/nothing", "has no such captioner with a config.json", "hf auth login"), *call)


def test_a_folder_without_permission(models, place, capfd, monkeypatch):
    # The tests may run as root, whom permissions do not hold.
    monkeypatch.setattr(destination.os, "access", lambda path, mode: not mode & os.W_OK)
    words = (f"{place} is no folder that can be written", "give another --out")
    _refused(capfd, place, words, "export", "--out", "bundle", "--classifier", models["classifier"])


def test_a_full_disk_is_named_and_new_parents_go(place):
    out = place / "a" / "b" / "bundle"
    with pytest.raises(OSError, match="No space left") as caught, destination.destination(out, force=False) as taken:
        taken.parent.mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(out) and list(place.iterdir()) == []


def test_termination_clears_up_and_ends_the_check(place, whole_bundle, monkeypatch):
    """A container is stopped by SIGTERM, of which the process that checks hears nothing."""
    (place / "slow").write_text("#!/bin/sh\necho $$ > slow.tmp\nmv slow.tmp pid\nexec sleep 60\n", encoding="utf-8")
    (place / "slow").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(place / "slow"))

    def terminate() -> None:
        while not (place / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    with (
        pytest.raises(KeyboardInterrupt),
        destination.destination(place / "new" / "bundle", force=False) as taken,
    ):
        taken.parent.mkdir()
        check_in_process(whole_bundle)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before and not (place / "new").exists()
    with contextlib.suppress(ChildProcessError):  # waited for already
        assert os.WIFSIGNALED(os.waitpid(int((place / "pid").read_text(encoding="utf-8")), 0)[1])


def test_a_link_is_followed(place):
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    with destination.destination(place / "link", force=False) as taken:
        assert taken == place / "real"


def test_rows_without_labels_are_said(place, caplog):
    samples = random_samples(4)
    write_samples(place / "rows.jsonl", [dataclasses.replace(samples[0], label=None), *samples[1:]])
    request = ExportRequest(classifier="x", verify=place / "rows.jsonl")
    with caplog.at_level(logging.WARNING, "mi2rage_export"):
        check_labels(request, LABELS)
    assert "1 of 4 samples have no label" in caplog.text


def test_pytorch_without_memory(classifier, monkeypatch):
    import torch

    from mi2rage_export.families.relation_classifier import FAMILY

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.onnx, "export", full)
    with (
        pytest.raises(Mi2rageError, match=r"bundle: out of memory; .*one component at a time"),
        naming_lack_of_memory("bundle"),
    ):
        to_onnx.trace(FAMILY.graphs(classifier)[0])
    with pytest.raises(RuntimeError, match="another"), naming_lack_of_memory("bundle"):
        raise RuntimeError("another fault")


def test_a_check_that_is_killed(place, whole_bundle, monkeypatch):
    (place / "killed").write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    (place / "killed").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(place / "killed"))
    before = _listing(place)
    with pytest.raises(EngineError, match=r"the process that checks it ended .*-9.*is there enough memory") as caught:
        check_in_process(whole_bundle)
    assert caught.value.exit_code == 1 and _listing(place) == before


def _with_cut_external_data(folder: Path) -> None:
    (folder / "classifier" / "model.onnx_data").write_bytes(b"weights")
    files = {name: record.model_dump() for name, record in record_files(folder).items()}
    _edited("bundle.json", files=files)(folder)
    _cut("classifier/model.onnx_data")(folder)


BUNDLES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no bundle": (_emptied, ("has no readable bundle.json", "'mi2rage-rt export'")),
    "no folder": (shutil.rmtree, ("no such folder",)),
    "manifest no JSON": (_with("bundle.json", b"{"), ("not valid JSON", "copy the bundle again")),
    "manifest edited by hand": (_edited("bundle.json", labels=["x"]), ("labels", "damaged")),
    "a newer schema": (_edited("bundle.json", schema_version=3), ("schema version 3", "export it again")),
    "a file changed": (
        lambda folder: (folder / "classifier" / "tokenizer.json").write_bytes(
            (folder / "classifier" / "tokenizer.json").read_bytes().replace(b"rome", b"Rome")
        ),
        ("classifier/tokenizer.json was changed", "SHA-256"),
    ),
    "a graph truncated": (_cut("classifier/model.onnx"), ("classifier/model.onnx has", "copy the bundle again")),
    "external data truncated": (_with_cut_external_data, ("model.onnx_data has 3 bytes, expected 7",)),
    "a link to nowhere": (
        lambda folder: (_without("classifier/model.onnx")(folder), (folder / "classifier/model.onnx").symlink_to("x")),
        ("classifier/model.onnx is missing", "copy the bundle whole"),
    ),
}


@pytest.mark.parametrize("way", BUNDLES)
def test_bundles(whole_bundle, place, capfd, way):
    change, words = BUNDLES[way]
    folder = shutil.copytree(whole_bundle, place / "ein B\u00fcndel")
    change(folder)
    _refused(capfd, place, (str(folder), *words), "inspect", folder)


def test_a_bundle_that_cannot_be_verified(whole_bundle, place, capfd):
    with pytest.raises(InputError, match="has no component captoner"):
        check_in_process(whole_bundle, components=("captoner",))
    _refused(capfd, place, ("holds no reference cases", "export it again"), "verify", whole_bundle)
