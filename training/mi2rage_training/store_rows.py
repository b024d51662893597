"""The rows of a store: candidates, and how a shard's Parquet bytes come from them and are checked.

Columns: `id`, `tokens`, `text`, `head`, `tail` (token offsets), `label`, `image` (struct of `bytes` and `path`, as the
Image feature of Hugging Face `datasets` has it), `made` (`image` or `text`: which of the two is not real), `prompt`
(what it was made from), `caption` (what the captioner wrote), `via` (the made image that a text of a later link
describes), `parent` (the real sample), `made_from` (the candidate or real sample right before), `link`, `child`,
`seed`, `models` (JSON), and, once scored, `information_nats`, `added_nats`, and the training `weight`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mi2rage_rt.samples import Provenance, Sample, Span

__all__ = ["SCHEMA", "Candidate", "bytes_from_candidates", "candidates_from_table", "rows_if_whole", "table_from"]

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
    """A shard; the same candidates give the same bytes. Its pages carry checksums."""
    table = pa.Table.from_pylist([_row(candidate) for candidate in candidates], schema=SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def table_from(source: bytes | IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of a shard, or all; `image.path` is a part of one.

    Raises:
        pa.ArrowException or OSError: what is read of it is damaged.
    """
    file = pa.BufferReader(source) if isinstance(source, bytes) else source
    return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns and list(columns))


def rows_if_whole(content: bytes) -> int | None:
    """The rows of a shard, None where it is damaged or of another schema. Decodes all of it, but no image."""
    try:
        table = table_from(content)
    except (OSError, pa.ArrowException):
        return None
    return table.num_rows if table.schema.equals(SCHEMA) else None


def candidates_from_table(table: pa.Table) -> Iterator[Candidate]:
    """The candidates of a shard's table; where it was read without images, their `image` is empty."""
    for batch in table.to_batches(_BATCH_ROWS):
        yield from map(_candidate, batch.to_pylist())
