"""The commands `world` and `pretrain` as typer sees them."""

import json

import pytest
import typer
from typer.testing import CliRunner

from mi2rage_engines.errors import InputError
from mi2rage_training.microworld.commands import pretrain, world


def _app(command):
    app = typer.Typer()
    app.command()(command)
    return app


def test_world_writes_rows_and_gallery(tmp_path):
    page = tmp_path / "g.html"
    arguments = [
        str(tmp_path / "w"),
        "--train",
        "6",
        "--validation",
        "3",
        "--test",
        "3",
        "--gallery",
        str(page),
        "--json",
    ]
    result = CliRunner().invoke(_app(world), arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["splits"] == {"train": 6, "validation": 3, "test": 3} and sum(summary["labels"].values()) == 12
    assert page.is_file()


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--measure-only", "y"]])
def test_pretrain_wants_one_of_two_things(arguments):
    result = CliRunner().invoke(_app(pretrain), arguments)
    assert isinstance(result.exception, InputError) and "--measure-only" in str(result.exception)
