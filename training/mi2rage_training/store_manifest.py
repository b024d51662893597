"""What a store says of itself: its settings, written first, and its manifest, written last."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.validation import first_problem
from mi2rage_training.store_files import Files, LocalFiles, StorePlace, files_at

__all__ = [
    "MANIFEST_NAME",
    "NOTE_SUFFIX",
    "SCHEMA_VERSION",
    "SETTINGS_NAME",
    "StoreManifest",
    "check_version",
    "differences",
    "flat",
    "is_draft",
    "is_store",
    "manifest_in",
    "note_name",
    "read_manifest",
    "record_of",
    "set_aside",
    "settings_in",
    "shard_name",
]

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
SETTINGS_NAME = "settings.json"
NOTE_SUFFIX = ".left-out.jsonl"

_DRAFTS = (f".{SETTINGS_NAME}.", f".{MANIFEST_NAME}.", ".shard-", ".scores.")
_MOST_DIFFERENCES = 8


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


def note_name(shard: str) -> str:
    """The file beside a shard that names the real samples of which nothing could be made."""
    return shard.removesuffix(".parquet") + NOTE_SUFFIX


def is_draft(name: str) -> bool:
    """Whether a local file is what a process that was killed had begun to write."""
    return name.startswith(_DRAFTS)


def record_of(content: bytes) -> FileRecord:
    """What the manifest says of a shard with this content."""
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def is_store(place: StorePlace) -> bool:
    """Whether `place` is a folder or an address that a store was begun or finished at."""
    files = files_at(place)
    if isinstance(files, LocalFiles) and not files.folder.is_dir():
        return False
    return not files.names().keys().isdisjoint((SETTINGS_NAME, MANIFEST_NAME))


def settings_in(files: Files) -> dict[str, Any] | None:
    """What a store was begun with, None where there is none.

    Raises:
        DataError: they cannot be read.
    """
    try:
        settings: dict[str, Any] = json.loads(files.read(SETTINGS_NAME))
    except FileNotFoundError:
        return None
    except ValueError as error:
        where = files.at(SETTINGS_NAME)
        raise DataError(f"{where}: is damaged ({error}); make the store again in another folder") from error
    return settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings inside settings by dotted names, e.g. `chain.links`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], words: str = "{name}: was {old!r}, is {new!r}") -> str:
    """In what settings differ, each in `words`; nothing where they are the same."""
    one, two = flat(old), flat(new)
    names = sorted(
        (name for name in one.keys() | two.keys() if one.get(name) != two.get(name)),
        key=lambda name: (name != "step", name),
    )
    told = [words.format(name=name, old=one.get(name), new=two.get(name)) for name in names[:_MOST_DIFFERENCES]]
    more = len(names) - len(told)
    return "; ".join([*told, f"and {more:,} more"] if more else told)


def manifest_in(files: Files) -> StoreManifest:
    """The manifest as it is there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return StoreManifest.model_validate_json(files.read(MANIFEST_NAME).decode())


def check_version(files: Files, manifest: StoreManifest) -> None:
    """Raises DataError where the store was written by another version."""
    if manifest.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{files}: is a store of schema version {manifest.schema_version}; expected {SCHEMA_VERSION}; make it "
            "again with this version of mi2rage-rt, in another folder"
        )


def read_manifest(place: StorePlace) -> StoreManifest:
    """The manifest of a finished store.

    Raises:
        DataError: there is none, or it is damaged.
    """
    files = files_at(place)
    try:
        manifest = manifest_in(files)
    except FileNotFoundError as error:
        begun = settings_in(files) is not None
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
    check_version(files, manifest)
    return manifest


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
