"""Recipes: those of the package are whole, options stand before them, a part that fails is a row."""

from __future__ import annotations

import json

import pytest

from mi2rage_benchmarks import recipes
from mi2rage_benchmarks.bench import BenchRequest
from mi2rage_benchmarks.recipes import read_recipe, recipe_names, run_recipe
from mi2rage_benchmarks.subjects import ALL, SUBJECTS
from mi2rage_engines.errors import InputError, ParityError
from tests.benchmarks.made_reports import made_report

TWO = """
title = "two"
[[parts]]
name = "a"
bundle = "one"
also = ["other"]
made_by = "mi2rage-rt export --out one"
batch_sizes = [1, 4]
[[parts]]
name = "b"
bundle = "two"
"""


@pytest.fixture
def two(tmp_path):
    (tmp_path / "two.toml").write_text(TWO, encoding="utf-8")
    for name in ("one", "other", "two"):
        (tmp_path / name).mkdir()
    return read_recipe(str(tmp_path / "two.toml"))


def test_the_packages_recipes_ask_for_what_there_is(tmp_path):
    assert recipe_names() == ["micro", "real-cpu"]
    for name in recipe_names():
        for part in read_recipe(name).parts:
            request = part.request(tmp_path, {})
            assert set(request.subjects) <= {ALL, *SUBJECTS}
            assert request.budget_seconds > 0
            assert "mi2rage-rt" in part.made_by
    assert read_recipe("micro").parts[0].request(tmp_path, {}).subjects == (ALL,)


def test_parts_are_run_one_after_the_other_and_options_stand_before_them(two, tmp_path, monkeypatch):
    asked = []
    report = made_report()
    monkeypatch.setattr(recipes, "run_bench", lambda *args, **_: asked.append(args) or report)
    found = run_recipe(two, tmp_path, {"repeats": 3, "batch_sizes": (2,)}, command="the command")
    assert [place for place, _ in asked] == [tmp_path / "one", tmp_path / "two"]
    assert asked[0][1] == BenchRequest(also=(tmp_path / "other",), batch_sizes=(2,), repeats=3)
    assert found.title == "two"
    assert [cell.part for cell in found.cells] == ["a"] * 8 + ["b"] * 8
    assert json.loads(found.model_dump_json())["gemm_gflops"] == report.gemm_gflops


def test_a_part_that_fails_is_a_row(two, tmp_path, monkeypatch):
    def run(place, *_, **__):
        if place.name == "one":
            raise ParityError("one and the PyTorch\nmodel differ")
        return made_report()

    monkeypatch.setattr(recipes, "run_bench", run)
    found = run_recipe(two, tmp_path, {})
    assert [cell.part for cell in found.cells] == ["a"] + ["b"] * 8
    assert found.cells[0].failed == "one and the PyTorch model differ"
    assert found.environment["cpu"] == "made up"


def test_a_bundle_may_be_named_where_there_is_one_part(two, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(recipes, "run_bench", lambda *args, **_: asked.append(args) or made_report())
    run_recipe(read_recipe("micro"), tmp_path, {}, bundle=tmp_path / "one")
    assert asked[0][0] == tmp_path / "one"
    with pytest.raises(InputError, match="a bundle for each of its 2 parts; leave BUNDLE out"):
        run_recipe(two, tmp_path, {}, bundle=tmp_path / "one")


def test_wrong_recipes_are_refused(two, tmp_path):
    (tmp_path / "other").rmdir()
    with pytest.raises(InputError, match=r"other: no such folder; expected a bundle; make it:\nmi2rage-rt export"):
        run_recipe(two, tmp_path, {})
    with pytest.raises(InputError, match="recipe 'large': not found; expected micro, real-cpu"):
        read_recipe("large")
    for content, message in (
        ("title = ", "not valid TOML"),
        ('title = "x"\nparts = []', "parts are named nothing; expected at least one"),
        (TWO.replace('"b"', '"a"'), "parts are named a, a; expected at least one, no two alike"),
        (TWO + "step = 3", "parts.1.step: Extra inputs are not permitted"),
    ):
        (tmp_path / "wrong.toml").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_recipe(str(tmp_path / "wrong.toml"))
