"""The built distribution: what is in it, and that it works in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.runtime.tiny_bundle import build_bundle

ROOT = Path(__file__).parents[2]
PACKAGES = ["mi2rage_rt", *(f"{stage}/mi2rage_{stage}" for stage in ("engines", "training", "export", "benchmarks"))]
MAX_WHEEL_BYTES = 20_000_000
HEAVY = {"torch", "transformers", "diffusers", "onnx", "matplotlib"}

pytestmark = pytest.mark.wheel


def _run(*command: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from the sdist alone."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class Clean:
    """A virtual environment of its own, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin = folder / "environment/bin"
        self.work = folder / "work"
        self.work.mkdir()
        self._wheel = wheel
        _run(sys.executable, "-m", "venv", "--without-pip", folder / "environment", cwd=self.work)
        self.install()

    def install(self, extra: str = "") -> None:
        self.pip("install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt"), f"{self._wheel}{extra}")

    def pip(self, *arguments: str) -> str:
        ours = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        return _run(*ours, "--python", self.bin / "python", *arguments, cwd=self.work)

    def run(self, program: str, *arguments: str) -> str:
        return _run(self.bin / program, *arguments, cwd=self.work)

    def distributions(self) -> set[str]:
        listed = json.loads(self.pip("list", "--format", "json"))
        return {entry["name"].lower() for entry in listed}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Clean:
    return Clean(tmp_path_factory.mktemp("core"), wheel)


def test_wheel_holds_every_file_of_the_five_packages_and_nothing_else(names: set[str]) -> None:
    expected = {
        f"{Path(package).name}/{path.relative_to(ROOT / package).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if ".dist-info/" not in name}
    assert sorted(expected - found) == []
    assert sorted(found - expected) == []
    assert {f"{Path(package).name}/py.typed" for package in PACKAGES} <= found


def test_wheel_holds_the_embedded_models(names: set[str]) -> None:
    weights = {name for name in names if name.endswith(".safetensors")}
    assert weights, "mi2rage_training/models: no weights"
    assert all(name.startswith("mi2rage_training/models/") for name in weights)


def test_wheel_holds_licence_and_commands(wheel: Path, names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(entry_points).decode()
    assert "[console_scripts]\nmi2rage-rt = mi2rage_rt.cli:main" in text
    assert "[mi2rage_rt.commands]" in text


def test_wheel_is_for_every_platform_and_small(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_sdist_holds_what_the_checks_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "Makefile"):
        assert name in found
    assert "tests/packaging/test_wheel.py" in found
    assert not any(name.startswith((".venv", "demo/", "runs/", ".git/")) for name in found)


def test_core_alone_imports_and_helps_without_torch(core: Clean) -> None:
    assert not HEAVY & core.distributions()
    loaded = json.loads(core.run("python", "-c", "import json, mi2rage_rt, sys; print(json.dumps(list(sys.modules)))"))
    assert not HEAVY & set(loaded)
    text = core.run("mi2rage-rt", "--help")
    for command in ("demo", "synthesize", "train", "export", "predict", "doctor"):
        assert command in text
    assert "unavailable" not in text


def test_core_alone_says_what_is_missing(core: Clean) -> None:
    missing = json.loads(core.run("mi2rage-rt", "doctor", "--json"))["extras"]["cpu"]
    assert missing == {"missing": ["onnxruntime"], "install": "pip install 'mi2rage-rt[cpu]'"}


@pytest.fixture(scope="module")
def runtime(core: Clean) -> Clean:
    """The same environment with the extra `cpu` added; the tests of the core alone come before."""
    core.install("[cpu]")
    return core


def test_cpu_extra_brings_the_runtime_and_no_torch(runtime: Clean) -> None:
    assert not HEAVY & runtime.distributions()
    findings = json.loads(runtime.run("mi2rage-rt", "doctor", "--json"))
    assert "CPUExecutionProvider" in findings["onnxruntime_providers"]
    assert findings["extras"]["cpu"]["missing"] == []


def test_cpu_extra_runs_a_bundle(runtime: Clean, tmp_path: Path) -> None:
    bundle = str(build_bundle(tmp_path))
    runtime.run("mi2rage-rt", "generate", bundle, "a red car", "--out", "images")
    (image,) = (runtime.work / "images").glob("*.png")
    assert json.loads(runtime.run("mi2rage-rt", "caption", bundle, str(image), "--json"))["captions"]
    row = {"id": "a", "tokens": ["Tim", "leads", "Apple"], "head": [0, 1], "tail": [2, 3], "image": str(image)}
    (runtime.work / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    answer = json.loads(runtime.run("mi2rage-rt", "predict", bundle, "rows.jsonl", "--json"))
    assert [prediction["relation"] for prediction in answer["predictions"]] == ["/per/org/leads"]
