"""The embedded models' tokenizers: CLIP's byte-level BPE and BERT's WordPiece, learnt from the corpus."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "MAX_PROMPT_TOKENS",
    "MAX_WORDPIECES",
    "bert_tokenizer",
    "clip_tokenizer",
    "save_bert_tokenizer",
    "save_clip_tokenizer",
]

MAX_PROMPT_TOKENS = 40
MAX_WORDPIECES = 64

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _learn_merges(texts: Iterable[str], size: int) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    template = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False, min_frequency=3)
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def clip_tokenizer(texts: Iterable[str], size: int = 1500) -> Any:
    """A `CLIPTokenizer` whose vocabulary holds every byte (so that any text has ids) and merges learnt from `texts`."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(texts, size - 2 - len(letters))
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    known = set(pieces)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            pieces.append(left + right)
    vocab = {piece: number for number, piece in enumerate([*pieces, _START, _END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_PROMPT_TOKENS)


def save_clip_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save as transformers does; `tokenizer.json` also pads and truncates as the pipeline asks for it to."""
    tokenizer.save_pretrained(folder)
    fast = tokenizer.backend_tokenizer
    fast.enable_truncation(MAX_PROMPT_TOKENS)
    fast.enable_padding(length=MAX_PROMPT_TOKENS, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    fast.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab()
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(pair) for pair in json.loads(fast.to_str())["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    fast.no_truncation()
    fast.no_padding()


def bert_tokenizer(texts: Iterable[str], size: int = 1300) -> Any:
    """A lower-casing `BertTokenizer` with WordPieces learnt from `texts`; ASCII words are never unknown."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=size, min_frequency=3, show_progress=False, wordpieces_prefix="##")
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in string.ascii_lowercase + string.digits)]
    known = set(pieces)
    pieces += [piece for piece, _ in learnt if piece not in known]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=MAX_WORDPIECES)


def save_bert_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save as transformers does, and `vocab.txt` beside it."""
    tokenizer.save_pretrained(folder)
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in ordered), encoding="utf-8")
