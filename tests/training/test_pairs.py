"""Pairs of files and stores, in each modality, and the commands that show a classifier but a part of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from mi2rage_engines.errors import DataError
from mi2rage_rt.cli import main
from mi2rage_rt.samples import BadRow, Sample, Span, write_samples
from mi2rage_training.pairs import Modality, load_pairs, mentions_only
from tests.training.fit_fakes import pairs


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Nine rows, the last one without an image."""
    made = []
    for pair in pairs(9):
        name = f"{pair.sample.id}.png"
        (tmp_path / name).write_bytes(pair.image if isinstance(pair.image, bytes) else b"")
        made.append(dataclasses.replace(pair.sample, image=name))
    made[-1] = dataclasses.replace(made[-1], image=None)
    write_samples(tmp_path / "rows.jsonl", made)
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("head", "tail", "tokens", "spans"),
    [
        ((0, 2), (3, 4), ("a", "b", "d"), ((0, 2), (2, 3))),
        ((3, 4), (0, 2), ("d", "a", "b"), ((0, 1), (1, 3))),  # the head first, wherever it stood
        ((0, 3), (1, 2), ("a", "b", "c", "b"), ((0, 3), (3, 4))),  # nested: the shared word stands twice
        ((1, 2), (1, 2), ("b", "b"), ((0, 1), (1, 2))),
    ],
)
def test_a_sentence_reduced_to_its_mentions(
    head: tuple[int, int], tail: tuple[int, int], tokens: tuple[str, ...], spans: tuple[tuple[int, int], ...]
) -> None:
    sample = Sample("s", ("a", "b", "c", "d", "e"), Span(*head), Span(*tail), "x", "i.png")
    reduced = mentions_only(sample)
    assert reduced.tokens == tokens
    assert (reduced.head, reduced.tail) == (Span(*spans[0]), Span(*spans[1]))
    assert (reduced.mention(reduced.head), reduced.mention(reduced.tail)) == (
        sample.mention(sample.head),
        sample.mention(sample.tail),
    )
    assert (reduced.id, reduced.label, reduced.image) == ("s", "x", "i.png")


def test_rows_without_their_images_are_left_out_and_counted(rows: Path) -> None:
    for image in sorted(rows.parent.glob("*.png"))[:2]:
        image.unlink()
    with pytest.raises(DataError, match="not found in"):
        load_pairs(rows)
    bad: list[BadRow] = []
    assert len(load_pairs(rows, skip_bad=True, bad_rows=bad)) == 7
    assert len(bad) == 2 and all(row.line == 0 and row.reason.startswith("sample ") for row in bad)


def test_modalities(rows: Path) -> None:
    both, text, image = (load_pairs(rows, modality=modality) for modality in Modality)
    assert [pair.image is None for pair in both] == [False] * 8 + [True]
    assert all(pair.image is None for pair in text)
    assert [pair.sample for pair in text] == [pair.sample for pair in both]
    assert [pair.image for pair in image] == [pair.image for pair in both]
    assert {len(pair.sample.tokens) for pair in image} == {4}


def test_no_image_is_refused_where_all_is_image(rows: Path) -> None:
    bare = [dataclasses.replace(pair.sample, image=None) for pair in pairs(3)]
    write_samples(rows, bare)
    with pytest.raises(DataError, match="none of its 3 rows has an image"):
        load_pairs(rows, modality=Modality.IMAGE)


def test_train_and_evaluate_on_images_alone(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["train", rows, tmp_path / "c", "--epochs", 1, "--class-balance", 1, "--mixed-precision", "bf16"],
        ["evaluate", tmp_path / "c", rows],
    ):
        with pytest.raises(SystemExit) as end:
            main([*map(str, words), "--modality", "image", "--json"])
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        assert json.loads(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mixed-precision", "half"], "expected one of: no, fp16, bf16"),
        (["--mixed-precision", "fp16", "--device", "cpu"], "expected a GPU"),
        (["--patience", "2"], "without validation"),
        (["--gradient-accumulation", "0"], "gradient_accumulation: came 0"),
        (["--class-balance", "-1"], "class_balance: came -1"),
        (["--checkpoint", "{rows}"], "is a file"),
        (["--modality", "sound"], "expected one of: both, text, image"),
    ],
)
def test_wrong_options_of_train(
    words: list[str], said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(rows), str(tmp_path / "o"), *(word.format(rows=rows) for word in words)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()
