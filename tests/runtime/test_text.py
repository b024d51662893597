from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import TokenizerSpec
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.text import EntityMarkedTokenizer, PlainTokenizer
from tests.runtime.tiny_bundle import WORDS, wordpiece


def byte_level() -> tokenizers.Tokenizer:
    """A RoBERTa-like tokenizer, trained on three sentences."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [" tim cook leads apple in rome"] * 9,
        trainers.BpeTrainer(
            special_tokens=["<s>", "<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def sample(text: str, head: tuple[int, int], tail: tuple[int, int]) -> Sample:
    return Sample("s", tuple(text.split()), Span(*head), Span(*tail))


def pieces(tokenizer: EntityMarkedTokenizer, given: Sample) -> str:
    row = tokenizer.rows([given])[0]
    names = [tokenizer._tokenizer.id_to_token(piece) for piece in row.ids]
    assert names[row.head] == "[E1]" and names[row.tail] == "[E2]"
    return " ".join(names)


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        ((0, 2), (3, 4), "[CLS] [E1] tim cook [/E1] leads [E2] apple [/E2] [SEP]"),
        ((3, 4), (0, 2), "[CLS] [E2] tim cook [/E2] leads [E1] apple [/E1] [SEP]"),
        ((0, 3), (1, 2), "[CLS] [E1] tim [E2] cook [/E2] leads [/E1] apple [SEP]"),
        ((0, 2), (0, 3), "[CLS] [E2] [E1] tim cook [/E1] leads [/E2] apple [SEP]"),
        ((1, 3), (0, 3), "[CLS] [E2] tim [E1] cook leads [/E1] [/E2] apple [SEP]"),
        ((0, 2), (1, 3), "[CLS] [E1] tim [E2] cook [/E1] leads [/E2] apple [SEP]"),
        ((0, 2), (2, 4), "[CLS] [E1] tim cook [/E1] [E2] leads apple [/E2] [SEP]"),
        ((1, 2), (1, 2), "[CLS] tim [E1] [E2] cook [/E2] [/E1] leads apple [SEP]"),
    ],
)
def test_markers_in_every_order(head: tuple[int, int], tail: tuple[int, int], expected: str) -> None:
    tokenizer = EntityMarkedTokenizer(wordpiece(), 32)
    assert pieces(tokenizer, sample("Tim Cook leads Apple", head, tail)) == expected


def test_markers_are_added_once_and_saved(tmp_path: Path) -> None:
    tokenizer = EntityMarkedTokenizer(wordpiece(), 32)
    assert tokenizer.vocabulary_size == len(WORDS) + 4
    tokenizer.save(tmp_path / "tokenizer.json")
    again = EntityMarkedTokenizer.from_file(tmp_path / "tokenizer.json", 32)
    assert again.vocabulary_size == len(WORDS) + 4
    given = sample("Tim Cook leads Apple", (0, 2), (3, 4))
    assert again.rows([given]) == tokenizer.rows([given])


def test_text_that_reads_like_a_marker_stays_text() -> None:
    tokenizer = EntityMarkedTokenizer(wordpiece(), 32)
    row = tokenizer.rows([sample("[E1] [SEP] tim [/E2] apple", (2, 3), (4, 5))])[0]
    marker = tokenizer._tokenizer.token_to_id("[E1]")
    assert row.ids.count(marker) == 1 and row.ids.count(WORDS.index("[SEP]")) == 1


def test_byte_level_words_keep_their_spaces() -> None:
    tokenizer = EntityMarkedTokenizer(byte_level(), 64)
    text = pieces(tokenizer, sample("tim leads apple", (0, 1), (2, 3)))
    assert text == "<s> [E1] Ġtim [/E1] Ġleads [E2] Ġapple [/E2] </s>"
    assert tokenizer.pad_id == 1


def test_long_rows_lose_the_far_words_first() -> None:
    given = sample("the sea tim by the red car apple of dog", (2, 3), (7, 8))
    expected = {
        16: "[CLS] the sea [E1] tim [/E1] by the red car [E2] apple [/E2] of dog [SEP]",
        15: "[CLS] the sea [E1] tim [/E1] by the red car [E2] apple [/E2] of [SEP]",
        14: "[CLS] sea [E1] tim [/E1] by the red car [E2] apple [/E2] of [SEP]",
        12: "[CLS] [E1] tim [/E1] by the red car [E2] apple [/E2] [SEP]",
        10: "[CLS] [E1] tim [/E1] by car [E2] apple [/E2] [SEP]",
        8: "[CLS] [E1] tim [/E1] [E2] apple [/E2] [SEP]",
    }
    for length, text in expected.items():
        assert pieces(EntityMarkedTokenizer(wordpiece(), length), given) == text


def test_mentions_longer_than_a_row_keep_their_markers() -> None:
    given = sample("tim cook leads apple in rome", (0, 3), (3, 6))
    text = pieces(EntityMarkedTokenizer(wordpiece(), 9), given)
    assert len(text.split()) == 9 and "[E1] tim" in text and text.endswith("[/E2] [SEP]")


def test_batches_are_padded_to_the_longest_row() -> None:
    tokenizer = EntityMarkedTokenizer(wordpiece(), 32)
    short, long = sample("tim apple", (0, 1), (1, 2)), sample("the red car of tim in apple", (4, 5), (6, 7))
    batch = tokenizer.encode([short, long])
    assert batch["input_ids"].shape == (2, 13) and batch["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [8, 13])
    assert (batch["input_ids"][0, 8:] == 0).all()
    np.testing.assert_array_equal(batch["head_index"], [1, 5])
    np.testing.assert_array_equal(batch["tail_index"], [4, 9])


def test_words_without_pieces_do_no_harm() -> None:
    tokenizer = EntityMarkedTokenizer(wordpiece(), 32)
    text = pieces(tokenizer, Sample("s", ("\u200d", "tim", "\ufe0f"), Span(0, 1), Span(2, 3)))
    assert "[E1]" in text and "[/E2]" in text


def test_no_room_and_no_padding_are_refused() -> None:
    with pytest.raises(ModelFolderError, match="max_length 7 leaves no room"):
        EntityMarkedTokenizer(wordpiece(), 7)
    bare = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelFolderError, match="give the id to pad with"):
        EntityMarkedTokenizer(bare, 32)


@pytest.fixture
def plain(tmp_path: Path) -> PlainTokenizer:
    saved = wordpiece()
    saved.enable_truncation(4)  # what the file says of lengths does not count
    saved.enable_padding(length=30)
    saved.save(str(tmp_path / "tokenizer.json"))
    return PlainTokenizer(TokenizerSpec(file="tokenizer.json", max_length=6, pad_id=7), tmp_path)


def test_prompts_are_framed_cut_and_filled(plain: PlainTokenizer) -> None:
    ids = plain.encode(["a red car", "a red car by the sea in rome", ""])
    a, red, car, by = (WORDS.index(word) for word in ("a", "red", "car", "by"))
    np.testing.assert_array_equal(ids, [[2, a, red, car, 3, 7], [2, a, red, car, by, 3], [2, 3, 7, 7, 7, 7]])
    assert ids.dtype == np.int64
    words = ["a", "red", "car", "by", "the", "sea", "in", "rome"]
    assert plain.bare_ids(" ".join(words)) == [WORDS.index(word) for word in words]


def test_decoding_joins_pieces_and_drops_special_ids(plain: PlainTokenizer) -> None:
    ids = [4, *(WORDS.index(word) for word in ("the", "sea", "##s", "##ide")), 3, 0]
    assert plain.decode(ids) == "the seaside"


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    spec = TokenizerSpec(file="tokenizer.json", max_length=6, pad_id=0)
    with pytest.raises(ModelFolderError, match="no such file"):
        PlainTokenizer(spec, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="no tokenizer"):
        PlainTokenizer(spec, tmp_path)
