"""The embedded models' tokenizers: CLIP's byte-level BPE and BERT's WordPiece, learnt from the corpus."""

from __future__ import annotations

import collections
import itertools
import json
import string
from collections.abc import Iterable, Mapping
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


def _learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, ties in alphabetical order.

    The trainers of `tokenizers` break ties by the order of a hash map: two runs differ.

    Args:
        words: how often each word occurs, a word being its symbols.
        count: merges at most; pairs seen less than three times are not merged.
    """
    spelt = [list(word) for word in words]
    often = list(words.values())
    places: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for number, symbols in enumerate(spelt):
        for pair in itertools.pairwise(symbols):
            seen[pair] += often[number]
            places[pair].add(number)
    merges: list[tuple[str, str]] = []
    while len(merges) < count and seen:
        best = min(seen, key=lambda pair: (-seen[pair], pair))
        if seen[best] < 3:
            break
        merges.append(best)
        for number in sorted(places.pop(best)):
            before = spelt[number]
            after = _merged(before, best)
            for pair in itertools.pairwise(before):
                seen[pair] -= often[number]
                if not seen[pair]:
                    del seen[pair]
            for pair in itertools.pairwise(after):
                seen[pair] += often[number]
                places[pair].add(number)
            spelt[number] = after
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    at = 0
    while at < len(symbols):
        if tuple(symbols[at : at + 2]) == pair:
            merged.append(_joined(pair))
            at += 2
        else:
            merged.append(symbols[at])
            at += 1
    return merged


def _joined(pair: tuple[str, str]) -> str:
    return pair[0] + pair[1].removeprefix("##")


def _counted(texts: Iterable[str], normalizer: Any, pre_tokenizer: Any) -> collections.Counter[str]:
    words: collections.Counter[str] = collections.Counter()
    for text in texts:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    return words


def clip_tokenizer(texts: Iterable[str], size: int = 1660) -> Any:
    """A `CLIPTokenizer` whose vocabulary holds every byte (so that any text has ids) and merges learnt from `texts`."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    template = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[]).backend_tokenizer
    words = _counted(texts, template.normalizer, template.pre_tokenizer)
    spelt = {(*word[:-1], word[-1] + "</w>"): often for word, often in words.items()}
    merges = _learn_merges(spelt, size - 2 - 2 * len(letters))
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
    from tokenizers import normalizers, pre_tokenizers
    from transformers import BertTokenizer

    words = _counted(texts, normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer())
    spelt = {(word[0], *(f"##{letter}" for letter in word[1:])): often for word, often in words.items()}
    merges = _learn_merges(spelt, size - len(_SPECIAL) - 130)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in string.ascii_lowercase + string.digits)]
    pieces += sorted({symbol for word in spelt for symbol in word} - set(pieces))
    known = set(pieces)
    pieces += [piece for piece in dict.fromkeys(map(_joined, merges)) if piece not in known]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=MAX_WORDPIECES)


def save_bert_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save as transformers does, and `vocab.txt` beside it."""
    tokenizer.save_pretrained(folder)
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in ordered), encoding="utf-8")
