"""What a finished store holds, counted in one pass with one shard in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from array import array
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image as PilImage

from mi2rage_rt.progress import track
from mi2rage_training.store import StorePlace, read_manifest, read_shard
from mi2rage_training.store_files import files_at
from mi2rage_training.store_rows import batches_from

__all__ = ["StoreStats", "stats_of_store"]

_SCORES = ("information_nats", "added_nats", "weight")
_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_SIZES_SHOWN = 8


@dataclasses.dataclass(slots=True)
class StoreStats:
    """Counts of a store.

    Attributes:
        step: what wrote it, e.g. `synthesize`.
        parents: real samples that have a candidate.
        store_bytes, image_bytes, via_bytes: of the shards, of the images in them, and of the images between two texts.
        labels, links, made: candidates of each label, link, and kind of what was made (`image`, `text`).
        formats: images of each format, `unreadable` for those that are none.
        sizes: images of each size, width and height in pixels.
        repeated_images: made images whose bytes an earlier one has.
        repeated_captions: captions (texts, where texts were made) that an earlier sibling has.
        scores: of each score that there is: how many candidates have it, and quantiles.
    """

    store: str
    step: str
    shards: int
    rows: int = 0
    parents: int = 0
    store_bytes: int = 0
    image_bytes: int = 0
    via_bytes: int = 0
    labels: Counter[str] = dataclasses.field(default_factory=Counter)
    links: Counter[int] = dataclasses.field(default_factory=Counter)
    made: Counter[str] = dataclasses.field(default_factory=Counter)
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    sizes: Counter[str] = dataclasses.field(default_factory=Counter)
    repeated_images: int = 0
    repeated_captions: int = 0
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """JSON values, the most frequent first."""
        counts = {name: dict(getattr(self, name).most_common()) for name in ("labels", "made", "formats", "sizes")}
        return {**dataclasses.asdict(self), **counts, "links": dict(sorted(self.links.items()))}

    def described(self) -> str:
        """Some lines for people."""
        sizes = self.sizes.most_common(_SIZES_SHOWN)
        rest = len(self.sizes) - len(sizes)
        lines = {
            "store": f"{self.store} ({self.step})",
            "candidates": f"{self.rows:,} of {self.parents:,} real samples, in {self.shards:,} shards",
            "bytes": f"{self.store_bytes:,}; images {self.image_bytes:,}"
            + (f", between texts {self.via_bytes:,}" if self.via_bytes else ""),
            "made": _shares(self.made.most_common()),
            "links": _shares(sorted(self.links.items())),
            "formats": _shares(self.formats.most_common()),
            "sizes": _shares(sizes) + (f", {rest:,} more sizes" if rest else ""),
            "repeated": f"{self.repeated_images:,} images, {self.repeated_captions:,} captions among siblings",
        }
        for name, found in self.scores.items():
            spread = "  ".join(f"{key} {found[key]:.3f}" for key in _QUANTILES)
            lines[name.replace("_", " ")] = f"{int(found['count']):,} candidates: {spread}"
        labels = [f"{label:>44}  {count:,}" for label, count in self.labels.most_common()]
        return "\n".join([*(f"{name:>20}  {words}" for name, words in lines.items()), f"{'labels':>20}", *labels])


def _shares(counts: list[tuple[Any, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts) or "none"


def stats_of_store(place: StorePlace) -> StoreStats:
    """Count what a finished store holds.

    Of each candidate three hashes and its scores are held, 8 bytes each; images are identified, not decoded.

    Raises:
        DataError: it is not finished, or damaged.
    """
    files, manifest = files_at(place), read_manifest(place)
    found = StoreStats(str(place), str(manifest.settings.get("step", "unknown")), len(manifest.shards))
    parents, images, captions = (array("Q") for _ in range(3))
    scores = {name: array("d") for name in _SCORES}
    for name, record in track(manifest.shards.items(), "stats", len(manifest.shards)):
        found.store_bytes += record.bytes
        for batch in batches_from(read_shard(files, name, record)):
            _count(batch, found)
            owners, words = batch["parent"].to_pylist(), batch["caption"].to_pylist()
            parents.extend(map(_hash, set(owners)))
            captions.extend(_hash(f"{owner}\x1f{said}") for owner, said in zip(owners, words, strict=True) if said)
            images.extend(_count_images(batch, found))
            for score, values in scores.items():
                values.extend(value for value in batch[score].to_pylist() if value is not None)
    found.parents = len(parents) - _repeated(parents)
    found.repeated_images, found.repeated_captions = _repeated(images), _repeated(captions)
    found.scores = {name: _spread(values) for name, values in scores.items() if values}
    return found


def _count(batch: pa.RecordBatch, found: StoreStats) -> None:
    found.rows += batch.num_rows
    found.labels.update("(none)" if label is None else label for label in batch["label"].to_pylist())
    found.links.update(batch["link"].to_pylist())
    found.made.update(batch["made"].to_pylist())
    found.via_bytes += sum(len(via) for via in batch["via"].to_pylist() if via is not None)


def _count_images(batch: pa.RecordBatch, found: StoreStats) -> list[int]:
    """Counts the images, and gives the hashes of the made ones."""
    hashes = []
    for image, made in zip(batch["image"].to_pylist(), batch["made"].to_pylist(), strict=True):
        content = image["bytes"]
        found.image_bytes += len(content)
        try:
            with PilImage.open(io.BytesIO(content)) as header:
                found.formats[str(header.format).lower()] += 1
                found.sizes[f"{header.width}x{header.height}"] += 1
        except OSError:
            found.formats["unreadable"] += 1
        if made == "image":
            hashes.append(_hash(content))
    return hashes


def _hash(content: str | bytes) -> int:
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _repeated(hashes: array[int]) -> int:
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64)))


def _spread(values: array[float]) -> dict[str, float]:
    quantiles = np.quantile(np.frombuffer(values, np.float64), list(_QUANTILES.values()))
    return {"count": len(values), **dict(zip(_QUANTILES, quantiles.tolist(), strict=True))}
