"""The store of synthetic pairs: Parquet shards with the images as encoded bytes, and one manifest.

Columns: `id`, `tokens`, `text`, `head`, `tail` (token offsets), `label`, `image` (struct of `bytes` and `path`, as the
Image feature of Hugging Face `datasets` has it), `made` (`image` or `text`: which of the two is not real), `prompt`
(what it was made from), `caption` (what the captioner wrote), `via` (the made image that a text of a later link
describes), `parent` (the real sample), `made_from` (the candidate or real sample right before), `link`, `child`,
`seed`, `models` (JSON), and, once scored, `information_nats`, `added_nats`, and the training `weight`.
A shard is the unit of commit and resume; `manifest.json` is written last, so a store without it is unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.bundle import FileRecord, sha256_of
from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.files import atomic_bytes, atomic_text
from mi2rage_rt.samples import Provenance, Sample, Span

__all__ = ["Candidate", "StoreManifest", "StoreWriter", "is_store", "read_columns", "read_manifest", "read_store"]

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
SETTINGS_NAME = "settings.json"

_SCHEMA = pa.schema(
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


class StoreManifest(BaseModel):
    """`manifest.json`: what was run, and every shard with its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    settings: dict[str, Any]
    rows: int
    shards: dict[str, FileRecord]


def is_store(path: Path) -> bool:
    """Whether `path` is a folder that a store was begun or finished in."""
    return (path / SETTINGS_NAME).is_file() or (path / MANIFEST_NAME).is_file()


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
        row["image"]["bytes"],
        row["prompt"],
        row["caption"],
        made=row["made"],
        via=row["via"],
        information_nats=row["information_nats"],
        added_nats=row["added_nats"],
        weight=row["weight"],
    )


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); make the store again in another folder") from error
    return settings


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


class StoreWriter:
    """Writes a store shard by shard; what is written stays, and a second run with the same settings goes on.

    Args:
        folder: made if it is not there.
        settings: what makes the rows; JSON values. A store begun with other settings is refused.

    Raises:
        InputError: `folder` holds something that is no store, or a store of other settings (the difference is named).
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self._records: dict[str, FileRecord] = {}
        begun = folder / SETTINGS_NAME
        if begun.is_file():
            self._check_settings(_settings_in(begun))
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is no store of candidates; give the name of a new folder")
        else:
            with atomic_text(begun) as file:
                json.dump(settings, file, indent=2, sort_keys=True)

    def _check_settings(self, old: dict[str, Any]) -> None:
        differing = sorted(key for key in old.keys() | self.settings.keys() if old.get(key) != self.settings.get(key))
        if differing:
            changes = "; ".join(f"{key}: was {old.get(key)!r}, is {self.settings.get(key)!r}" for key in differing)
            raise InputError(
                f"{self.folder}: was begun with other settings ({changes}); use the same to go on, or another folder"
            )

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.parquet"

    def has(self, index: int) -> bool:
        """Whether shard `index` is written and readable."""
        try:
            pq.read_metadata(self._shard(index))
        except (OSError, pa.ArrowInvalid):
            return False
        return True

    def write(self, index: int, candidates: Sequence[Candidate]) -> None:
        """Write shard `index`, whole or not at all; shards may be written from several threads at once."""
        table = pa.Table.from_pylist([_row(candidate) for candidate in candidates], schema=_SCHEMA)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        content = buffer.getvalue().to_pybytes()
        path = self._shard(index)
        atomic_bytes(path, content)
        self._records[path.name] = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))

    def finish(self, shards: int) -> StoreManifest:
        """Write the manifest over shards 0 to `shards` - 1, all of which are written."""
        paths = [self._shard(index) for index in range(shards)]
        manifest = StoreManifest(
            schema_version=SCHEMA_VERSION,
            settings=self.settings,
            rows=sum(pq.read_metadata(path).num_rows for path in paths),
            shards={path.name: self._records.get(path.name) or _record(path) for path in paths},
        )
        with atomic_text(self.folder / MANIFEST_NAME) as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
        return manifest


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a finished store.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        state = (
            "is not finished; run 'mi2rage-rt synthesize' again with the same settings"
            if is_store(folder)
            else "is no store"
        )
        raise DataError(f"{folder}: {state}; expected a folder written by 'mi2rage-rt synthesize' or 'select'")
    try:
        manifest = StoreManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DataError(f"{path}: is damaged ({first_problem(error)}); make the store again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is damaged ({error.reason}); make the store again") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{folder}: is a store of schema version {manifest.schema_version}; expected {SCHEMA_VERSION}; make it "
            "again with this version of mi2rage-rt"
        )
    return manifest


def read_store(folder: Path) -> Iterator[Candidate]:
    """The candidates of a finished store, in order, one shard in memory at a time.

    Raises:
        DataError: the store is not finished, or a shard is missing or was changed; it is named.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.shards.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
            raise DataError(f"{path}: is missing or was changed since the store was written; make the store again")
        for row in pq.read_table(path).to_pylist():
            yield _candidate(row)


def read_columns(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a finished store, a dict for each row, in order; the images are not read for it.

    Raises:
        DataError: the store is not finished.
    """
    manifest = read_manifest(folder)
    return [row for name in manifest.shards for row in pq.read_table(folder / name, columns=list(names)).to_pylist()]
