"""Imports run low to high: engines < runtime < training < export < benchmarks; inside functions as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = {
    "mi2rage_engines": ROOT / "engines" / "mi2rage_engines",
    "mi2rage_rt": ROOT / "mi2rage_rt",
    "mi2rage_training": ROOT / "training" / "mi2rage_training",
    "mi2rage_export": ROOT / "export" / "mi2rage_export",
    "mi2rage_benchmarks": ROOT / "benchmarks" / "mi2rage_benchmarks",
}
HEAVY = {"torch", "transformers", "diffusers", "tensorrt", "tensorrt_rtx", "ray", "kserve", "onnx", "sklearn"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import statement, and of `import_module`, `require` on a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if name in ("import_module", "require", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value).partition(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_nothing_looks_up(package: str) -> None:
    names = list(ORDER)
    above = set(names[names.index(package) + 1 :])
    files = sorted(ORDER[package].rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name in above
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["mi2rage_engines", "mi2rage_rt"])
def test_the_runtime_has_nothing_heavy_at_module_level(package: str) -> None:
    wrong = []
    for path in sorted(ORDER[package].rglob("*.py")):
        top = ast.Module(
            [
                node
                for node in ast.parse(path.read_text(encoding="utf-8")).body
                if not isinstance(node, ast.FunctionDef)
            ],
            type_ignores=[],
        )
        for node in top.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                wrong += [f"{path.name}:{line} {name}" for line, name in imported(node) if name in HEAVY]
    assert not wrong, "\n".join(wrong)
