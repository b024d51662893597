"""`synthesize` as a user meets it: samples left out, budgets, the page of samples, and options that do not fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_rt.cli import main
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import write_samples
from mi2rage_training.store import read_store
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import samples

FAST = ("--links", "2", "--shard-size", "4", "--json")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("models") / "bundle")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Ten samples, each with an image; that of the sixth cannot be decoded."""
    given = [replace(sample, image=f"{sample.id}.png") for sample in samples(10)]
    for sample in given:
        (tmp_path / str(sample.image)).write_bytes(encode_image(np.full((8, 8, 3), 90, np.uint8)))
    (tmp_path / "s5.png").write_bytes(b"no image")
    write_samples(tmp_path / "rows.jsonl", given)
    return tmp_path / "rows.jsonl"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `mi2rage-rt words...`."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_an_image_that_cannot_be_decoded_costs_one_sample(
    bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("synthesize", rows, tmp_path / "store", "--bundle", bundle, "--given", "image", *FAST)
    code, out, err = run(capsys, *words)
    summary = json.loads(out)
    assert (code, summary["left_out"], summary["shards"]) == (1, 1, 3), err
    assert summary["candidates"] + summary["dropped"] == 2 * 9
    assert "nothing could be made of 1 samples, which were left out: s5" in err
    assert "s5" not in {row.provenance.parent for row in read_store(tmp_path / "store")}
    code, out, err = run(capsys, *words, "--skip-bad")  # it is there already, and the user expects it
    assert (code, json.loads(out)) == (0, summary), err
    code, _, err = run(capsys, *words[:2], tmp_path / "strict", *words[3:], "--tries", 0)
    assert (code, "s5.png" in err) == (2, True), err


def test_a_budget_stops_the_run_and_the_same_command_goes_on(
    bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("synthesize", rows, tmp_path / "store", "--bundle", bundle, "--in-flight", 1, *FAST)
    code, out, err = run(capsys, *words, "--stop-at-kept", 5, "--gallery", tmp_path / "page.html")
    summary = json.loads(out)
    assert (code, summary["candidates"], summary["dropped"], summary["shards"]) == (0, 8, 0, 1), err
    assert summary["stopped"] == "8 candidates are kept, 5 were asked for"
    assert "1 of 3 shards are made and can be used as they are; give the same command again" in err
    assert (tmp_path / "page.html").read_text().count("<img") == 2
    code, out, err = run(capsys, *words, "--stop-after", "1h", "--gallery", tmp_path / "page.html")
    assert (code, json.loads(out)["candidates"], "stopped" in json.loads(out)) == (0, 20, False), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stop-after", "soon"), "duration 'soon'"),
        (("--stop-at-cost", "5"), "cost: came without a cost per hour"),
        (("--stop-at-kept", "0"), "kept: came 0"),
        (("--workers", "2"), "--workers 2: came without --ray"),
        (("--gpus-per-worker", "0.5"), "--gpus-per-worker 0.5: came without --ray"),
        (("--ray", "local", "--workers", "0"), "workers: came 0"),
        (("--ray", "local", "--in-flight", "2"), "--in-flight 2: came with --ray"),
        (("--gallery", "{rows}"), "is no gallery of an earlier run"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], message: str, bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(rows=rows) for word in options]
    code, _, err = run(capsys, "synthesize", rows, tmp_path / "store", "--bundle", bundle, *FAST, *given)
    assert (code, message in err) == (2, True), err
    assert not list(tmp_path.glob("store/shard-*"))


@pytest.mark.parametrize("command", ["synthesize", "predict"])
def test_without_ray_the_extra_is_named(
    command: str,
    bundle: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words: tuple[Any, ...] = (
        ("synthesize", rows, tmp_path / "store", "--bundle", bundle)
        if command == "synthesize"
        else ("predict", bundle, rows, "--skip-bad")
    )
    code, _, err = run(capsys, *words, "--ray", "local")
    assert (code, "pip install 'mi2rage-rt[scale]'" in err) == (2, True), err
