"""A cell's process: one that is killed, crashes or refuses gives an answer that says so."""

from __future__ import annotations

import subprocess

import pytest

from mi2rage_benchmarks import isolated
from mi2rage_benchmarks.isolated import CellAnswer, CellTask, isolated_cell
from mi2rage_benchmarks.work import WorkOptions
from tests.benchmarks.made_reports import made_report

TASK = CellTask(
    bundles=("nowhere",), sources={}, subject="classify", batch_size=1, work=0, options=WorkOptions(), threads=1
)


@pytest.fixture
def process(monkeypatch):
    """Sets how the process ends; what it was told is kept."""
    told = []

    def end(code: int, stdout: str = "", stderr: str = ""):
        def run(command, **options):
            told.append(options["input"])
            return subprocess.CompletedProcess(command, code, stdout, stderr)

        monkeypatch.setattr(isolated.subprocess, "run", run)
        return told

    return end


def test_the_answer_is_the_last_line(process):
    answer = CellAnswer(cell=made_report().cells[0], gflops=3.0, gbps=2.0)
    told = process(0, "a library's own words\n" + answer.model_dump_json() + "\n")
    assert isolated_cell(TASK) == answer
    assert CellTask.model_validate_json(told[0]) == TASK


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (-9, "", "its process was killed by SIGKILL, as the system does when memory is at its end"),
        (-11, "", "its process was killed by SIGSEGV"),
        (1, "Traceback\nValueError: no", "its process ended with exit code 1: ValueError: no"),
        (0, "", "its process ended with exit code 0: it said nothing"),
    ],
)
def test_a_process_that_dies_says_how(process, code, stderr, reason):
    process(code, stderr=stderr)
    answer = isolated_cell(TASK)
    assert (answer.cell, answer.failed) == (None, reason)


def test_what_cannot_be_used_is_refused(monkeypatch):
    answer = isolated._answer(TASK)
    assert (answer.cell, answer.failed) == (None, None)
    assert answer.refused.startswith("nowhere: no such folder")
