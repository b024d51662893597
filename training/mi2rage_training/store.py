"""The store of synthetic pairs: Parquet shards with the images as encoded bytes, and one manifest.

`store_rows` has the columns, `store_files` where a store may be. A shard is the unit of commit and resume.
`settings.json` is written first: a run of other settings is refused. `manifest.json` is written last, with the hash of
each shard, so a store without it is unfinished; the shards of such a store check themselves by their pages' checksums.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.progress import track
from mi2rage_training.store_files import Files, LocalFiles, StorePlace, files_at
from mi2rage_training.store_rows import (
    Candidate,
    bytes_from_candidates,
    candidates_from_table,
    rows_if_whole,
    table_from,
)

__all__ = [
    "Candidate",
    "StoreManifest",
    "StorePlace",
    "StoreWriter",
    "is_store",
    "read_columns",
    "read_manifest",
    "read_shard",
    "read_store",
    "record_of",
    "set_aside",
    "shard_name",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
SETTINGS_NAME = "settings.json"

READERS = 8
"""Shards that are checked at a time; where they are far away, waiting for them is all it takes."""


class StoreManifest(BaseModel):
    """`manifest.json`: what was run, and every shard with its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    settings: dict[str, Any]
    rows: int
    shards: dict[str, FileRecord]


def shard_name(index: int) -> str:
    """The file of shard `index`."""
    return f"shard-{index:05d}.parquet"


def is_store(place: StorePlace) -> bool:
    """Whether `place` is a folder or an address that a store was begun or finished at."""
    files = files_at(place)
    if isinstance(files, LocalFiles) and not files.folder.is_dir():
        return False
    return not files.names().keys().isdisjoint((SETTINGS_NAME, MANIFEST_NAME))


def record_of(content: bytes) -> FileRecord:
    """What the manifest says of a shard with this content."""
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _is_draft(name: str) -> bool:
    """Whether a local file is what a process that was killed had begun to write."""
    return name.startswith((f".{SETTINGS_NAME}.", f".{MANIFEST_NAME}.", ".shard-"))


def set_aside(place: StorePlace) -> Path | None:
    """Rename the store in a local folder to the first free of `NAME.1`, `NAME.2`, ..., which is returned.

    None is returned where there is no store; what is there then is for `StoreWriter` to refuse.

    Raises:
        InputError: the store is no local folder: objects cannot be renamed, only copied one by one.
    """
    files = files_at(place)
    if not is_store(place):
        return None
    if not isinstance(files, LocalFiles):
        raise InputError(
            f"{place}: a store is there; expected a local folder for a new run beside an old one, for elsewhere a "
            "store cannot be renamed; give another address"
        )
    folder = files.folder.absolute()
    for number in itertools.count(1):
        new = folder.with_name(f"{folder.name}.{number}")
        if not new.exists():
            break
    return folder.rename(new)


class StoreWriter:
    """Writes a store shard by shard; what is written stays, and a second run with the same settings goes on.

    Several may write to one place, in one process or in many, if no two write the same shard at a time.

    Args:
        folder: a folder, made if it is not there, or an address, see `store_files`.
        settings: what makes the rows; JSON values. A store begun with other settings is refused.

    Raises:
        InputError: `folder` holds something that is no store, or a store of other settings (the difference is named);
            or nothing can be written there.
    """

    def __init__(self, folder: StorePlace, settings: dict[str, Any]) -> None:
        self.files = files_at(folder)
        self.settings = settings
        self._records: dict[int, tuple[FileRecord, int]] = {}
        old = _settings_at(self.files)
        if old is None:
            others = {name for name in self.files.names() if not _is_draft(name)}
            # Another process may have begun the same store right now.
            old = _settings_at(self.files) if SETTINGS_NAME in others else None
            if old is None and others:
                raise InputError(f"{folder}: exists and is no store of candidates; give the name of a new folder")
        if old is not None:
            self._check_settings(old)
        else:
            self.files.write(SETTINGS_NAME, json.dumps(settings, indent=2, sort_keys=True).encode())

    def _check_settings(self, old: dict[str, Any]) -> None:
        differing = sorted(key for key in old.keys() | self.settings.keys() if old.get(key) != self.settings.get(key))
        if differing:
            changes = "; ".join(f"{key}: was {old.get(key)!r}, is {self.settings.get(key)!r}" for key in differing)
            raise InputError(
                f"{self.files}: was begun with other settings ({changes}); use the same to go on, or another folder"
            )

    @functools.cached_property
    def _finished(self) -> dict[str, FileRecord]:
        """The shards of a store that was finished already."""
        try:
            manifest = _manifest_in(self.files)
        except (FileNotFoundError, ValueError):  # there is none yet, or it is damaged and is written again
            return {}
        _check_version(self.files, manifest)
        return manifest.shards

    def has(self, index: int) -> bool:
        """Whether shard `index` is there and whole, by the manifest's hash or by its own checksums; reads all of it."""
        return index in self._records or self._take(index)

    def record(self, index: int) -> FileRecord | None:
        """Of shard `index`, None where `has` says that it is not there."""
        return self._records[index][0] if self.has(index) else None

    def _take(self, index: int) -> bool:
        name = shard_name(index)
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            return False
        record, rows = record_of(content), rows_if_whole(content)
        if rows is None or record != self._finished.get(name, record):
            logger.warning("%s: is damaged, and is to be made again", self.files.at(name))
            return False
        self._records[index] = record, rows
        return True

    def missing(self, shards: int) -> list[int]:
        """Those of shards 0 to `shards` - 1 that are not there or damaged; several are read at a time."""
        there = self.files.names()
        found = [index for index in range(shards) if index not in self._records and shard_name(index) in there]
        with ThreadPoolExecutor(READERS, thread_name_prefix="store-check") as pool:
            for _ in track(pool.map(self.has, found), "check", len(found)):
                pass
        return [index for index in range(shards) if index not in self._records]

    def write(self, index: int, candidates: Sequence[Candidate]) -> None:
        """Write shard `index`, whole or not at all; shards may be written from several threads at once.

        Raises:
            Mi2rageError: the disk is full, or the place cannot be reached; what was written stays.
        """
        self.put(index, bytes_from_candidates(candidates), len(candidates))

    def put(self, index: int, content: bytes, rows: int) -> None:
        """Write shard `index` from its bytes; raises as `write`."""
        self.files.write(shard_name(index), content)
        self._records[index] = record_of(content), rows

    def take_over(self, index: int, record: FileRecord, rows: int) -> None:
        """Know of a shard what the process that has just written it says; then `finish` need not read it."""
        self._records[index] = record, rows

    def finish(self, shards: int) -> StoreManifest:
        """Write the manifest over shards 0 to `shards` - 1; those that nothing is known of are read and checked.

        Raises:
            DataError: one of them is missing or damaged; it is named.
        """
        missing = self.missing(shards)
        if missing:
            raise DataError(
                f"{self.files}: {_named(missing)} missing or damaged; expected {shards} whole shards; give the same "
                "command again, and it makes them"
            )
        manifest = StoreManifest(
            schema_version=SCHEMA_VERSION,
            settings=self.settings,
            rows=sum(self._records[index][1] for index in range(shards)),
            shards={shard_name(index): self._records[index][0] for index in range(shards)},
        )
        self.files.write(MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())
        self.discard_drafts()
        return manifest

    def discard_drafts(self) -> None:
        """Delete what processes that were killed had begun to write; none may be writing at the time."""
        for name in filter(_is_draft, self.files.names()):
            self.files.remove(name)


def _named(indices: Sequence[int], most: int = 5) -> str:
    names = ", ".join(shard_name(index) for index in indices[:most])
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{names}{more} {'is' if len(indices) == 1 else 'are'}"


def _settings_at(files: Files) -> dict[str, Any] | None:
    """What a store was begun with, None where there is none."""
    try:
        settings: dict[str, Any] = json.loads(files.read(SETTINGS_NAME))
    except FileNotFoundError:
        return None
    except ValueError as error:
        where = files.at(SETTINGS_NAME)
        raise DataError(f"{where}: is damaged ({error}); make the store again in another folder") from error
    return settings


def _files(place: StorePlace | Files) -> Files:
    return files_at(place) if isinstance(place, Path | str) else place


def read_manifest(place: StorePlace | Files) -> StoreManifest:
    """The manifest of a finished store.

    Raises:
        DataError: there is none, or it is damaged.
    """
    files = _files(place)
    try:
        manifest = _manifest_in(files)
    except FileNotFoundError as error:
        begun = _settings_at(files) is not None
        state = "is not finished; run 'mi2rage-rt synthesize' again with the same settings" if begun else "is no store"
        raise DataError(
            f"{files}: {state}; expected a folder written by 'mi2rage-rt synthesize' or 'select'"
        ) from error
    except ValueError as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise DataError(
            f"{files.at(MANIFEST_NAME)}: is damaged ({problem}); give the command that made the store again, and it "
            "writes it again"
        ) from error
    _check_version(files, manifest)
    return manifest


def _manifest_in(files: Files) -> StoreManifest:
    """Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    return StoreManifest.model_validate_json(files.read(MANIFEST_NAME).decode())


def _check_version(files: Files, manifest: StoreManifest) -> None:
    if manifest.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{files}: is a store of schema version {manifest.schema_version}; expected {SCHEMA_VERSION}; make it "
            "again with this version of mi2rage-rt, in another folder"
        )


def read_shard(files: Files, name: str, record: FileRecord) -> bytes:
    """A shard of a finished store.

    Raises:
        DataError: it is missing, or not what the manifest says.
    """
    try:
        content = files.read(name)
    except FileNotFoundError:
        content = b""
    if record_of(content) != record:
        raise DataError(
            f"{files.at(name)}: is missing or was changed since the store was written; give the command that made the "
            "store again, and it makes this shard again"
        )
    return content


def read_store(place: StorePlace) -> Iterator[Candidate]:
    """The candidates of a finished store, in order, one shard in memory at a time.

    Raises:
        DataError: the store is not finished, or a shard is missing or was changed; it is named.
    """
    files = files_at(place)
    for name, record in read_manifest(files).shards.items():
        yield from candidates_from_table(table_from(read_shard(files, name, record)))


def read_columns(place: StorePlace, names: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a finished store, a table for each shard, in order; the others are not read for it.

    Args:
        names: `image.path` is the one without the other part, `image.bytes`.

    Raises:
        DataError: the store is not finished, or what is read of a shard is missing or damaged.
    """
    files = files_at(place)
    for name in read_manifest(files).shards:
        try:
            with files.open(name) as file:
                table = table_from(file, names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{files.at(name)}: cannot be read ({error}); give the command that made the store again, and it makes "
                "what is missing or damaged again"
            ) from error
        yield table
