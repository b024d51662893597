"""Whether a store is whole: every shard read and compared with the manifest, or with its own checksums."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mi2rage_engines.bundle import FileRecord
from mi2rage_rt.progress import track
from mi2rage_training.store import READERS
from mi2rage_training.store_files import Files, StorePlace, files_at
from mi2rage_training.store_manifest import MANIFEST_NAME, is_store, read_manifest, record_of
from mi2rage_training.store_rows import rows_if_whole

__all__ = ["StoreCheck", "check_store"]


@dataclasses.dataclass(frozen=True, slots=True)
class StoreCheck:
    """What is wrong with a store.

    Attributes:
        finished: whether it has its manifest.
        shards: how many there should be; of an unfinished store, how many there are.
        rows: in the shards that are whole.
        damaged: shards that are not what the manifest says, or without one break their own checksums.
        missing: shards of the manifest that are not there.
        extra: shards that the manifest does not know; other programs may read them with the rest.
    """

    store: str
    finished: bool
    shards: int
    rows: int
    damaged: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is finished and nothing is wrong."""
        return self.finished and not (self.damaged or self.missing or self.extra)

    def described(self) -> str:
        """Some lines for people."""
        lines = [f"{kind}: {name}" for kind in ("damaged", "missing", "extra") for name in getattr(self, kind)]
        count = f"{self.shards:,} shards, {self.rows:,} candidates"
        if self.whole:
            return f"{self.store}: whole; {count}"
        if not self.finished:
            lines.append(f"{self.store}: is not finished; {count} so far; give the command that makes it again")
        if self.damaged or self.missing:
            lines.append(f"{self.store}: give the command that made the store again, and it makes these shards again")
        if self.extra:
            lines.append(f"{self.store}: extra shards are no part of the store; move them away")
        return "\n".join(lines)


def check_store(place: StorePlace) -> StoreCheck:
    """Read every shard of a store, finished or not, several at a time.

    Raises:
        DataError: there is no store, or its manifest is damaged.
    """
    files = files_at(place)
    there = [name for name in sorted(files.names()) if name.startswith("shard-") and name.endswith(".parquet")]
    finished = MANIFEST_NAME in files.names() or not is_store(place)  # what is no store, `read_manifest` refuses
    records = read_manifest(place).shards if finished else {}
    expected = list(records) if finished else there
    rows = _rows_of(files, [name for name in expected if name in there], records)
    return StoreCheck(
        store=str(place),
        finished=finished,
        shards=len(expected),
        rows=sum(count for count in rows.values() if count is not None),
        damaged=tuple(name for name, count in rows.items() if count is None),
        missing=tuple(name for name in expected if name not in there),
        extra=tuple(name for name in there if name not in expected),
    )


def _rows_of(files: Files, names: Sequence[str], records: Mapping[str, FileRecord]) -> dict[str, int | None]:
    """The rows of each shard, None for one that is damaged."""

    def rows(name: str) -> int | None:
        content = files.read(name)
        return rows_if_whole(content) if record_of(content) == records.get(name, record_of(content)) else None

    with ThreadPoolExecutor(READERS, thread_name_prefix="store-check") as pool:
        return dict(zip(names, track(pool.map(rows, names), "verify", len(names)), strict=True))
