"""Stores of the same settings and different samples, joined into one: shards are copied, not made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import track
from mi2rage_training.store import StorePlace, StoreWriter, read_columns, read_shard
from mi2rage_training.store_files import Files, files_at
from mi2rage_training.store_manifest import StoreManifest, differences, flat, note_name, read_manifest, shard_name
from mi2rage_training.store_rows import rows_if_whole

__all__ = ["merge_stores"]

_MAY_DIFFER = ("samples", "samples_fingerprint", "source", "chain.seed")
"""Settings that say what a store is of, not how it was made."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Store:
    place: StorePlace
    files: Files
    manifest: StoreManifest

    def shards(self) -> Iterator[tuple[Files, str, FileRecord, bool]]:
        """Each shard, and whether there is a note beside it of what it lacks."""
        there = self.files.names()
        for name, record in self.manifest.shards.items():
            yield self.files, name, record, note_name(name) in there


def merge_stores(places: Sequence[StorePlace], out: StorePlace) -> StoreManifest:
    """Join finished stores into the store `out`, in the order given; what was interrupted goes on.

    The shards are copied as they are, one in memory at a time; of each candidate 8 bytes are held, to find ids that two
    stores share. The settings of `out` are `step: merge`, `of`: what the stores agree in, `stores`: what each is of.

    Args:
        places: two stores or more; merged ones may be merged again.

    Raises:
        InputError: fewer than two, settings that differ (they are named), ids that occur twice, or `out` is something
            else.
        DataError: a store is unfinished or damaged.
    """
    if len(places) < 2:
        raise InputError(f"stores: came {len(places)}; expected two or more to join; name them all")
    stores = [_Store(place, files_at(place), read_manifest(place)) for place in places]
    common = _agreed(stores)
    _refuse_shared_ids(stores)
    parts = [{"rows": store.manifest.rows, **_own(store.manifest.settings)} for store in stores]
    writer = StoreWriter(out, {"step": "merge", "of": common, "stores": parts})
    shards = [shard for store in stores for shard in store.shards()]
    for index, (files, name, record, noted) in enumerate(track(shards, "merge")):
        if writer.record(index) != record:
            _copy(writer, index, read_shard(files, name, record), files.at(name))
        if noted:
            writer.files.write(note_name(shard_name(index)), files.read(note_name(name)))
    return writer.finish(len(shards))


def _copy(writer: StoreWriter, index: int, content: bytes, origin: str) -> None:
    rows = rows_if_whole(content)
    if rows is None:
        raise DataError(
            f"{origin}: has other columns than a store of this version of mi2rage-rt; expected the same in all; make "
            "its store again"
        )
    writer.put(index, content, rows)


def _of(settings: dict[str, Any]) -> dict[str, Any]:
    """How a store was made, by dotted names; a merged one, as its parts were."""
    if settings.get("step") == "merge":
        return dict(settings["of"])
    made = flat({name: value for name, value in settings.items() if name not in _MAY_DIFFER})
    return {name: value for name, value in made.items() if name not in _MAY_DIFFER}


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    """What a store is of, apart from how it was made."""
    if settings.get("step") == "merge":
        return {"stores": settings["stores"]}
    seed = settings.get("chain", {}).get("seed")
    own = {name: settings[name] for name in _MAY_DIFFER if name in settings}
    return own if seed is None else {**own, "chain.seed": seed}


def _agreed(stores: Sequence[_Store]) -> dict[str, Any]:
    """What all stores were made with.

    Raises:
        InputError: a setting differs that says how a store was made.
    """
    first, *others = (_of(store.manifest.settings) for store in stores)
    for store, settings in zip(stores[1:], others, strict=True):
        if changes := differences(first, settings, "{name}: {old!r} and {new!r}"):
            raise InputError(
                f"{stores[0].place} and {store.place}: were made with different settings ({changes}); expected stores "
                "that differ in their samples and seeds alone; make one again with the settings of the other"
            )
    return first


def _ids(store: _Store) -> Iterator[str]:
    for table in read_columns(store.place, ("id",)):
        yield from table["id"].to_pylist()


def _hashes(store: _Store) -> NDArray[np.uint64]:
    return np.fromiter((seed_from(name) for name in _ids(store)), np.uint64)


def _refuse_shared_ids(stores: Sequence[_Store]) -> None:
    values, counts = np.unique(np.concatenate([_hashes(store) for store in stores]), return_counts=True)
    suspects = set(values[counts > 1].tolist())  # ids that two share, or whose hashes are equal by chance
    if not suspects:
        return
    seen: dict[str, StorePlace] = {}
    for store in stores:
        for name in _ids(store):
            if seed_from(name) not in suspects:
                continue
            if name in seen:
                raise InputError(
                    f"{seen[name]} and {store.place}: candidate {name!r} is in both; expected different samples in "
                    "each store; leave one store out, or make it of samples with other ids"
                )
            seen[name] = store.place
