"""Vocabularies of the published sizes, made up: what a model costs depends on how many entries there are, not on which.

Their pieces are all short strings of letters, so any text is tokenised, into more pieces than with the published ones.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["bert_tokenizer", "clip_tokenizer", "gpt2_tokenizer", "save_tokenizer"]

CLIP_ENTRIES = 49_408
GPT2_ENTRIES = 50_257
BERT_ENTRIES = 30_522

_LETTERS = string.ascii_lowercase
_SPACE = "\u0120"
"""A leading space in GPT-2's byte alphabet."""


def _letter_runs(first: list[str], last: list[str]) -> Iterator[tuple[str, str]]:
    """Merges that build up runs of two, three and four letters, the short ones first."""
    pairs = ["".join(pair) for pair in itertools.product(_LETTERS, repeat=2)]
    yield from itertools.product(first, last)
    yield from itertools.product(pairs, last)
    yield from itertools.product(pairs, pairs)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's byte-level BPE with 49,408 entries and rows of 77 ids.

    Args:
        pad_token: `!` (id 0) for OpenCLIP's text encoders.
    """
    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{character}</w>" for character in characters)]
    ends = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    merges = list(itertools.islice(_letter_runs(list(_LETTERS), ends), CLIP_ENTRIES - 2 - len(pieces)))
    pieces += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def gpt2_tokenizer() -> Any:
    """GPT-2's byte-level BPE with 50,257 entries; the last one ends a text."""
    pieces = list(bytes_to_unicode().values())
    merges = list(itertools.islice(_letter_runs([_SPACE, *_LETTERS], list(_LETTERS)), GPT2_ENTRIES - 1 - len(pieces)))
    pieces += ["".join(merge) for merge in merges] + ["<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return GPT2Tokenizer(vocab=vocabulary, merges=merges)


def bert_tokenizer(*additional: str) -> Any:
    """BERT's WordPiece with 30,522 entries, its special ones at their published ids; `additional` ones come behind."""
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    single = [*string.punctuation, *string.digits, *_LETTERS]
    runs = ("".join(run) for length in (2, 3, 4) for run in itertools.product(_LETTERS, repeat=length))
    whole = itertools.chain(single, runs)
    pieces = itertools.chain.from_iterable((piece, f"##{piece}") for piece in whole)
    vocabulary = {
        fixed.get(index, f"[unused{index}]") if index < 104 else next(pieces): index for index in range(BERT_ENTRIES)
    }
    vocabulary |= {name: BERT_ENTRIES + index for index, name in enumerate(additional)}
    return BertTokenizer(vocab=vocabulary, additional_special_tokens=list(additional))


def save_tokenizer(tokenizer: Any, folder: Path) -> Path:
    """Write a tokenizer's files and return its `tokenizer.json`."""
    tokenizer.save_pretrained(folder)
    return folder / "tokenizer.json"
