"""The figures of a store that is there already, from when its files were written."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pyarrow.parquet as pq

from mi2rage_benchmarks.cost import CostFigures
from mi2rage_engines.errors import DataError, InputError
from mi2rage_training.store import MANIFEST_NAME, SETTINGS_NAME, StoreManifest, read_manifest

__all__ = ["figures_of_store", "kept_share_of"]

_SCORES = "scores.parquet"
"""What `select` writes beside its store; its own module would load PyTorch."""
_PAUSE = 5.0
"""A gap between two shards of so many times the usual one is a pause."""
_LEAST_GAP_S = 0.01
"""Files that follow each other faster were copied, not made."""


def figures_of_store(folder: Path) -> CostFigures:
    """What making a store took, by the times of its files: a shard's is written when it is done.

    A run that stood still, or was interrupted and went on, leaves a gap much longer than the others, which is left
    out. The times are gone where the files were copied without them; then this is refused.

    Raises:
        DataError: it is no finished store, or its files' times are not those of a run.
        InputError: it is a store of another step than `synthesize`.
    """
    manifest = read_manifest(folder)
    step = manifest.settings.get("step")
    if step != "synthesize":
        raise InputError(
            f"{folder}: was written by {step!r}; expected a store that 'synthesize' made, whose shards took time; give "
            "that one, and this one with --selected where it holds what was kept"
        )
    times = {name: (folder / name).stat().st_mtime for name in manifest.shards}
    begun, ended = ((folder / name).stat().st_mtime for name in (SETTINGS_NAME, MANIFEST_NAME))
    ordered = sorted(manifest.shards, key=lambda name: times[name])
    gaps = [after - before for before, after in itertools.pairwise([begun, *(times[name] for name in ordered)])]
    usual = statistics.median(gaps)
    if not begun <= min(times.values()) or not max(times.values()) <= ended or usual < _LEAST_GAP_S:
        raise DataError(
            f"{folder}: its files' times are not those of a run: settings first, shards one after the other, manifest "
            "last; they were copied, it seems, which loses the times; give the original, or a bundle to measure with"
        )
    held = [pq.read_metadata(folder / name).num_rows for name in ordered]
    # The first gap has the start of the stages in it; a store of one shard has nothing else.
    first = 1 if len(gaps) > 1 else 0
    kept = [(gap, rows) for gap, rows in zip(gaps[first:], held[first:], strict=True) if gap <= _PAUSE * usual and rows]
    if not kept:
        raise DataError(f"{folder}: has no shard with candidates whose time is known; give another store, or a bundle")
    pace = sum(gap for gap, _ in kept) / sum(rows for _, rows in kept)
    return CostFigures(
        origin=f"the times of the files of {folder}",
        device="not recorded in the store",
        chain=_chain(manifest),
        texts=_texts(manifest),
        candidates=manifest.rows,
        fill_s=max(0.0, gaps[0] - pace * held[0]) if first and gaps[0] <= _PAUSE * usual else 0.0,
        shards_s=tuple(gap for gap, _ in kept),
        shards_candidates=tuple(rows for _, rows in kept),
        pauses=sum(gap > _PAUSE * usual for gap in gaps),
    )


def _texts(manifest: StoreManifest) -> int:
    """Of the shards that are there: a budget ends a store before the last."""
    settings = manifest.settings
    return min(int(settings["samples"]), len(manifest.shards) * int(settings["chain"]["shard_size"]))


def _chain(manifest: StoreManifest) -> dict[str, object]:
    wanted = ("links", "width", "shard_size", "image_format")
    chain = manifest.settings.get("chain", {})
    models = manifest.settings.get("models", {})
    steps = {"steps": models["steps"]} if "steps" in models else {}
    return {name: chain[name] for name in wanted if name in chain} | steps


def kept_share_of(folder: Path) -> float:
    """The share of its candidates that a store of `select` keeps.

    Raises:
        DataError: it is no finished store, or keeps nothing.
        InputError: it is a store of another step.
    """
    manifest = read_manifest(folder)
    scores = folder / _SCORES
    if manifest.settings.get("step") != "select" or not scores.is_file():
        raise InputError(
            f"{folder}: is no store that 'select' wrote; expected one, which says what is kept of how many"
        )
    if not manifest.rows:
        raise DataError(f"{folder}: keeps no candidate; expected some, for nothing can be planned by none")
    return manifest.rows / int(pq.read_metadata(scores).num_rows)
