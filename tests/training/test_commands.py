"""The training commands as a user meets them: they run on small data, and bad input ends in one message and code 2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_rt.cli import main
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import write_samples
from tests.training.fakes import samples

MNRE_SAMPLE = Path(__file__).parents[3] / "shared/data/mnre_sample"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `mi2rage-rt words...`."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    import dataclasses

    rows = [dataclasses.replace(sample, image=f"{sample.id}.png") for sample in samples(24)]
    for i, row in enumerate(rows):
        (folder / str(row.image)).write_bytes(encode_image(np.full((24, 24, 3), 60 * (i % 3), np.uint8)))
    write_samples(folder / "rows.jsonl", rows)
    return folder


def test_the_line_from_text_to_an_evaluated_classifier(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = world / "rows.jsonl"
    store, kept, folder = tmp_path / "candidates", tmp_path / "kept", tmp_path / "classifier"
    code, out, err = run(capsys, "synthesize", rows, store, "--links", 2, "--steps", 2, "--guidance", 1, "--json")
    assert (code, json.loads(out)["candidates"]) == (0, 48), err
    code, _, err = run(capsys, "synthesize", rows, store, "--links", 2, "--steps", 4, "--guidance", 1)
    assert (code, "models.steps: was 2, is 4" in err) == (2, True), err
    code, out, err = run(capsys, "select", store, kept, "--folds", 2, "--epochs", 1, "--per-parent", 1, "--json")
    assert (code, json.loads(out)["kept"]) == (0, 24), err
    code, out, err = run(capsys, "train", kept, folder, "--epochs", 1, "--validation", rows, "--json")
    assert (code, json.loads(out)["with_image"]) == (0, 24), err
    code, out, err = run(capsys, "evaluate", folder, rows, "--json")
    assert (code, json.loads(out)["rows"]) == (0, 24), err
    code, _, err = run(capsys, "train", kept, folder)
    assert (code, "--force" in err) == (2, True)


def test_teachers_of_a_selection_judge_inside_a_later_chain(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, judge = world / "rows.jsonl", tmp_path / "judge"
    first, chain = tmp_path / "first", tmp_path / "chain"
    size = ("--width", 2, "--steps", 2, "--guidance", 1)
    code, _, err = run(capsys, "synthesize", rows, first, "--links", 1, *size)
    assert code == 0, err
    code, _, err = run(capsys, "select", first, tmp_path / "kept", "--folds", 2, "--epochs", 1, "--teachers", judge)
    assert code == 0, err
    code, out, err = run(capsys, "synthesize", rows, chain, "--links", 2, *size, "--judge", judge, "--json")
    assert (code, json.loads(out)["candidates"]) == (0, 96), err
    assert "not_made" not in json.loads(out)
    along = ("synthesize", rows, tmp_path / "along", "--links", 3, *size, "--judge", judge, "--json")
    code, out, err = run(capsys, *along, "--select-online", 0)
    summary = json.loads(out)
    assert (code, summary["dropped"], summary["candidates"] + summary["not_made"]) == (0, 0, 144), err
    assert 0 < summary["not_made"] < 96
    code, _, err = run(capsys, *along, "--select-online", 0.5)
    assert (code, "was begun with other settings" in err) == (2, True), err
    code, _, err = run(capsys, "select", tmp_path / "along", tmp_path / "less", "--folds", 2, "--epochs", 1)
    assert code == 0, err
    code, _, err = run(capsys, "synthesize", rows, chain, "--links", 2, *size)
    assert (code, "judge: was 'teachers-" in err) == (2, True), err
    code, _, err = run(capsys, "synthesize", rows, tmp_path / "x", "--judge", tmp_path / "nothing")
    assert (code, "teachers.json" in err) == (2, True), err


def test_the_line_from_images_to_an_evaluated_classifier(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, store, folder = world / "rows.jsonl", tmp_path / "texts", tmp_path / "classifier"
    made = ("synthesize", rows, store, "--given", "image", "--links", 2, "--steps", 2, "--json")
    code, out, err = run(capsys, *made, "--prefix", "{head} and {tail} :")
    summary = json.loads(out)
    assert (code, summary["given"], summary["candidates"] + summary["dropped"]) == (0, "image", 48), err
    code, out, err = run(capsys, "train", store, folder, "--epochs", 1, "--validation", rows, "--json")
    assert (code, json.loads(out)["pairs"]) == (0, summary["candidates"]), err
    code, out, err = run(capsys, "evaluate", folder, rows, "--modality", "image", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 24), err
    code, _, err = run(capsys, *made[:1], rows, tmp_path / "x", "--given", "sound")
    assert (code, "expected one of: text, image" in err) == (2, True), err


def _bad_span(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"head": [0, 99]}


def _bad_key(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"colour": "red"}


@pytest.mark.parametrize(("spoil", "said"), [(_bad_span, "does not fit"), (_bad_key, "colour")])
def test_a_bad_row_is_named_and_nothing_is_left(
    spoil: Any, said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (world / "rows.jsonl").read_text().splitlines()
    lines[4] = json.dumps(spoil(json.loads(lines[4])))
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    code, out, err = run(capsys, "synthesize", tmp_path / "bad.jsonl", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "bad.jsonl, line 5" in err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_broken_mnre_rows_are_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "{'token': ['a', 'b', 'c'], 'h': {'name': 'a', 'pos': [0, 1]}, 't': {'name': 'c', 'pos': [2, 3]}, "
    rows = [
        good + "'img_id': 'x.jpg', 'relation': '/per/per/peer'}",
        good,
        good + "'img_id': 'y.jpg', 'relation': 'None'}",
    ]
    (tmp_path / "mnre.txt").write_text("\n".join(rows))
    words = ["train", tmp_path / "mnre.txt", tmp_path / "out", "--modality", "text", "--epochs", 1, "--json"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "mnre.txt, line 2" in err
    code, out, err = run(capsys, *words, "--skip-bad")
    assert (code, json.loads(out)["pairs"]) == (0, 2), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["synthesize", "{tmp}/nothing.jsonl", "{tmp}/o"], "nothing.jsonl: cannot be read"),
        (["synthesize", "{tmp}/empty.jsonl", "{tmp}/o"], "no samples in it"),
        (["synthesize", "{rows}", "{tmp}/o", "--links", "0"], "links: came 0"),
        (["synthesize", "{rows}", "{tmp}/o", "--limit", "0"], "--limit"),
        (["synthesize", "{rows}", "{tmp}/o", "--image-format", "gif"], "expected one of: png, jpeg"),
        (["synthesize", "{rows}", "{tmp}/o", "--jpeg-quality", "80"], "jpeg quality: came with the image format png"),
        (["synthesize", "{rows}", "{tmp}/o", "--png-level", "12"], "png level: came 12"),
        (["synthesize", "{rows}", "{tmp}/o", "--select-online", "0.1"], "--select-online: came 0.1 without --judge"),
        (
            ["synthesize", "{rows}", "{tmp}/o", "--judge", "{tmp}", "--select-online", "0", "--sharpness", "2"],
            "sharpness: came 2.0 with least added nats",
        ),
        (["synthesize", "{rows}", "{tmp}/o", "--in-flight", "-1"], "--in-flight"),
        (["synthesize", "{rows}", "{tmp}/o", "--bundle", "{tmp}"], "has no readable bundle.json"),
        (
            ["synthesize", "{rows}", "{tmp}/o", "--bundle", "{tmp}", "--captioner", "embedded"],
            "came with --captioner embedded; expected a bundle alone",
        ),
        (["synthesize", "{rows}", "{tmp}/o", "--generator", "{tmp}/nowhere"], "nowhere"),
        (["synthesize", "{rows}", "{tmp}/o", "--device", "abacus"], "not a torch device"),
        (["select", "{tmp}", "{tmp}/o"], "is no store"),
        (["select", "{tmp}", "{tmp}/o", "--policy", "luck"], "expected one of: all, direct, random, similarity"),
        (["select", "{tmp}", "{tmp}/o", "--quota", "luck"], "expected one of: proportional, balanced, none"),
        (["select", "{tmp}", "{tmp}/o", "--quota", "balanced"], "came without a limit"),
        (["select", "{tmp}", "{tmp}/o", "--similarity-model", "x"], "expected it with similarity only"),
        (["select", "{tmp}", "{tmp}/o", "--page", "{tmp}/empty.jsonl"], "is there already"),
        (["train", "{rows}", "{tmp}/o", "--text-encoder", "{tmp}/nowhere"], "nowhere"),
        (["train", "{rows}", "{tmp}/o", "--images", "{tmp}"], "--images"),
        (["train", "{rows}", "{tmp}/o", "--epochs", "many"], "epochs"),
        (["evaluate", "{tmp}/nowhere", "{rows}"], "no such folder"),
        (["evaluate", "{tmp}", "{rows}"], "missing"),
    ],
)
def test_wrong_input_is_one_message(
    words: list[str], said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    code, out, err = run(capsys, *[word.format(tmp=tmp_path, rows=world / "rows.jsonl") for word in words])
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not MNRE_SAMPLE.is_dir(), reason=f"the real MNRE sample is not at {MNRE_SAMPLE}")
def test_real_rows_with_their_jpegs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", MNRE_SAMPLE / "train.txt", tmp_path / "c", "--epochs", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["with_image"] == json.loads(out)["pairs"]
    code, _, err = run(capsys, "evaluate", tmp_path / "c", MNRE_SAMPLE / "test.txt")
    assert code == 2  # its labels are not all among the few that were trained on
    assert "does not know" in err


def test_a_changed_setting_begins_a_new_run_where_asked_to(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("synthesize", world / "rows.jsonl", tmp_path / "store", "--steps", 2, "--limit", 4, "--json")
    assert run(capsys, *made, "--links", 1)[0] == 0
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    code, _, err = run(capsys, *made, "--links", 2)
    assert (code, "chain.links: was 1, is 2" in err) == (2, True), err
    code, out, err = run(capsys, *made, "--links", 2, "--new-run")
    assert (code, json.loads(out)["candidates"]) == (0, 8), err
    assert f"the earlier store is now {tmp_path / 'store.1'}" in err
    assert (tmp_path / "store.1" / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, err = run(capsys, "synthesize", world / "rows.jsonl", tmp_path / "mine", "--limit", 4, "--new-run")
    assert (code, "is no store of candidates" in err) == (2, True), err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_line_in_an_object_store(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.training.object_store import BUCKET, s3_server

    rows, home = world / "rows.jsonl", f"s3://{BUCKET}/{tmp_path.name}"
    made = ("synthesize", rows, f"{home}/candidates", "--links", 1, "--steps", 2, "--limit", 12, "--json")
    with s3_server():
        code, out, err = run(capsys, *made, "--shard-size", 6)
        assert (code, json.loads(out)["shards"]) == (0, 2), err
        code, _, err = run(capsys, *made, "--shard-size", 3)
        assert (code, "chain.shard_size: was 6, is 3" in err) == (2, True), err
        code, _, err = run(capsys, *made, "--new-run")
        assert (code, "give another address" in err) == (2, True), err
        chosen = ("select", f"{home}/candidates", f"{home}/kept", "--policy", "random", "--keep", 0.5, "--json")
        code, out, err = run(capsys, *chosen, "--page", tmp_path / "page.html")
        assert (code, json.loads(out)["kept"]) == (0, 6), err
        assert "<img" in (tmp_path / "page.html").read_text(encoding="utf-8")
        assert run(capsys, "store", "verify", f"{home}/kept")[0] == 0
        code, out, err = run(capsys, "train", f"{home}/kept", tmp_path / "classifier", "--epochs", 1, "--json")
        assert (code, json.loads(out)["with_image"]) == (0, 6), err
        code, _, err = run(capsys, "synthesize", rows, "s3://nowhere-at-all/x", "--limit", 1)
        assert (code, "expected a bucket that is there" in err) == (2, True), err
        code, _, err = run(capsys, "train", f"{home}/nothing", tmp_path / "x")
        assert (code, "is no store" in err) == (2, True), err


def test_teachers_fitted_on_a_part_of_a_store(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "candidates"
    assert run(capsys, "synthesize", world / "rows.jsonl", store, "--links", 1, "--width", 2, "--steps", 2)[0] == 0
    chosen = ("select", store, tmp_path / "kept", "--folds", 2, "--epochs", 1, "--per-parent", 1, "--json")
    code, out, err = run(capsys, *chosen, "--fit-on", 12)
    assert (code, json.loads(out)["kept"]) == (0, 24), err
    code, _, err = run(capsys, *chosen)
    assert (code, "config.fit_on: was 12, is None" in err) == (2, True), err
