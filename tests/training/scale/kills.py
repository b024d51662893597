"""Kill runs of `synthesize` at random, again and again; what they end with must be what an undisturbed run makes.

    python -m tests.training.scale.kills --kills 200 --workers 1,2,4 [--s3] [--seed 0] [--samples 160]

The kills are shared out among the numbers of workers: 1 is one process without Ray, 2 and more are `--ray local`. Each
is a SIGKILL: of the driver alone, of its whole process group, or of a worker. They come at a random time in the start,
or after a random number of further shards and up to 0.3 s, so in the middle of any step. A run that was killed is
started again with the same command until the store is finished, then the next store is begun, until the kills are
spent. After each kill of a driver the shards that are there are compared with the undisturbed run's, and at the end
every file and every row. With --s3 the stores are on an S3 server on this machine (moto's). The models are tiny, the
command line, the store and Ray are the real ones. Prints the figures after each store, and at the end one JSON
document; exits with 1 if anything was lost, doubled or different.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mi2rage_rt.samples import write_samples
from mi2rage_training.store import MANIFEST_NAME
from mi2rage_training.store_files import files_at
from mi2rage_training.store_rows import table_from
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import samples
from tests.training.object_store import BUCKET, s3_server

_SHARD_SIZE = 4
_LINKS = 2
_HANGS_S = 600.0


@dataclasses.dataclass(frozen=True)
class Material:
    """What all runs are given, and what they have to end with."""

    rows: Path
    bundle: Path
    reference: dict[str, bytes]

    def command(self, place: str, workers: int) -> list[str]:
        """The command line of a run."""
        cluster = ["--ray", "local", "--workers", str(workers)] if workers > 1 else []
        size = ["--links", str(_LINKS), "--shard-size", str(_SHARD_SIZE), "--json"]
        return [
            *(sys.executable, "-m", "mi2rage_rt.cli", "synthesize", str(self.rows), place),
            *("--bundle", str(self.bundle), *size, *cluster),
        ]


@dataclasses.dataclass
class Figures:
    """What was killed, and what came of it."""

    workers: int
    stores: int = 0
    runs: int = 0
    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> int:
        """Kills of all kinds."""
        return sum(self.kills.values())


def make_material(folder: Path, count: int) -> Material:
    """Rows, tiny models, and the store of an undisturbed run."""
    rows, bundle = folder / "rows.jsonl", build_bundle(folder / "bundle")
    write_samples(rows, samples(count))
    material = Material(rows, bundle, {})
    place = str(folder / "reference")
    subprocess.run(material.command(place, 1), check=True, stdout=subprocess.DEVNULL)
    return dataclasses.replace(material, reference=contents(place))


def contents(place: str) -> dict[str, bytes]:
    """Every file of a store, drafts left out."""
    files = files_at(place)
    return {name: files.read(name) for name in files.names() if not name.startswith(".")}


def row_hashes(store: dict[str, bytes]) -> list[tuple[str, str]]:
    """Id and hash of every row, in order."""
    found = []
    for name in sorted(name for name in store if name.endswith(".parquet")):
        for row in table_from(store[name]).to_pylist():
            found.append((row["id"], hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()))
    return found


def disturb(material: Material, place: str, figures: Figures, most: int, rng: np.random.Generator) -> None:
    """Start a run and kill it, until the store is finished or `most` kills are spent; then let it finish."""
    begun = time.monotonic()
    spent = 0
    while True:
        figures.runs += 1
        with _running(material.command(place, figures.workers)) as process:
            while spent < most:
                kind = _kind(figures.workers, rng)
                if not _wait_for_moment(process, place, rng, in_start=kind != "worker"):
                    break
                if _kill(process, kind, rng):
                    spent += 1
                    figures.kills[kind] = figures.kills.get(kind, 0) + 1
                    if kind != "worker":
                        break
            code = process.wait(_HANGS_S)
            said = process.stderr.read() if process.stderr else ""
        if code == 0:
            break
        if code != -9:
            raise AssertionError(f"{place}: exit code {code}, and nobody killed it: {said}")
        for name, content in contents(place).items():
            if name != MANIFEST_NAME and content != material.reference[name]:
                raise AssertionError(f"{place}: {name} differs after a kill")
    compare(material, contents(place), figures)
    figures.stores += 1
    figures.seconds += time.monotonic() - begun


def compare(material: Material, store: dict[str, bytes], figures: Figures) -> None:
    """Count rows that are lost, doubled or different, and refuse a store that has other files."""
    expected, found = row_hashes(material.reference), row_hashes(store)
    times = Counter(identity for identity, _ in found)
    hashes = dict(found)
    figures.rows += len(expected)
    figures.lost += sum(identity not in times for identity, _ in expected)
    figures.doubled += sum(count - 1 for count in times.values())
    figures.different += sum(hashes.get(identity, right) != right for identity, right in expected)
    if store.keys() != material.reference.keys():
        raise AssertionError(f"the store has other files: {sorted(store.keys() ^ material.reference.keys())}")
    differing = [name for name, content in store.items() if content != material.reference[name]]
    if differing:
        raise AssertionError(f"files differ: {differing}")


def _kind(workers: int, rng: np.random.Generator) -> str:
    if workers == 1:
        return "driver"
    return str(rng.choice(["worker", "driver", "group"], p=[0.7, 0.15, 0.15]))


def _wait_for_moment(process: subprocess.Popen[str], place: str, rng: np.random.Generator, *, in_start: bool) -> bool:
    """Wait for a random moment; False where the run has ended before it came."""
    if in_start and rng.random() < 0.25:
        return _still_runs(process, float(rng.uniform(0, 3)))
    target = _shards(place) + int(rng.integers(1, 6))
    while _shards(place) < target:
        if not _still_runs(process, 0.02):
            return False
    return _still_runs(process, float(rng.uniform(0, 0.3)))


def _still_runs(process: subprocess.Popen[str], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return False
    return True


def _shards(place: str) -> int:
    return sum(name.endswith(".parquet") and not name.startswith(".") for name in files_at(place).names())


def _kill(process: subprocess.Popen[str], kind: str, rng: np.random.Generator) -> bool:
    """Kill the driver, all of its group, or one of its workers; False where none is there to be killed."""
    family = _family(process)
    if kind == "worker":
        workers = [member for member in family if _title(member).startswith("ray::_Worker")]
        if not workers:
            return False
        workers[int(rng.integers(len(workers)))].kill()
        return True
    if kind == "group":
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.kill()
    return True


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _title(member: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, IndexError):
        return member.cmdline()[0]
    return ""


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A run; what Ray leaves behind when its driver was killed is ended too (its agents take a minute)."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    family: dict[int, psutil.Process] = {}
    kill = process.kill

    def kill_noting() -> None:
        family.update((member.pid, member) for member in _family(process))
        kill()

    process.kill = kill_noting  # type: ignore[method-assign]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        _, alive = psutil.wait_procs(list(family.values()), timeout=3)
        for member in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if process.stderr:
            process.stderr.close()


def run(kills: int, workers: int, material: Material, base: str, seed: int) -> Figures:
    """Spend so many kills on stores below `base`."""
    figures, rng = Figures(workers), np.random.default_rng((seed, workers))
    while figures.killed < kills:
        disturb(material, f"{base}/{workers}-{figures.stores}", figures, kills - figures.killed, rng)
        print(json.dumps(dataclasses.asdict(figures)), file=sys.stderr, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    numbers = [int(part) for part in options.workers.split(",")]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = str(Path(folder) / "stores")
        if options.s3:
            stack.enter_context(s3_server())
            base = f"s3://{BUCKET}/kills"
        material = make_material(Path(folder), options.samples)
        for place, workers in enumerate(numbers):
            share = options.kills // len(numbers) + (place < options.kills % len(numbers))
            figures = run(share, workers, material, base, options.seed)
            found.append(dataclasses.asdict(figures))
    print(json.dumps({"s3": options.s3, "seed": options.seed, "by_workers": found}, indent=2))
    sys.exit(any(part[name] for part in found for name in ("lost", "doubled", "different")))


if __name__ == "__main__":
    main()
