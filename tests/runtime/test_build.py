from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import onnx
import pytest

from mi2rage_engines import plan_cache
from mi2rage_engines.bundle import open_manifest
from mi2rage_engines.errors import BundleError, EngineError, InputError
from mi2rage_engines.plan import Present, check_plan, read_record
from mi2rage_engines.trt_api import Device
from mi2rage_rt import build as build_module
from mi2rage_rt import cli
from mi2rage_rt.build import BuildSettings, build_bundle, plan_path
from tests.engines.trt_graphs import fake_api

pytest.importorskip("tensorrt_rtx")

RTX = {"backend": "tensorrt-rtx", "targets": ("sm89",)}


@pytest.fixture
def bundle(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MI2RAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def settings(**fields: Any) -> BuildSettings:
    return BuildSettings(**{**RTX, **fields})


def replace(bundle: Path, file: str, content: bytes) -> None:
    """As a new export would: another file, and a manifest that knows of it."""
    (bundle / file).write_bytes(content)
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "bundle.json").write_text(json.dumps(document))


def change_weights(bundle: Path, file: str) -> None:
    model = onnx.load(bundle / file)
    model.producer_name = "changed"
    replace(bundle, file, model.SerializeToString())


def test_every_graph_for_every_target(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    results = build_bundle(bundle, settings(targets=("sm80", "sm89+sm120", "SM80")))
    names = list(open_manifest(bundle).graphs)
    assert [(r.target, r.record.graph) for r in results] == [(t, n) for t in ("sm80", "sm89+sm120") for n in names]
    assert {r.how for r in results} == {"built"}
    for result in results:
        assert result.path == plan_path(bundle, result.target, result.record.graph)
        record = read_record(result.path)
        assert record == result.record and record.request.capabilities == tuple(result.target.split("+"))
        check_plan(result.path, record, Present("tensorrt-rtx", record.request.version, result.target[:4]))
        assert "INFO" in result.path.with_suffix(".log").read_text()
    assert tree(bundle / "plans" / "sm80") == {
        f"{name.replace('/', '-')}.{suffix}" for name in names for suffix in ("plan", "json", "log")
    }
    assert {path: path.read_bytes() for path in before} == before
    assert build_bundle(bundle, settings(targets=("sm80",)))[0].how == "kept"


def test_the_cache_saves_the_build(bundle: Path, bundle_folder: Path, tmp_path: Path, cache: Path) -> None:
    (first,) = build_bundle(bundle, settings(graphs=("unet",)))
    other = Path(shutil.copytree(bundle_folder, tmp_path / "other"))
    (second,) = build_bundle(other, settings(graphs=("generator/unet",)))
    assert (first.how, second.how) == ("built", "cached")
    assert first.path.read_bytes() == second.path.read_bytes() and first.record == second.record
    (entry,) = (cache / "entries").iterdir()
    (entry / "plan").write_bytes(b"corrupted")
    shutil.rmtree(other / "plans")
    (third,) = build_bundle(other, settings(graphs=("unet",)))
    assert third.how == "built" and third.path.stat().st_size == third.record.plan_bytes > 9


def test_profiles_apply_to_the_graphs_that_have_the_axes(bundle: Path) -> None:
    profiles = ("batch=1,height=2,width=2", "batch=2:3:4,height=2:4:8,width=2")
    text, unet = build_bundle(bundle, settings(graphs=("text_encoder", "unet"), profiles=profiles))
    assert [sorted(axes) for axes in unet.record.request.profiles] == [["batch", "height", "sequence", "width"]] * 2
    assert [axes["batch"].max for axes in text.record.request.profiles] == [1, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": ("sm90",)}, ["sm90", "sm89", "Hopper"]),
        ({"targets": ("sm99",)}, ["target sm99", "expected sm75", "name one of them"]),
        ({"targets": ("sm89+",)}, ["target ''", "joined by +"]),
        ({"targets": ("sm89", "this")}, ["no GPU here"]),
        ({"graphs": ("unet", "vae")}, ["no graph vae", "generator/vae_decoder"]),
        ({"profiles": ("hight=4",)}, ["no graph has an axis hight", "height"]),
        ({"profiles": ("batch=4:2:1",)}, ["min <= opt <= max"]),
        ({"profiles": ("batch=0:1:1",)}, ["axis batch 0 to 1"]),
        ({"profiles": ("batch=1:4:3000000000",)}, ["cannot read", "at most 2147483647"]),
        ({"profiles": ("batch=" + "9" * 5000,)}, ["cannot read", "at most 2147483647"]),
        ({"backend": "trt"}, ["backend trt", "tensorrt-rtx"]),
    ],
)
def test_what_is_refused_before_anything_is_built(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr(build_module, "find_device", lambda: None)
    monkeypatch.setattr(build_module, "build_plan", None)
    before = tree(bundle)
    with pytest.raises(InputError) as caught:
        build_bundle(bundle, settings(**fields))
    assert all(word in str(caught.value) for word in words), caught.value
    assert tree(bundle) == before


def test_graphs_for_cpus_are_refused(bundle: Path) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    document["classifier"]["graphs"]["classifier"]["precision"] = "int8-dynamic"
    (bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="classifier/classifier: its precision is int8-dynamic"):
        build_bundle(bundle, settings())
    assert build_bundle(bundle, settings(graphs=("vision",)))[0].how == "built"


def test_plans_that_stand_are_replaced_only_by_force(bundle: Path, cache: Path) -> None:
    (first,) = build_bundle(bundle, settings(graphs=("unet",)))
    with pytest.raises(BundleError, match=r"asked for now, tf32 is True, not False; .*--force"):
        build_bundle(bundle, settings(graphs=("unet",), tf32=True))
    change_weights(bundle, "generator/unet/model.onnx")
    with pytest.raises(BundleError, match=r"generator/unet is another one now .*mi2rage-rt build .*--force"):
        build_bundle(bundle, settings(graphs=("unet",)))
    assert read_record(first.path) == first.record
    (again,) = build_bundle(bundle, settings(graphs=("unet",), force=True))
    assert again.how == "built" and again.record.request.graph_sha256 != first.record.request.graph_sha256
    again.path.write_bytes(b"cut")
    with pytest.raises(BundleError, match="its size is 3 bytes"):
        build_bundle(bundle, settings(graphs=("unet",)))
    assert build_bundle(bundle, settings(graphs=("unet",), force=True))[0].how == "cached"


def test_a_graph_that_is_refused_leaves_those_before_it_whole(bundle: Path) -> None:
    before = tree(bundle)
    replace(bundle, "classifier/model.onnx", b"no graph")
    with pytest.raises(EngineError, match=r"classifier/classifier: .*cannot parse") as caught:
        build_bundle(bundle, settings(graphs=("vision", "classifier")))
    assert caught.value.exit_code == 1
    names = {f"plans/sm89/captioner-vision.{suffix}" for suffix in ("plan", "json", "log")}
    assert tree(bundle) - before == names | {"plans", "plans/sm89"}


def interrupt(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_middle_of_a_build_leaves_no_debris(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(bundle)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module.Steps, "advance", interrupt)
        build_bundle(bundle, settings(graphs=("unet",)))
    assert tree(bundle) == before
    assert not (cache / "entries").exists()
    assert build_bundle(bundle, settings(graphs=("unet",)))[0].how == "built"


@pytest.mark.parametrize("file", [".plan", ".log", ".json"])
def test_a_full_disk_leaves_no_debris(bundle: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    before = tree(bundle)
    usual = build_module.write_content

    def full(content: Any, path: Path) -> None:
        usual(content, path)
        if path.suffix == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(build_module, "write_content", full)
        build_bundle(bundle, settings(graphs=("unet",)))
    assert tree(bundle) == before
    assert build_bundle(bundle, settings(graphs=("unet",)))[0].how == "cached"


def test_an_interruption_while_renaming_leaves_no_debris(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(bundle)
    usual = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        return usual(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stop)
        build_bundle(bundle, settings(graphs=("unet",)))
    assert tree(bundle) == before


def test_a_bundle_that_cannot_be_written_is_refused_early(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    monkeypatch.setattr(build_module, "build_plan", None)
    with pytest.raises(InputError, match="cannot be written"):
        build_bundle(bundle, settings())


@pytest.mark.parametrize(
    "block",
    [
        lambda bundle: (bundle / "plans").touch(),
        lambda bundle: (bundle / "plans").symlink_to("nowhere"),
        lambda bundle: (bundle / "plans" / "sm89" / "generator-unet.plan").mkdir(parents=True),
    ],
)
def test_what_stands_in_the_way_of_a_plan_is_refused_early(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, block: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(build_module, "build_plan", None)
    block(bundle)
    before = tree(bundle)
    words = r"sm89/generator-unet\.plan: cannot be written; expected a folder that takes"
    with pytest.raises(InputError, match=words) as caught:
        build_bundle(bundle, settings(graphs=("unet",), force=True))
    assert caught.value.exit_code == 2 and tree(bundle) == before


def test_a_bundle_behind_a_link_and_a_graph_behind_another(bundle: Path, tmp_path: Path) -> None:
    graph = bundle / "generator" / "unet" / "model.onnx"
    graph.rename(tmp_path / "elsewhere.onnx")
    graph.symlink_to(tmp_path / "elsewhere.onnx")
    (tmp_path / "link").symlink_to(bundle)
    (result,) = build_bundle(tmp_path / "link", settings(graphs=("unet",)))
    assert result.how == "built" and (bundle / "plans" / "sm89" / "generator-unet.plan").is_file()


@pytest.mark.parametrize("index", ["{}", "[]", "{"])
def test_a_cache_whose_index_was_changed(bundle: Path, cache: Path, index: str) -> None:
    build_bundle(bundle, settings(graphs=("unet",)))
    (entry,) = (cache / "entries").iterdir()
    for path in entry.iterdir():
        path.unlink()
    (entry / "files.json").write_text(index)
    shutil.rmtree(bundle / "plans")
    assert build_bundle(bundle, settings(graphs=("unet",)))[0].how == "built"


def test_a_cache_that_cannot_even_be_searched(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.stat

    def closed(path: Path, **options: Any) -> os.stat_result:
        if path.is_relative_to(cache / "entries"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    assert build_bundle(bundle, settings(graphs=("unet",)))[0].how == "built"


def test_two_builders_at_once_end_with_one_build(bundle: Path, cache: Path) -> None:
    code = (
        "import sys; from mi2rage_rt.build import BuildSettings, build_bundle; "
        "print(build_bundle(sys.argv[1], BuildSettings(('sm89',), 'tensorrt-rtx', ('unet',), force=True))[0].how)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = sorted(run.communicate(timeout=60)[0].strip() for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert tree(bundle / "plans") == {"sm89", *(f"sm89/generator-unet.{suffix}" for suffix in ("plan", "json", "log"))}
    assert answers in (["built", "cached"], ["built", "kept"])
    result = build_bundle(bundle, settings(graphs=("unet",)))[0]
    assert result.how == "kept" and len(list((cache / "entries").iterdir())) == 1


def test_standard_tensorrt_builds_for_the_gpu_that_is_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = fake_api("10.16.1", built="Float", in_graph="FLOAT")
    monkeypatch.setattr(build_module, "open_api", lambda backend: api)
    monkeypatch.setattr(build_module, "find_device", lambda: Device("NVIDIA H100", "sm90"))
    document = json.loads((bundle / "bundle.json").read_text())
    graph = document["classifier"]["graphs"]["classifier"]
    graph["inputs"] = [{"name": "x", "dtype": "float32", "shape": ["batch", 16]}]
    (bundle / "bundle.json").write_text(json.dumps(document))
    (result,) = build_bundle(bundle, BuildSettings(graphs=("classifier",)))
    assert result.path == bundle / "plans" / "sm90" / "classifier-classifier.plan"
    assert result.record.request.device == "NVIDIA H100" and result.record.attestation.source == "inspector"


# The command


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    points = {**cli.command_points(), "build": EntryPoint("build", "mi2rage_rt.build_commands:build", cli.GROUP)}
    monkeypatch.setattr(cli, "command_points", lambda: points)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_the_command(call: Any, bundle: Path, tmp_path: Path) -> None:
    args = ("build", bundle, "--target", "sm89", "--graph", "unet", "--profile", "batch=1:2:4", "--workspace", "1GB")
    code, out, err = call(*args, "--backend", "tensorrt-rtx", "--cache", tmp_path / "c", "--json")
    assert code == 0 and err == ""
    (plan,) = json.loads(out)["plans"]
    assert plan["how"] == "built" and plan["record"]["request"]["workspace_bytes"] == 10**9
    assert Path(plan["path"]).is_file() and (tmp_path / "c" / "entries").is_dir()
    code, out, _ = call(*args, "--backend", "tensorrt-rtx", "--cache", tmp_path / "c")
    assert code == 0 and "generator/unet" in out and "kept" in out and "100% fp32 (build log)" in out


def test_the_command_refuses_plans_that_do_not_belong(call: Any, tmp_path: Path, bundle: Path) -> None:
    folder = bundle.rename(tmp_path / "ein B\u00fcndel")
    args = ("build", folder, "--backend", "tensorrt-rtx", "--target", "sm89", "--graph", "unet")
    assert call(*args)[0] == 0
    record = plan_path(folder, "sm89", "generator/unet").with_suffix(".json")
    whole = json.loads(record.read_text())
    for change, words in (
        ({"version": "1.0.0"}, "expected 1.0.0, the one that built it"),
        ({"capabilities": ["sm80"]}, "expected sm80, what it was built for"),
        ({"graph_sha256": "a" * 64}, "the graph generator/unet is another one now"),
        ({"precision": "fp99"}, "the record is damaged"),
    ):
        record.write_text(json.dumps({**whole, "request": {**whole["request"], **change}}))
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        code, out, err = call(*args)
        assert code == 2 and out == "" and words in err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        assert f"build it again: mi2rage-rt build '{folder}'" in err and "--force" in err
    assert call(*args, "--force")[0] == 0 and call(*args)[0] == 0


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "target of another backend": (("--target", "sm90"), "Hopper"),
    "unknown target": (("--target", "sm99"), "expected sm75"),
    "no GPU": (("--target", "this"), "no GPU here"),
    "cache limit no size": (("--cache-limit", "much"), "expected 1B to 1000000TB, e.g. 20GB"),
    "cache limit without end": (("--cache-limit", "9" * 400 + "GB"), "expected 1B to 1000000TB, e.g. 20GB"),
    "workspace too large": (("--workspace", "99999999TB"), "expected 1B to 1000000TB, e.g. 20GB"),
    "optimization level": (("--target", "sm89", "--optimization-level", "6"), "--optimization-level"),
    "unknown graph": (("--target", "sm89", "--graph", "vae"), "no graph vae"),
    "unknown axis": (("--target", "sm89", "--profile", "hight=4"), "no graph has an axis hight"),
    "impossible profile": (("--target", "sm89", "--profile", "batch=4:2:1"), "min <= opt <= max"),
    "profile of no multiple": (("--target", "sm89", "--profile", "height=3:5:7"), "expected multiples of 2"),
    "profile beyond TensorRT": (("--target", "sm89", "--profile", "batch=1:4:3000000000"), "at most 2147483647"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_the_command_refuses(call: Any, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    args, words = REFUSED[way]
    monkeypatch.setattr(build_module, "find_device", lambda: None)
    before = tree(bundle)
    code, out, err = call("build", bundle, "--backend", "tensorrt-rtx", *args)
    assert code == 2 and out == "" and words in err and len(err) < 1000
    assert tree(bundle) == before and not cache.exists()


def test_the_command_names_a_missing_extra(call: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = tree(bundle)
    code, _, err = call("build", bundle, "--backend", "tensorrt")
    assert code == 2 and "pip install 'mi2rage-rt[tensorrt]'" in err and tree(bundle) == before


UNET = ("--backend", "tensorrt-rtx", "--target", "sm89", "--graph", "unet")


def test_the_command_when_the_builder_gives_up(call: Any, bundle: Path, cache: Path) -> None:
    before = tree(bundle)
    code, _, err = call("build", bundle, *UNET, "--workspace", "1B")
    assert code == 1 and "larger --workspace" in err
    assert tree(bundle) == before and not (cache / "entries").exists()


def test_the_command_goes_on_without_a_cache(call: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = call("build", bundle, *UNET, "--cache", tmp_path / "file")
    assert code == 0 and "built" in out and "the plan cache cannot be used" in err and "--cache" in err
    assert plan_path(bundle, "sm89", "generator/unet").is_file() and (tmp_path / "file").read_bytes() == b""


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


PHASES = {
    "loading the backend": (build_module, "open_api"),
    "waiting for another builder": (plan_cache, "_locked"),
    "building": (build_module, "build_plan"),
    "storing in the cache": (plan_cache, "write_content"),
    "writing the plan": (build_module, "write_content"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("old", [False, True])
def test_ctrl_c_in_each_phase(
    call: Any, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, phase: str, old: bool
) -> None:
    if old:
        assert call("build", bundle, *UNET)[0] == 0
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    entries = tree(cache / "entries")
    with monkeypatch.context() as patch:
        patch.setattr(*PHASES[phase], fail(KeyboardInterrupt()))
        code, out, err = call("build", bundle, *UNET, "--tf32", "--force")
    assert code == 130 and out == "" and err.splitlines()[-1].startswith("interrupted; ")
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert (bundle / "plans").exists() == old
    # A build that was finished is kept in the cache, whole: its folder, plan, record, log and index.
    assert len(tree(cache / "entries") - entries) == (5 if phase == "writing the plan" else 0)
    assert call("build", bundle, *UNET, "--tf32", "--force")[0] == 0


def test_the_command_on_a_full_disk(call: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(bundle)
    monkeypatch.setattr(build_module, "write_content", fail(OSError(errno.ENOSPC, "No space left on device", "x.plan")))
    code, out, err = call("build", bundle, *UNET)
    assert code == 1 and out == "" and "error: x.plan: No space left on device; nothing half-written" in err
    assert tree(bundle) == before
