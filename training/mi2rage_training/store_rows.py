"""The rows of a store: candidates, and how a shard's Parquet bytes come from them and are checked.

Columns: `id`, `tokens`, `text`, `head`, `tail` (token offsets), `label`, `image` (struct of `bytes` and `path`, as the
Image feature of Hugging Face `datasets` has it), `made` (`image` or `text`: which of the two is not real), `prompt`
(what it was made from), `caption` (what the captioner wrote), `via` (the made image that a text of a later link
describes), `parent` (the real sample), `made_from` (the candidate or real sample right before), `link`, `child`,
`seed`, `models` (JSON), and, once scored, `information_nats`, `added_nats`, and the training `weight`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mi2rage_rt.samples import Provenance, Sample, Span

__all__ = [
    "COLUMNS_WITHOUT_IMAGES",
    "SCHEMA",
    "Candidate",
    "Candidates",
    "batches_from",
    "bytes_from_candidates",
    "bytes_from_table",
    "candidates_from",
    "rows_if_whole",
    "table_from",
]

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("text", pa.string()),
        ("head", pa.list_(pa.int32())),
        ("tail", pa.list_(pa.int32())),
        ("label", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("made", pa.string()),
        ("prompt", pa.string()),
        ("caption", pa.string()),
        ("via", pa.binary()),
        ("parent", pa.string()),
        ("made_from", pa.string()),
        ("link", pa.int32()),
        ("child", pa.int32()),
        ("seed", pa.int64()),
        ("models", pa.string()),
        ("information_nats", pa.float64()),
        ("added_nats", pa.float64()),
        ("weight", pa.float64()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)

COLUMNS_WITHOUT_IMAGES = (*(name for name in SCHEMA.names if name not in ("image", "via")), "image.path")

_DIGEST = b"mi2rage_sha256"
"""Entry of a shard's footer: the hash of all its bytes, itself taken as zeros."""
_MARK = _DIGEST + b"\x18\x40"
"""As Thrift's compact protocol writes its name; then come the 64 digits."""
_BLANK = b"0" * 64
_BATCH_ROWS = 64
"""That are Python objects at a time; an image is copied into each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A real sentence with a made image, or a made sentence with a real image, and how it came about.

    Attributes:
        sample: with provenance; its `image` is the file name inside the store.
        image: the encoded image (PNG, JPEG, ...).
        prompt: what the image was drawn from, or the prefix of the text.
        caption: what the captioner saw in the made image; for a made text the text itself.
        made: `image` or `text`.
        via: the encoded image that a text of link 2 or later describes, else None.
        information_nats, added_nats: the teacher's scores, once there are any (see `teacher`).
        weight: of the candidate in training, once there is any; its mean over the siblings is 1.
    """

    sample: Sample
    image: bytes
    prompt: str
    caption: str | None = None
    made: str = "image"
    via: bytes | None = None
    information_nats: float | None = None
    added_nats: float | None = None
    weight: float | None = None

    @property
    def provenance(self) -> Provenance:
        """Where the candidate came from; every candidate has one."""
        assert self.sample.provenance is not None
        return self.sample.provenance


class Candidates(Protocol):
    """Candidates that may be gone through more than once: a list, or those of a store."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Candidate]: ...


def _row(candidate: Candidate) -> dict[str, Any]:
    sample, origin = candidate.sample, candidate.provenance
    return {
        "id": sample.id,
        "tokens": list(sample.tokens),
        "text": sample.text,
        "head": [sample.head.start, sample.head.end],
        "tail": [sample.tail.start, sample.tail.end],
        "label": sample.label,
        "image": {"bytes": candidate.image, "path": sample.image},
        "made": candidate.made,
        "prompt": candidate.prompt,
        "caption": candidate.caption,
        "via": candidate.via,
        "parent": origin.parent,
        "made_from": origin.made_from,
        "link": origin.link,
        "child": origin.child,
        "seed": origin.seed,
        "models": json.dumps(origin.models, sort_keys=True),
        "information_nats": candidate.information_nats,
        "added_nats": candidate.added_nats,
        "weight": candidate.weight,
    }


def _candidate(row: dict[str, Any]) -> Candidate:
    provenance = Provenance(
        row["parent"], row["link"], row["child"], row["seed"], json.loads(row["models"]), row["made_from"]
    )
    sample = Sample(
        id=row["id"],
        tokens=tuple(row["tokens"]),
        head=Span(*row["head"]),
        tail=Span(*row["tail"]),
        label=row["label"],
        image=row["image"]["path"],
        provenance=provenance,
    )
    return Candidate(
        sample,
        row["image"].get("bytes", b""),
        row["prompt"],
        row["caption"],
        made=row["made"],
        via=row.get("via"),
        information_nats=row["information_nats"],
        added_nats=row["added_nats"],
        weight=row["weight"],
    )


def bytes_from_candidates(candidates: Sequence[Candidate]) -> bytes:
    """A shard; the same candidates give the same bytes."""
    return bytes_from_table(pa.Table.from_pylist([_row(candidate) for candidate in candidates], schema=SCHEMA))


def bytes_from_table(table: pa.Table) -> bytes:
    """A shard of these rows, in the columns of `SCHEMA`. Its pages carry checksums, the footer one of all bytes."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table.combine_chunks())
        writer.add_key_value_metadata({_DIGEST: _BLANK})
    content = bytearray(buffer.getvalue())
    place = content.rindex(_MARK + _BLANK) + len(_MARK)
    content[place : place + len(_BLANK)] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def _opened(source: bytes | IO[bytes]) -> pq.ParquetFile:
    file = pa.BufferReader(source) if isinstance(source, bytes) else source
    return pq.ParquetFile(file, page_checksum_verification=True)


def table_from(source: bytes | IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of a shard, or all; `image.path` is a part of one.

    Raises:
        pa.ArrowException or OSError: what is read of it is damaged.
    """
    return _opened(source).read(columns=columns and list(columns))


def batches_from(content: bytes) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, some at a time; raises as `table_from`."""
    yield from _opened(content).iter_batches(_BATCH_ROWS)


def rows_if_whole(content: bytes) -> int | None:
    """The rows of a shard, None where it is damaged or of another schema."""
    place = content.rfind(_MARK) + len(_MARK)
    marked = place >= len(_MARK)
    if marked and not _has_digest(content, place):  # before anything of it is parsed
        return None
    try:
        # Not read_metadata(...).schema.to_arrow_schema(), which leaks in pyarrow 26.
        file = _opened(content)
        if not file.schema_arrow.equals(SCHEMA):
            return None
        if marked:
            return int(file.metadata.num_rows)
        # Shards of earlier releases had two entries, none of them a digest.
        old = len(file.metadata.metadata or {}) == 2
        return sum(int(batch.num_rows) for batch in file.iter_batches(_BATCH_ROWS)) if old else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def _has_digest(content: bytes, place: int) -> bool:
    """Whether what stands at `place` is the hash of all other bytes."""
    end = place + len(_BLANK)
    found = hashlib.sha256(memoryview(content)[:place])
    found.update(_BLANK)
    found.update(memoryview(content)[end:])
    return found.hexdigest().encode() == content[place:end]


def candidates_from(batches: Iterable[pa.RecordBatch]) -> Iterator[Candidate]:
    """The candidates of some rows of a shard; where they were read without images, their `image` is empty."""
    for batch in batches:
        yield from map(_candidate, batch.to_pylist())
