"""A run of a million rows with models that cost nothing: is the memory flat, and the cost of a row constant?

    python -m tests.training.million_rows [--rows 1000000] [--out FOLDER_OR_ADDRESS] [--in-flight 2]

The real `synthesize`, its scheduler and the store; each sample has a chain of three links, the images are small PNGs.
For each tenth of the run it prints rows a second, the CPU time of a row (which other processes hardly change), the
memory of the process (RSS) and its peak in that tenth. Then, each in a process of its own whose peak is printed: the
same command again (every shard is read and checked), all rows read, `store stats`, and `select` without a teacher.
Exit code 1 where the memory or the CPU time of a row has grown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample, Span
from mi2rage_training.chain import ChainConfig, Overlap, synthesize
from mi2rage_training.pairs import Pair
from mi2rage_training.policies import Policy, PolicyConfig
from mi2rage_training.store import StorePlace, is_store, read_store
from mi2rage_training.store_stats import stats_of_store

LINKS = 3
TENTHS = 10
LABELS = tuple(f"/relation/{i}" for i in range(23))
MOST_GROWTH = 1.1
"""Of the peak of memory, from the second tenth to the last; and of the CPU time of a row."""
_STATUS = Path("/proc/self/status")


def memory_mb(field: str = "VmRSS") -> float:
    """Resident memory of this process, or with `VmHWM` its peak."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def forget_peak() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Watch:
    """Prints a line for each tenth of the rows."""

    def __init__(self, rows: int) -> None:
        self.step = max(1, rows // TENTHS)
        self.done = 0
        self.begun = self.last = time.perf_counter()
        self.last_cpu = time.process_time()
        self.cpu_us: list[float] = []
        self.peaks_mb: list[float] = []
        forget_peak()

    def count(self, rows: int) -> None:
        """Take note of `rows` more."""
        before = self.done // self.step
        self.done += rows
        if self.done // self.step > before:
            now, cpu = time.perf_counter(), time.process_time()
            self.cpu_us.append((cpu - self.last_cpu) / self.step * 1e6)
            self.peaks_mb.append(memory_mb("VmHWM"))
            print(
                f"{self.done:>12,} rows  {self.step / (now - self.last):>8,.0f} rows/s  "
                f"{self.cpu_us[-1]:>6,.0f} us CPU  RSS {memory_mb():>4,.0f} MB  peak {self.peaks_mb[-1]:>4,.0f} MB",
                flush=True,
            )
            self.last, self.last_cpu = now, cpu
            forget_peak()


class Tiles:
    """One of 64 images of 16 x 16 pixels for each prompt."""

    name = "tiles"

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._tiles = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (B, 16, 16, 3)."""
        self.watch.count(len(prompts))
        return self._tiles[np.array(seeds, np.uint64) % 64]


class Numbers:
    """Captions with a number drawn by the seed."""

    name = "numbers"

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        """One an image."""
        return [f"a photo of {seed % 1_000_003} things on a table" for seed in seeds or [0] * len(images)]


def pairs(rows: int) -> list[Pair]:
    """Real samples enough for so many rows."""
    tokens = ("Ana", "Lo", "meets", "Bo", "Tan", "at", "the", "station", ".")
    return [
        Pair(Sample(f"sample-{i:08d}", tokens, Span(0, 2), Span(3, 5), LABELS[i % len(LABELS)]))
        for i in range(-(-rows // LINKS))
    ]


def run(rows: int, out: StorePlace, in_flight: int) -> Watch:
    """Synthesize, or go through what is there already."""
    samples = pairs(rows)
    print(f"{len(samples):,} real samples in memory: {memory_mb():,.1f} MB", flush=True)
    watch = Watch(rows)
    config, overlap = ChainConfig(links=LINKS), Overlap(in_flight, models_apart=in_flight > 1)
    manifest = synthesize(samples, out, Tiles(watch), Numbers(), config, overlap=overlap)
    seconds = time.perf_counter() - watch.begun
    print(
        f"{manifest.rows:,} rows in {len(manifest.shards):,} shards, "
        f"{sum(record.bytes for record in manifest.shards.values()) / 1e6:,.0f} MB: {seconds:,.1f} s, "
        f"{manifest.rows / seconds:,.0f} rows/s; peak at the end {memory_mb('VmHWM'):,.1f} MB",
        flush=True,
    )
    return watch


def afterwards(what: str, rows: int, out: StorePlace, in_flight: int) -> None:
    """One of the things that are done with a finished store."""
    begun, before = time.perf_counter(), time.process_time()
    if what == "again":
        assert run(rows, out, in_flight).done == 0, "a whole shard was made again"
    elif what == "read":
        assert sum(1 for _ in read_store(out)) >= rows
    elif what == "stats":
        assert stats_of_store(out).rows >= rows
    else:
        from mi2rage_training.selection import SelectionConfig, select

        limits = PolicyConfig(Policy.RANDOM, per_parent=1)
        with tempfile.TemporaryDirectory() as folder:
            select(out, Path(folder) / "selected", SelectionConfig(limits))
    wall, cpu = time.perf_counter() - begun, time.process_time() - before
    print(f"{what:>8}: {wall:,.1f} s, {cpu:,.1f} s CPU, peak {memory_mb('VmHWM'):,.1f} MB", flush=True)


def main() -> int:
    """Run all parts, or with `--only` one of what is done afterwards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", help="where the store is written and stays; by default a folder that is thrown away")
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--only", choices=("again", "read", "stats", "select"))
    args = parser.parse_args()
    if args.only:
        afterwards(args.only, args.rows, args.out, args.in_flight)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or str(Path(folder) / "store")
        if is_store(out):
            parser.error(f"{out}: a store is there; give a new place")
        watch = run(args.rows, out, args.in_flight)
        for what in ("again", "read", "stats", "select"):
            command = [sys.executable, "-m", "tests.training.million_rows", "--only", what, "--out", out]
            subprocess.run([*command, "--rows", str(args.rows), "--in-flight", str(args.in_flight)], check=True)
    growth = {
        "memory": watch.peaks_mb[-1] / watch.peaks_mb[1],
        "CPU time of a row": watch.cpu_us[-1] / watch.cpu_us[1],
    }
    print(json.dumps({name: round(value, 3) for name, value in growth.items()}))
    grown = [name for name, value in growth.items() if value > MOST_GROWTH]
    print(f"grown: {', '.join(grown)}" if grown else "flat memory, constant cost of a row")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
