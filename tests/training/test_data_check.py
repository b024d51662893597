"""The data check finds planted faults of every kind, and accuses nothing honest: made-up rows, and the real text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import DataError
from mi2rage_rt.cli import main
from mi2rage_rt.images import encode_image
from mi2rage_training.data_check.check import CheckConfig, check_data_set
from mi2rage_training.data_check.predictors import groups_of
from mi2rage_training.data_check.report import Report
from mi2rage_training.data_check.rows import normal_tokens, read_rows

MNRE = Path(__file__).parents[3] / "shared/data/mnre"
TYPES = {"/per/per/peer": "meets", "/per/org/member_of": "joins", "/loc/loc/contain": "within"}
OBJECTS = ("dog", "car", "tree", "face", "stadium", "poster")
Fields = dict[str, Any]


def made_rows(count: int, seed: int = 0) -> list[Fields]:
    """MNRE rows of five words: half without a relation; the verb tells the label in seven rows of ten."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = draw.choice(list(TYPES)) if draw.random() < 0.5 else "None"
        verb = TYPES.get(label, "sees") if draw.random() < 0.7 else draw.choice([*TYPES.values(), "sees"])
        head, tail = f"Ana{draw.randrange(count)}", f"Bo{draw.randrange(count)}"
        tokens = [head, verb, tail, f"w{seed}x{i}", draw.choice(OBJECTS)]
        rows.append(
            {
                "token": tokens,
                "h": {"name": head, "pos": [0, 1]},
                "t": {"name": tail, "pos": [2, 3]},
                "img_id": f"twitter_{seed}_{i}.jpg",
                "relation": label,
            }
        )
    return rows


def write(path: Path, rows: list[Fields]) -> Path:
    path.write_text("".join(f"{row!r}\n" for row in rows), encoding="utf-8")
    return path


def check(folder: Path, rows: list[Fields], **others: Any) -> Report:
    return check_data_set(CheckConfig(train=write(folder / "train.txt", rows), **others))


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def objects(row: Fields, draw: random.Random, rate: float = 1.0) -> list[Fields]:
    """Two objects, and of `rate` of the rows with a relation a third one whose phrase holds the gold entity types."""
    found = [{"phrase": draw.choice(OBJECTS), "box": [draw.randrange(200) for _ in range(4)]} for _ in range(2)]
    if row["relation"] != "None" and draw.random() < rate:
        _, head, tail, _ = row["relation"].split("/")
        found.append({"phrase": f"{head} {tail}", "box": [draw.randrange(200) for _ in range(4)]})
    return found


def test_clean_rows_are_sound(tmp_path: Path) -> None:
    report = check(tmp_path, made_rows(600))
    assert report.is_sound
    assert not {"label_leak", "label_giveaway", "label_pattern"} & kinds(report)
    assert report.scan.text_f1 > 0.4  # the verb is learnt


def test_objects_made_from_the_label_are_a_leak(tmp_path: Path) -> None:
    draw = random.Random(1)
    report = check(tmp_path, [row | {"objects": objects(row, draw)} for row in made_rows(600)])
    finding = report.findings[0]
    assert (finding.severity, finding.kind) == ("leak", "label_leak")
    assert "'objects'" in finding.what
    score = report.scan.scores[0]
    assert score.share > 0.9
    assert score.f1 > 0.9  # the types of the third phrase tell the three made-up labels apart


def test_a_leak_of_some_rows_is_found_by_its_value(tmp_path: Path) -> None:
    draw = random.Random(1)
    report = check(tmp_path, [row | {"objects": objects(row, draw, 0.2)} for row in made_rows(1500)])
    assert "label_giveaway" in kinds(report)
    assert [giveaway.field for giveaway in report.scan.giveaways] == ["objects"]


def test_types_of_two_fields_leak_together(tmp_path: Path) -> None:
    rows = made_rows(600)
    for row in rows:
        _, head, tail, *_ = (row["relation"] + "///").replace("None", "/x/x").split("/")
        row["h"]["type"], row["t"]["type"] = head, tail
    report = check(tmp_path, rows)
    leaks = {score.field for score in report.scan.scores if score.is_leak}
    assert {"h.type", "t.type", "all extra fields"} <= leaks


def test_types_of_every_row_are_a_warning(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = made_rows(900)
    for row in rows:  # as a good tagger would give them, where there is no relation too
        label = row["relation"] if row["relation"] != "None" else draw.choice(list(TYPES))
        row["types"] = " ".join(label.split("/")[1:3])
    report = check(tmp_path, rows)
    assert {"label_types"} == {"label_types", "label_leak", "label_giveaway"} & kinds(report)
    assert report.is_sound


def _label_in_name(row: Fields, number: int) -> Fields:
    return row | {"img_id": f"{row['relation'].split('/')[-1]}_{number}.jpg"}


def test_a_label_in_the_file_name_is_a_leak(tmp_path: Path) -> None:
    report = check(tmp_path, [_label_in_name(row, number) for number, row in enumerate(made_rows(400))])
    assert [finding.what for finding in report.findings if finding.kind == "label_leak"] == [
        "the image name gives the label away"
    ]


def test_sorted_rows_are_a_pattern_not_a_leak(tmp_path: Path) -> None:
    report = check(tmp_path, sorted(made_rows(600), key=lambda row: row["relation"]))
    assert report.is_sound
    assert "label_pattern" in kinds(report)


@pytest.mark.parametrize(
    "field",
    [
        lambda row, draw: f"{draw.random():.17f}",
        lambda row, draw: draw.random(),
        lambda row, draw: row["h"]["name"],
        lambda row, draw: [" ".join(draw.choices(row["token"], k=4)), draw.choice(OBJECTS)],
        lambda row, draw: None if draw.random() < 0.5 else {"size": draw.randrange(9)},
    ],
    ids=["unique text", "unique number", "head again", "captions", "sometimes there"],
)
def test_honest_fields_are_not_accused(field: Callable[[Fields, random.Random], Any], tmp_path: Path) -> None:
    draw = random.Random(2)
    report = check(tmp_path, [row | {"field": field(row, draw)} for row in made_rows(600)])
    assert report.is_sound, report.findings


def test_memory_of_shared_images_gains_nothing(tmp_path: Path) -> None:
    rows = made_rows(600)
    by_image: dict[str, str] = {}
    for number, row in enumerate(rows):  # ten rows an image, all of one label, and a field that names the image
        row["img_id"] = f"{number // 10}.jpg"
        row["relation"] = by_image.setdefault(row["img_id"], row["relation"])
    report = check(tmp_path, [row | {"scene": row["img_id"]} for row in rows])
    assert report.scan.groups == 60
    assert not {"label_leak", "label_giveaway"} & kinds(report)


def test_too_few_rows_are_said_to_be_so(tmp_path: Path) -> None:
    assert "20 labelled rows" in str(check(tmp_path, made_rows(20)).scan.skipped)


def test_contradictions_and_duplicates(tmp_path: Path) -> None:
    rows = made_rows(6)
    rows[0]["relation"], rows[1]["relation"] = "None", "/per/per/peer"
    again = [rows[0] | {"relation": "/per/per/peer"}, rows[1] | {}, rows[2] | {"img_id": "other.jpg", "relation": "x"}]
    retweet = rows[3] | {"token": ["RT", "@ana", ":", *rows[3]["token"], "http://t.co/x"]}
    retweet |= {"h": {"pos": [3, 4]}, "t": {"pos": [5, 6]}}
    report = check(tmp_path, [*rows, *again, retweet])
    found = {finding.kind: finding for finding in report.findings}
    assert {"contradiction", "duplicate", "divided_by_image", "near_duplicate"} <= set(found)
    assert found["contradiction"].evidence == "2 rows in 1 groups"
    assert found["contradiction"].severity == "error"
    assert not report.is_sound


def test_what_two_splits_share(tmp_path: Path) -> None:
    train, test = made_rows(8), made_rows(8, seed=1)
    test[0] = train[0] | {"img_id": "new.jpg"}
    test[1]["img_id"] = train[1]["img_id"]
    test[2] = train[2] | {"t": {"pos": [3, 4]}, "img_id": "new2.jpg"}
    report = check(tmp_path, train, test=write(tmp_path / "test.txt", test))
    shared = {finding.kind: finding for finding in report.findings if finding.kind.startswith("shared")}
    assert {kind: finding.evidence for kind, finding in shared.items()} == dict.fromkeys(
        ["shared_row", "shared_text", "shared_image"], "1 rows of test (12.5%)"
    )
    assert shared["shared_row"].examples == ("train line 1 = test line 1",)


def test_image_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    train, test = made_rows(4), made_rows(2, seed=1)
    for number, row in enumerate([*train[:2], *test]):
        shade = 0 if row is test[0] else number
        (folder / row["img_id"]).write_bytes(encode_image(np.full((8, 8, 3), 60 * shade, np.uint8)))
    (folder / train[2]["img_id"]).write_bytes(b"no image")
    report = check(tmp_path, train, test=write(tmp_path / "test.txt", test), images=folder)
    assert report.images == {"named": 6, "decoded": 4, "missing": 1, "undecodable": 1}
    assert {"missing_images", "undecodable_images", "duplicate_images", "shared_image_content"} <= kinds(report)


def test_jsonl_with_unknown_keys_is_scanned_and_told(tmp_path: Path) -> None:
    lines = [
        {"id": f"r{number}", "tokens": row["token"], "head": [0, 1], "tail": [2, 3], "label": row["relation"]}
        | {"hint": row["relation"][:5]}
        for number, row in enumerate(made_rows(300))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    report = check_data_set(CheckConfig(train=path))
    assert {"unknown_keys", "label_leak"} <= kinds(report)


def test_bad_rows_are_refused_or_counted(tmp_path: Path) -> None:
    rows = made_rows(5)
    rows[2]["h"]["pos"] = [0, 99]
    with pytest.raises(DataError, match=r"train\.txt, line 3: .*--skip-bad"):
        check(tmp_path, rows)
    report = check(tmp_path, rows, skip_bad=True)
    assert (report.counts["train"].rows, report.counts["train"].bad) == (4, 1)
    assert "bad_rows" in kinds(report)


def test_normal_tokens_and_groups(tmp_path: Path) -> None:
    assert normal_tokens(("RT", "@Ana", ":", "Look", "http://t.co/1", "@Bo")) == ("look", "@bo")
    rows = made_rows(4)
    rows[1]["img_id"] = rows[0]["img_id"]
    rows[2]["token"] = rows[1]["token"]
    rows[2] |= {"h": {"pos": [0, 1]}, "t": {"pos": [2, 3]}}
    read, _ = read_rows(write(tmp_path / "rows.txt", rows), "train")
    groups = groups_of(read)
    assert groups[0] == groups[1] == groups[2] != groups[3]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `mi2rage-rt check-data words...`."""
    with pytest.raises(SystemExit) as end:
        main(["check-data", *[str(word) for word in words]])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_exit_codes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_rows(5)
    good = write(tmp_path / "good.txt", rows)
    bad = write(tmp_path / "bad.txt", [*rows, rows[0] | {"relation": "other"}])
    code, out, err = run(capsys, good, "--strict")
    assert (code, "Sound" in out) == (0, True), err
    code, out, err = run(capsys, bad)
    assert (code, "ERROR" in out) == (0, True), err
    code, out, err = run(capsys, bad, "--strict", "--json")
    assert (code, json.loads(out)["findings"][0]["kind"]) == (1, "contradiction"), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}/nothing.txt"], "nothing.txt: cannot be read"),
        (["{tmp}/good.txt", "--test", "{tmp}/empty.txt"], "no samples in it"),
        (["{tmp}/good.txt", "--images", "{tmp}/nowhere"], "no such folder"),
        (["{tmp}/rubbish.txt"], "rubbish.txt, line 1"),
    ],
)
def test_wrong_input_is_one_message(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "good.txt", made_rows(3))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "rubbish.txt").write_text("rubbish\n")
    code, out, err = run(capsys, *[word.format(tmp=tmp_path) for word in words])
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.skipif(not MNRE.is_dir(), reason=f"the real MNRE rows are not at {MNRE}")
def test_the_real_text_is_not_accused() -> None:
    started = time.process_time()
    report = check_data_set(CheckConfig(MNRE / "mnre_train.txt", MNRE / "mnre_val.txt"))
    assert time.process_time() - started < 120  # about 15 s; a bound against loops that grow with the rows
    assert not {"label_leak", "label_giveaway", "label_pattern", "contradiction"} & kinds(report)
    assert 0.4 < report.scan.text_f1 < 0.6
    assert report.counts["train"].rows == 12_247
