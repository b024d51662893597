"""Two reports side by side: a slower machine is no regression, a slower side is, noise is called noise."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from mi2rage_benchmarks import commands
from mi2rage_benchmarks.compare import RUN_RESOLUTION, compared, comparison_markdown, share_from
from mi2rage_benchmarks.report import EAGER, BenchReport, read_report
from mi2rage_engines.errors import InputError, Mi2rageError
from tests.benchmarks.made_reports import RUNTIME, made_report


@pytest.fixture(scope="module")
def old():
    return made_report()


def test_the_same_on_another_day_is_noise(old):
    found = compared(old, made_report(seed=1), 0.05)
    assert len(found.changes) == 4 * 2 * 4
    judged = [change for change in found.changes if change.side != EAGER]
    assert {change.verdict for change in judged} == {"no difference"}
    assert found.regressions == found.gone == found.failed == ()
    assert found.environment == {}  # the date is another one in every run


def test_a_slower_machine_is_shown_and_fails_nothing(old):
    found = compared(old, made_report(seed=1, machine=1.5), 0.05)
    eager = [change for change in found.changes if change.side == EAGER]
    assert all(change.time.verdict == "slower" and change.speed is None for change in eager)
    assert all(0.6 < change.time.median < 0.75 for change in eager)
    assert found.regressions == ()


def test_a_slower_side_is_a_regression(old):
    slower = made_report(seed=1, machine=0.7, slower={RUNTIME: 1.2})
    found = compared(old, slower, 0.1)
    assert {change.side for change in found.changes if change.regressed} == {RUNTIME}
    assert len(found.regressions) == 8
    assert found.regressions[0].startswith(f"text encoder, batch 1, {RUNTIME}: ")
    assert "**slower**" in comparison_markdown(found)
    # It is slower, but not by so much.
    assert compared(old, slower, 0.5).regressions == ()
    # And nobody asked for more than to be told.
    assert compared(old, slower).regressions == ()


def test_a_small_bound_is_kept_though_runs_differ_by_more_now_and_then(old):
    slower = made_report(seed=1, slower={RUNTIME: 1 + RUN_RESOLUTION - 0.02})
    assert compared(old, slower, 0.02).regressions
    assert compared(old, slower, 0.05).regressions == ()


def test_what_failed_now_is_a_regression_and_what_is_gone_is_named(old):
    cells = list(old.cells)
    cells[0] = cells[0].model_copy(update={"sides": (), "failed": "its process was killed by SIGKILL"})
    new = old.model_copy(update={"cells": tuple(cells[:-1]), "environment": old.environment | {"torch": "2.10"}})
    found = compared(old, new, 0.05)
    assert found.regressions == ("text encoder, batch 1: its process was killed by SIGKILL",)
    assert "generation, 4 steps, batch 8, torch.compile" in found.gone
    assert found.environment == {"torch": ("2.9", "2.10")}
    assert "torch: 2.9 then, 2.10 now" in comparison_markdown(found)


def test_shares():
    assert (share_from("5%"), share_from("0.05"), share_from(" 12.5% ")) == (0.05, 0.05, 0.125)
    for wrong in ("five", "0", "-5%", "nan", "%"):
        with pytest.raises(InputError, match=r"no share; expected e\.g\. 5% or 0\.05"):
            share_from(wrong)


def test_reports_are_read_and_others_refused(old, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(old.model_dump_json(), encoding="utf-8")
    assert read_report(file) == old
    # Version 1 had no number, no verdicts and no percentiles.
    document = json.loads(old.model_dump_json())
    del document["schema_version"]
    for cell in document["cells"]:
        for side in cell["sides"]:
            for name in ("percentiles_ms", "steady", "ended"):
                del side["timing"][name]
            if side["ratio"]:
                del side["ratio"]["verdict"]
    file.write_text(json.dumps(document), encoding="utf-8")
    assert read_report(file).cells[0].sides[2].ratio == old.cells[0].sides[2].ratio
    for content, message in (
        ("{", "no report can be read"),
        ("[]", "expected a JSON file made by 'mi2rage-rt bench --out'"),
        ('{"schema_version": 9}', "schema version 9; this release reads 1 to 2"),
        ('{"schema_version": 2, "cells": 3}', "cells: Input should be a valid tuple"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_report(file)
    with pytest.raises(InputError, match="no report can be read"):
        read_report(tmp_path / "nothing.json")


@pytest.fixture
def invoke(tmp_path, old):
    (tmp_path / "old.json").write_text(old.model_dump_json(), encoding="utf-8")
    slower = made_report(seed=1, slower={RUNTIME: 1.3})
    (tmp_path / "new.json").write_text(slower.model_dump_json(), encoding="utf-8")
    app = typer.Typer()
    app.command()(commands.bench)
    return lambda *words: CliRunner().invoke(app, [word.format(tmp_path) for word in words])


def test_the_command_fails_beyond_the_bound(invoke):
    run = invoke("--report", "{}/new.json", "--compare", "{}/old.json")
    assert run.exit_code == 0, run.output
    assert "against eager (95%)" in run.output
    run = invoke("--report", "{}/new.json", "--compare", "{}/old.json", "--fail-slower", "5%", "--json")
    assert isinstance(run.exception, Mi2rageError)
    assert (run.exception.exit_code, run.exception.args[0][:20]) == (1, "slower than before: ")
    document = json.loads(run.stdout)
    assert document["comparison"]["bound"] == 0.05
    assert BenchReport.model_validate(document["report"])
    run = invoke("--report", "{}/old.json", "--compare", "{}/old.json", "--fail-slower", "5%")
    assert run.exit_code == 0, run.output


def test_the_command_refuses_what_means_nothing(invoke):
    for words, message in (
        ((), "no bundle: expected BUNDLE"),
        (("--report", "{}/new.json", "--fail-slower", "5%"), "expected --compare OLD.json beside it"),
        (("bundle", "--report", "{}/new.json"), "measures nothing; leave BUNDLE and --recipe out"),
        (("bundle", "--compare", "{}/nothing.json"), "no report can be read"),
    ):
        run = invoke(*words)
        assert isinstance(run.exception, InputError), run.output
        assert message in str(run.exception)


def test_the_schema_fits_the_reports(invoke, old):
    schema = json.loads(invoke("--schema").stdout)
    assert schema["title"] == "BenchReport"
    assert set(json.loads(old.model_dump_json())) == set(schema["properties"])
    assert schema["additionalProperties"] is False
