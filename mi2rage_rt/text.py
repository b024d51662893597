"""Text to ids: the one tokenisation path of training, export and runtime.

Both tokenizers read the `tokenizer.json` of any fast tokenizer (WordPiece, byte-level BPE, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import TokenizerSpec
from mi2rage_rt.files import atomic_bytes
from mi2rage_rt.samples import Sample, Span

__all__ = ["MARKERS", "EntityMarkedTokenizer", "MarkedRow", "PlainTokenizer", "load_tokenizer"]

MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")
"""Open and close the head's mention, open and close the tail's."""

_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")


def load_tokenizer(path: Path | str) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`, its own truncation and padding switched off.

    Raises:
        ModelFolderError: the file is missing or is no tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: no such file; expected a tokenizer.json; save the model's fast tokenizer into the folder"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise ModelFolderError(
            f"{path}: no tokenizer ({error}); expected the tokenizer.json of a fast tokenizer"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class PlainTokenizer:
    """Framed ids of whole texts (a generator's prompts), and ids and text without the frame (captions).

    Args:
        spec: the file, the rows' length and the id they are filled up with. Stable Diffusion pads with
            `<|endoftext|>` or `!`, so the id cannot be guessed from the tokenizer.
        folder: what `spec.file` is relative to.
    """

    def __init__(self, spec: TokenizerSpec, folder: Path | str) -> None:
        file = Path(folder) / spec.file
        self._tokenizer = load_tokenizer(file)
        # One that cuts, once and for all: switching it on and off is no business of threads that share a tokenizer.
        self._cutting = load_tokenizer(file)
        self._cutting.enable_truncation(spec.max_length)
        self.max_length = spec.max_length
        self.pad_id = spec.pad_id

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return _size(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids with the tokenizer's own special ids, cut and filled up to int64 `(B, max_length)`."""
        ids = np.full((len(texts), self.max_length), self.pad_id, dtype=np.int64)
        for row, encoding in zip(ids, self._cutting.encode_batch(list(texts)), strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return ids

    def bare_ids(self, text: str) -> list[int]:
        """The ids of `text` alone, without special ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special ids, stripped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@dataclasses.dataclass(frozen=True, slots=True)
class MarkedRow:
    """One sentence's ids, unpadded, and the positions of `[E1]` and `[E2]` among them."""

    ids: list[int]
    head: int
    tail: int


class EntityMarkedTokenizer:
    """Ids of sentences with markers around the head's and the tail's mention (Baldini Soares et al. 2019).

    `[CLS] Tim Cook leads Apple [SEP]` becomes `[CLS] [E1] Tim Cook [/E1] leads [E2] Apple [/E2] [SEP]`; mentions may
    overlap, nest, or stand in either order. Words that happen to read `[E1]` or `[SEP]` stay plain text.

    Args:
        tokenizer: any fast tokenizer; the markers are added to it where it lacks them.
        max_length: ids a row may hold, markers and special ids included.
        pad_id: fills up shorter rows; by default the tokenizer's own.

    Raises:
        ModelFolderError: the tokenizer has no padding id and none was given, or `max_length` leaves no room.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int, pad_id: int | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._frame = _frame(tokenizer)  # before the switch below, which would split the special ids
        _add_markers(tokenizer)
        _separate_words(tokenizer)
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._markers = tuple(vocabulary[marker] for marker in MARKERS)
        self.max_length = max_length
        self.pad_id = _pad_id(tokenizer) if pad_id is None else pad_id
        self._room = max_length - len(self._frame[0]) - len(self._frame[1]) - len(MARKERS)
        if self._room < 2:
            raise ModelFolderError(f"max_length {max_length} leaves no room for words; expected at least 16")

    @classmethod
    def from_file(cls, path: Path | str, max_length: int, pad_id: int | None = None) -> EntityMarkedTokenizer:
        """Read a `tokenizer.json`. Raises as `load_tokenizer` and the class."""
        return cls(load_tokenizer(path), max_length, pad_id)

    @classmethod
    def from_spec(cls, spec: TokenizerSpec, folder: Path | str) -> EntityMarkedTokenizer:
        """The tokenizer of a bundle's classifier; `folder` is what `spec.file` is relative to."""
        return cls.from_file(Path(folder) / spec.file, spec.max_length, spec.pad_id)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id, markers included: the rows that the embedding needs."""
        return _size(self._tokenizer)

    def save(self, path: Path | str) -> None:
        """Write the `tokenizer.json`, markers included, the whole file or nothing."""
        atomic_bytes(Path(path), self._tokenizer.to_str(pretty=True).encode("utf-8"))

    def encode(self, samples: Sequence[Sample]) -> dict[str, NDArray[np.int64]]:
        """Ids of sentences; T is the longest row's length, at most `max_length`.

        A row that is too long loses words outside the mentions, the farthest first; then words between them; then
        the ends of the mentions; never a marker.

        Returns:
            `input_ids`, `attention_mask`: int64 `(B, T)`. `head_index`, `tail_index`: int64 `(B,)`, the positions
            of `[E1]` and `[E2]`.
        """
        return self.collate(self.rows(samples))

    def collate(self, rows: Sequence[MarkedRow]) -> dict[str, NDArray[np.int64]]:
        """The arrays of `encode` from rows made before."""
        width = max((len(row.ids) for row in rows), default=0)
        input_ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.ids)] = row.ids
            attention_mask[index, : len(row.ids)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "head_index": np.array([row.head for row in rows], dtype=np.int64),
            "tail_index": np.array([row.tail for row in rows], dtype=np.int64),
        }

    def rows(self, samples: Sequence[Sample]) -> list[MarkedRow]:
        """Each sample's ids, shortened to `max_length`, to sort by length or to keep between epochs."""
        words = [list(sample.tokens) for sample in samples]
        encodings = self._tokenizer.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
        rows = []
        for sample, encoding in zip(samples, encodings, strict=True):
            pieces: list[list[int]] = [[] for _ in sample.tokens]
            for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word is not None:
                    pieces[word].append(piece)
            _shorten(pieces, sample.head, sample.tail, self._room)
            rows.append(self._marked(pieces, sample.head, sample.tail))
        return rows

    def _marked(self, pieces: list[list[int]], head: Span, tail: Span) -> MarkedRow:
        ids = list(self._frame[0])
        place = {}
        marks = _marks_by_boundary(head, tail)
        for boundary in range(len(pieces) + 1):
            for marker in marks.get(boundary, ()):
                place[marker] = len(ids)
                ids.append(self._markers[marker])
            if boundary < len(pieces):
                ids.extend(pieces[boundary])
        return MarkedRow(ids + self._frame[1], head=place[0], tail=place[2])


def _size(tokenizer: tokenizers.Tokenizer) -> int:
    # Not get_vocab_size(): some vocabularies have holes.
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def _frame(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a")
    plain = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    if not plain:
        return list(encoding.ids), []
    return list(encoding.ids[: plain[0]]), list(encoding.ids[plain[-1] + 1 :])


def _add_markers(tokenizer: tokenizers.Tokenizer) -> None:
    missing = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    tokenizer.add_special_tokens([tokenizers.AddedToken(marker, normalized=False, special=True) for marker in missing])


def _separate_words(tokenizer: tokenizers.Tokenizer) -> None:
    # Byte-level BPE marks a word's start by the space before it, which words given one by one lack.
    if isinstance(tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = True


def _pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    for name in _PADS:
        pad_id = tokenizer.token_to_id(name)
        if pad_id is not None:
            return int(pad_id)
    raise ModelFolderError(f"the tokenizer has none of {', '.join(_PADS)}; give the id to pad with")


def _marks_by_boundary(head: Span, tail: Span) -> dict[int, list[int]]:
    """Indices into MARKERS by the word boundary they stand at, in order.

    What ends at a boundary is closed before anything opens there; the longer of two that open together opens
    first and closes last; the head counts as the longer where both are equal.
    """
    spans = sorted(((head, 0), (tail, 2)), key=lambda item: (item[0].start, -item[0].end, item[1]))
    marks: dict[int, list[int]] = {}
    for span, opening in sorted(spans, key=lambda item: (item[0].end, -item[0].start, -item[1])):
        marks.setdefault(span.end, []).append(opening + 1)
    for span, opening in spans:
        marks.setdefault(span.start, []).append(opening)
    return marks


def _shorten(pieces: list[list[int]], head: Span, tail: Span, room: int) -> None:
    """Empty words in place until at most `room` ids are left."""
    excess = sum(map(len, pieces)) - room
    if excess <= 0:
        return
    first, last = min(head.start, tail.start), max(head.end, tail.end)

    def distance(word: int) -> int:
        return min(max(span.start - word, word - span.end + 1, 0) for span in (head, tail))

    def urgency(word: int) -> tuple[bool, int, int]:
        return (first <= word < last, -distance(word), -word)

    for word in sorted((word for word in range(len(pieces)) if distance(word)), key=urgency):
        if excess <= 0:
            return
        excess -= len(pieces[word])
        pieces[word] = []
    while excess > 0:
        longest = max(range(len(pieces)), key=lambda word: (len(pieces[word]), word))
        pieces[longest].pop()
        excess -= 1
