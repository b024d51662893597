"""The store of synthetic pairs: Parquet shards with the images as encoded bytes, and one manifest.

`store_rows` has the columns, `store_files` where a store may be. A shard is the unit of commit and resume.
`settings.json` is written first: a run of other settings is refused. `manifest.json` is written last, with the hash of
each shard, so a store without it is unfinished; the shards of such a store carry their own checksums.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.progress import track
from mi2rage_training.store_files import Files, StorePlace, files_at
from mi2rage_training.store_manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SETTINGS_NAME,
    StoreManifest,
    check_version,
    differences,
    is_draft,
    is_store,
    manifest_in,
    read_manifest,
    record_of,
    set_aside,
    settings_in,
    shard_name,
)
from mi2rage_training.store_rows import (
    COLUMNS_WITHOUT_IMAGES,
    Candidate,
    Candidates,
    batches_from,
    bytes_from_candidates,
    candidates_from,
    rows_if_whole,
    table_from,
)

__all__ = [
    "MANIFEST_NAME",
    "SETTINGS_NAME",
    "Candidate",
    "Candidates",
    "StoreManifest",
    "StorePlace",
    "StoreWriter",
    "StoredCandidates",
    "is_store",
    "read_columns",
    "read_manifest",
    "read_shard",
    "read_store",
    "read_tables",
    "record_of",
    "set_aside",
    "shard_name",
]

logger = logging.getLogger(__name__)

READERS = 4
"""Shards that are checked at a time, and in memory; where they are far away, waiting for them is most of it."""


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
        old = settings_in(self.files)
        if old is None:
            others = {name for name in self.files.names() if not is_draft(name)}
            # Another process may have begun the same store right now.
            old = settings_in(self.files) if SETTINGS_NAME in others else None
            if old is None and others:
                raise InputError(f"{folder}: exists and is no store of candidates; give the name of a new folder")
        if old is None:
            self.files.write(SETTINGS_NAME, json.dumps(settings, indent=2, sort_keys=True).encode())
        elif changes := differences(old, settings):
            raise InputError(
                f"{folder}: was begun with other settings ({changes}); use the same to go on, or another folder, or "
                "with 'synthesize' --new-run"
            )

    @functools.cached_property
    def _finished(self) -> dict[str, FileRecord]:
        """The shards of a store that was finished already, less those that are to be made again."""
        try:
            manifest = manifest_in(self.files)
        except (FileNotFoundError, ValueError):  # there is none yet, or it is damaged and is written again
            return {}
        check_version(self.files, manifest)
        return dict(manifest.shards)

    def has(self, index: int) -> bool:
        """Whether shard `index` is there and whole, by the manifest's hash or by its own checksums; reads all of it."""
        if index not in self._records:
            found = self._checked(index)
            if found is None:
                # Whoever makes it again now, its own checksums tell then whether it is whole.
                self._finished.pop(shard_name(index), None)
                return False
            self._records[index] = found
        return True

    def _checked(self, index: int) -> tuple[FileRecord, int] | None:
        """What the manifest is to say of shard `index`, and its rows; None where it is missing or damaged."""
        name = shard_name(index)
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            return None
        record, rows = record_of(content), rows_if_whole(content)
        if rows is None or record != self._finished.get(name, record):
            logger.warning("%s: is damaged, and is to be made again", self.files.at(name))
            return None
        return record, rows

    def record(self, index: int) -> FileRecord | None:
        """Of shard `index`, None where `has` says that it is not there."""
        return self._records[index][0] if self.has(index) else None

    def missing(self, shards: int) -> list[int]:
        """Those of shards 0 to `shards` - 1 that `has` says are not there; several are read at a time."""
        there = self.files.names()
        for name in self._finished.keys() - there.keys():
            del self._finished[name]
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
        for name in filter(is_draft, self.files.names()):
            self.files.remove(name)


def _named(indices: Sequence[int], most: int = 5) -> str:
    names = ", ".join(shard_name(index) for index in indices[:most])
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{names}{more} {'is' if len(indices) == 1 else 'are'}"


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
    for name, record in read_manifest(place).shards.items():
        yield from candidates_from(batches_from(read_shard(files, name, record)))


def read_tables(place: StorePlace) -> Iterator[pa.Table]:
    """All columns of a finished store, a table for each shard; raises as `read_store`."""
    files = files_at(place)
    for name, record in read_manifest(place).shards.items():
        yield table_from(read_shard(files, name, record))


class StoredCandidates:
    """The candidates of a finished store, read anew each time they are gone through; of the shards one is in memory.

    Args:
        images: off, nothing is read of the images, and `image` is empty and `via` None.

    Raises:
        DataError: here, the store is not finished; while it is gone through, as `read_store` and `read_columns`.
    """

    def __init__(self, place: StorePlace, *, images: bool = True) -> None:
        self.place = place
        self.images = images
        self._rows = read_manifest(place).rows

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Candidate]:
        if self.images:
            return read_store(self.place)
        tables = read_columns(self.place, COLUMNS_WITHOUT_IMAGES)
        return candidates_from(batch for table in tables for batch in table.to_batches())

    def by_shard(self) -> Iterator[Iterator[Candidate]]:
        """Those of each shard, with their images."""
        files = files_at(self.place)
        for name, record in read_manifest(self.place).shards.items():
            yield candidates_from(batches_from(read_shard(files, name, record)))

    def without_images(self) -> StoredCandidates:
        """The same, with nothing read of the images."""
        return StoredCandidates(self.place, images=False)


def read_columns(place: StorePlace, names: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a finished store, a table for each shard, in order; the others are not read for it.

    Args:
        names: `image.path` is the one without the other part, `image.bytes`.

    Raises:
        DataError: the store is not finished, or what is read of a shard is missing or damaged.
    """
    files = files_at(place)
    for name in read_manifest(place).shards:
        try:
            with files.open(name) as file:
                table = table_from(file, names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{files.at(name)}: cannot be read ({error}); give the command that made the store again, and it makes "
                "what is missing or damaged again"
            ) from error
        yield table
