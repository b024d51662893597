"""What a sample costs on the host, whatever draws it, and where that bends a run on many GPUs.

    python -m tests.training.scale.host_costs [--rate 13.5] [--devices 1 8 64] [--samples 10000000]

Measures, on one core: encoding a picture of 512 x 512 px (smooth with some grain, as photos are) as PNG and JPEG, its
size, hashing shards, and the manifest of a run. Then, for devices that draw `--rate` images a second each (which is
given, not measured: `mi2rage-rt cost` measures it), the hours of a run, cores that encode, bytes a second into the
store, and what the manifest and the check of a resumed run take. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from mi2rage_engines.bundle import FileRecord
from mi2rage_training.store import StoreManifest

SHARD_ROWS = 96
"""32 samples in chains of three links, as `synthesize` has them by default."""


def seconds(call: Callable[[], object], least_s: float = 1.0) -> float:
    """The median processor time of a call, over calls for so long."""
    taken: list[float] = []
    while sum(taken) < least_s or len(taken) < 3:
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def picture(side: int = 512) -> Image.Image:
    """Smooth colours with a grain of 2 levels."""
    draws = np.random.default_rng(0)
    coarse = Image.fromarray(draws.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(np.clip(smooth + draws.normal(0, 2, smooth.shape), 0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=13.5)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--samples", type=int, default=10_000_000)
    given = parser.parse_args()

    image, kinds = (
        picture(),
        {"PNG, level 6": ("PNG", {"compress_level": 6}), "PNG, level 1": ("PNG", {"compress_level": 1})},
    )
    kinds["JPEG, quality 90"] = ("JPEG", {"quality": 90})
    found: dict[str, tuple[float, int]] = {}
    print("| encoding 512 x 512 px | ms on one core | KB |\n| --- | ---: | ---: |")
    for name, (kind, options) in kinds.items():
        sizes: list[int] = []

        def encode(kind: str = kind, options: dict[str, int] = options, sizes: list[int] = sizes) -> None:
            buffer = io.BytesIO()
            image.save(buffer, format=kind, **options)
            sizes.append(buffer.tell())

        found[name] = seconds(encode), sizes[0] if sizes else 0
        found[name] = found[name][0], sizes[-1]
        print(f"| {name} | {1000 * found[name][0]:.1f} | {found[name][1] / 1000:.0f} |")
    block = bytes(64 << 20)
    hashing = len(block) / seconds(lambda: hashlib.sha256(block))
    shards = given.samples // SHARD_ROWS
    record = FileRecord(sha256="0" * 64, bytes=1)
    names = {f"shard-{index:05d}.parquet": record for index in range(shards)}
    manifest = StoreManifest(schema_version=2, settings={}, rows=given.samples, shards=names)
    print(f"\nSHA-256: {hashing / 1e9:.2f} GB/s on one core.")
    megabytes = len(manifest.model_dump_json()) / 1e6
    print(f"Manifest of {shards:,} shards: {megabytes:.0f} MB, {seconds(manifest.model_dump_json):.1f} s.")
    print(f"\n{given.samples:,} images, {given.rate:g} a second and device:\n")
    print("| devices | hours | images/s | shards/s | encoding | cores that encode | MB/s | TB | core hours to hash |")
    print("| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for devices in given.devices:
        rate = devices * given.rate
        start = f"| {devices} | {given.samples / rate / 3600:.0f} | {rate:g} | {rate / SHARD_ROWS:.1f} |"
        for name, (encode_s, size) in found.items():
            total = given.samples * size
            cores, hours = rate * encode_s, total / hashing / 3600
            print(f"{start} {name} | {cores:.1f} | {rate * size / 1e6:.0f} | {total / 1e12:.1f} | {hours:.1f} |")


if __name__ == "__main__":
    main()
