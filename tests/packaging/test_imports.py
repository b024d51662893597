"""The house rule: imports run from low to high, every import is declared, and the runtime loads no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = {  # low to high
    "mi2rage_engines": ROOT / "engines/mi2rage_engines",
    "mi2rage_rt": ROOT / "mi2rage_rt",
    "mi2rage_training": ROOT / "training/mi2rage_training",
    "mi2rage_export": ROOT / "export/mi2rage_export",
    "mi2rage_benchmarks": ROOT / "benchmarks/mi2rage_benchmarks",
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTS = {  # where it is not the distribution's own name
    "grpcio": "grpc",
    "mlcommons-loadgen": "mlperf_loadgen",
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


def _brought_by(*extras: str) -> set[str]:
    """The import names that these extras declare, without those of an extra inside."""
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return _import_names([line for line in lines if not line.startswith(PROJECT["name"])])


def _import_names(requirements: list[str]) -> set[str]:
    names = [Requirement(line).name for line in requirements]
    return {IMPORTS.get(name, name.replace("-", "_")) for name in names}


CORE = _import_names(PROJECT["dependencies"])
RUNTIME = CORE | _brought_by("cpu", "gpu", "tensorrt", "tensorrt-rtx", "serve", "scale")
TRAINING = RUNTIME | _brought_by("train")
EXPORT = TRAINING | _brought_by("export")
BENCHMARKS = EXPORT | _brought_by("bench")
ALLOWED = {
    "mi2rage_engines": RUNTIME,
    "mi2rage_rt": RUNTIME | {"triton_python_backend_utils"},  # which Triton itself brings
    "mi2rage_training": TRAINING,
    "mi2rage_export": EXPORT,
    "mi2rage_benchmarks": BENCHMARKS,
}
HEAVY = sorted(BENCHMARKS - CORE)
SERVICE = "mi2rage_rt/serve/"  # all of it is loaded inside the command `serve`


class Import(NamedTuple):
    name: str
    line: int
    at_load: bool
    """Whether loading the module loads this too."""


def imports_of(source: str) -> Iterator[Import]:
    yield from _imports_below(ast.parse(source), at_load=True)


def _imports_below(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(alias.name, child.lineno, at_load) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield Import(module, child.lineno, at_load)
            case ast.Call(
                func=ast.Name(id="require" | "import_module") | ast.Attribute(attr="require" | "import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(module, child.lineno, False)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports_below(child, at_load=at_load and not inside and not _is_type_checking(child))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _modules(package: str) -> list[Path]:
    modules = sorted(PACKAGES[package].rglob("*.py"))
    assert modules, f"{package}: no modules under {PACKAGES[package]}"
    return modules


def _offences(package: str, is_wrong: object) -> list[str]:
    assert callable(is_wrong)
    return [
        f"{path.relative_to(ROOT)}:{found.line}: imports {found.name}"
        for path in _modules(package)
        for found in imports_of(path.read_text(encoding="utf-8"))
        if is_wrong(found)
    ]


def test_the_reader_of_imports_sees_them_all() -> None:
    source = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\nif TYPE_CHECKING:\n    import h\n"
        "def i():\n    import j\n    require('k', 'extra')\ntry:\n    import l\nexcept ImportError:\n    pass\n"
    )
    found = [(item.name, item.at_load) for item in imports_of(source)]
    assert found == [
        *(("a.b", True), ("c", True), ("d.e", True), ("h", False)),
        *(("j", False), ("k", False), ("l", True)),
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_from_low_to_high(package: str) -> None:
    order = list(PACKAGES)
    higher = set(order[order.index(package) + 1 :])
    assert _offences(package, lambda found: found.name.split(".")[0] in higher) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_belongs_to_an_extra_of_its_stage(package: str) -> None:
    allowed = ALLOWED[package] | set(PACKAGES) | sys.stdlib_module_names
    assert _offences(package, lambda found: found.name.split(".")[0] not in allowed) == []


@pytest.mark.parametrize("package", ["mi2rage_engines", "mi2rage_rt"])
def test_the_runtime_loads_optional_libraries_inside_functions(package: str) -> None:
    own = CORE | set(PACKAGES) | sys.stdlib_module_names
    offences = _offences(package, lambda found: found.at_load and found.name.split(".")[0] not in own)
    assert [offence for offence in offences if not offence.startswith(SERVICE)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_service_is_loaded_by_its_command_alone(package: str) -> None:
    # Triton's models use them too; they need no more than the core.
    core_only = {f"mi2rage_rt.serve.{name}" for name in ("limits", "refusals", "rows", "tensors", "uploads")}
    offences = _offences(
        package,
        lambda found: found.at_load and found.name.startswith("mi2rage_rt.serve.") and found.name not in core_only,
    )
    assert [offence for offence in offences if not offence.startswith(SERVICE)] == []


def test_packages_import_absolutely() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in _modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def _loaded_heavy_modules(code: str) -> list[str]:
    report = f"import json, sys; {code}; print(json.dumps(sorted(set(sys.modules) & set({HEAVY!r}))))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, list)
    return answer


@pytest.mark.parametrize(
    "code",
    [
        "import mi2rage_engines, mi2rage_rt",
        "import mi2rage_training, mi2rage_export, mi2rage_benchmarks",
        "from mi2rage_rt.cli import command_points; [point.load() for point in command_points().values()]",
    ],
    ids=["runtime", "other packages", "commands"],
)
def test_no_heavy_library_is_loaded_by(code: str) -> None:
    assert _loaded_heavy_modules(code) == []


def test_help_loads_no_heavy_library() -> None:
    code = (
        "from mi2rage_rt.cli import main\ntry: main(['--help'])\n"
        f"except SystemExit as end: assert not end.code\nimport sys; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
