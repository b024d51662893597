"""Small vocabularies in the formats of CLIP and BERT, written as transformers writes them."""

from __future__ import annotations

from pathlib import Path

WORDS = [
    "a",
    "the",
    "of",
    "on",
    "in",
    "and",
    "with",
    "near",
    "man",
    "woman",
    "dog",
    "red",
    "blue",
    "car",
    "house",
    "photo",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]


def bert_vocabulary() -> dict[str, int]:
    """Ids of BERT's special tokens, BLIP's two, a few words, and letters as starts and continuations."""
    pieces = [*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,!?#@'-:"]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def save_bert_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=bert_vocabulary(), additional_special_tokens=["[DEC]", "[ENC]"])
    tokenizer.save_pretrained(folder)


def save_clip_tokenizer(folder: Path, max_length: int) -> int:
    """Write a CLIP tokenizer of single bytes and return the size of its vocabulary."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    pieces = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length).save_pretrained(folder)
    return len(vocabulary)
