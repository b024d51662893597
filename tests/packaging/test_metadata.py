"""What pyproject.toml promises: commands that exist, extras that `doctor` knows, versions that are pinned."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mi2rage_rt import __version__
from mi2rage_rt.cli import GROUP, command_points
from mi2rage_rt.extras import EXTRA_BY_IMPORT, extras

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS: dict[str, str] = PROJECT["entry-points"][GROUP]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"mlperf_loadgen": "mlcommons-loadgen", "sklearn": "scikit-learn", "tensorrt_rtx": "tensorrt-rtx"}
"""Distributions whose name is not that of their import."""
UNPINNED = {"tensorrt"}
"""Fetched from NVIDIA's own index, for the CUDA that is there."""


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: Version(version) for name, version in pairs}


def _requirements(extra: str) -> list[Requirement]:
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                found += _requirements(inner)
        else:
            found.append(requirement)
    return found


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version(PROJECT["name"]) == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(\d\S*)\]", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert latest.group(1) == __version__


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_a_function_with_help(name: str) -> None:
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert callable(command)
    summary = (inspect.getdoc(command) or "").partition("\n")[0]
    assert len(summary) > 10, f"{COMMANDS[name]}: the first line of its docstring is its help text"


def test_installed_commands_are_those_of_pyproject() -> None:
    assert {name: point.value for name, point in command_points().items()} == COMMANDS, "run `make install` again"


def test_program_is_a_function() -> None:
    module, _, attribute = PROJECT["scripts"][PROJECT["name"]].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_doctor_knows_every_extra() -> None:
    assert {extra.name for extra in extras()} == set(EXTRAS)


@pytest.mark.parametrize("module", EXTRA_BY_IMPORT)
def test_hint_names_an_extra_that_brings_the_import(module: str) -> None:
    brought = {canonicalize_name(requirement.name) for requirement in _requirements(EXTRA_BY_IMPORT[module])}
    assert DISTRIBUTIONS.get(module, module) in brought


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_constraints_pin_what_the_ranges_allow(extra: str) -> None:
    pins = _pins()
    wanted = _requirements(extra) if extra else [Requirement(line) for line in PROJECT["dependencies"]]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name not in UNPINNED:
            assert name in pins, f"constraints.txt: {name} is missing"
            assert pins[name] in requirement.specifier, f"constraints.txt: {name}=={pins[name]} is not {requirement}"


def test_constraints_fit_any_machine() -> None:
    for name, version in _pins().items():
        assert version.local is None, f"constraints.txt: {name}=={version} names one build"
        assert not name.startswith(("nvidia-", "cuda-")), f"constraints.txt: {name} is for one CUDA only"
