"""A cache of built plans, by content: the key is a hash of everything that decides what a plan is.

```
<folder>/entries/<key>/       the files of one build, and files.json with their hashes
<folder>/entries/<key>.draft/ one being written
<folder>/locks/<key>.lock     held by whoever builds or reads the entry
```
An entry is written as a draft and renamed. A folder that cannot be written (read-only, full) costs no build: the cache
is passed by with a warning, and the build's result is used as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from mi2rage_engines.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["Content", "Fetched", "PlanCache", "bytes_from_text", "default_cache_folder", "write_content"]

_INDEX = "files.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LARGEST_SIZE = 10**18

Content = bytes | memoryview | Path
"""A file's bytes, in memory or in a file of the cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """An entry's files by name; `was_cached` is False where they were just built."""

    files: Mapping[str, Content]
    was_cached: bool


def default_cache_folder() -> Path:
    """`$MI2RAGE_CACHE`, else `$XDG_CACHE_HOME/mi2rage-rt/plans`, else `~/.cache/mi2rage-rt/plans`."""
    named = os.environ.get("MI2RAGE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mi2rage-rt" / "plans"


def bytes_from_text(text: str) -> int:
    """Read a size such as `20GB`, `500 MB` or `1.5TB` (decimal units).

    Raises:
        InputError: it is not of that form, below 1 byte, or above a million TB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit = f"{unit}B" if unit in ("K", "M", "G", "T") else unit
    size = float(match[1]) * _UNITS[unit] if match else 0
    if not 1 <= size <= _LARGEST_SIZE:
        raise InputError(
            f"size {text[:40]!r}: expected 1B to {_LARGEST_SIZE // 10**12}TB, e.g. 20GB or 500MB; correct it"
        )
    return int(size)


def write_content(content: Content, path: Path) -> None:
    """Write a file; the caller renames it into place."""
    if isinstance(content, Path):
        shutil.copyfile(content, path)
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        # Of a full disk Python names no file where it was writing already.
        raise OSError(error.errno, error.strerror, str(path)) from error


class PlanCache:
    """Entries of a folder, safe for several processes; the least recently used go when more is there than the limit.

    That is looked at whenever an entry is fetched, so that a lower limit holds from the next call on.

    Args:
        folder: made when it is first written to.
        limit_bytes: of all entries together. What is in use, or was just written, stays even above it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    @contextlib.contextmanager
    def fetch(self, key: str, build: Callable[[], Mapping[str, bytes | memoryview]]) -> Iterator[Fetched]:
        """The files of `key`, from the cache or built; they stay until the block ends.

        Of two that want the same key at once the second waits, and takes what the first has built.

        Args:
            key: hex SHA-256 of the request.
            build: makes the files where the cache has none; what it raises leaves no trace.
        """
        with contextlib.ExitStack() as stack:
            problem: OSError | None = None
            try:
                stack.enter_context(_locked(self._lock_path(key), key))
            except OSError as error:
                problem = error
            found = None
            try:
                # A cache that can only be read is read all the same: entries appear whole.
                found = self._look_up(key)
            except PermissionError as error:  # not even searched
                problem = error
            if found is not None:
                if problem is None:
                    self._evict(key)
                yield Fetched(found, was_cached=True)
                return
            if problem is not None:
                self._warn(problem)
            files = build()
            if problem is None:
                self._store(key, files)
            yield Fetched(files, was_cached=False)

    def size_bytes(self) -> int:
        """What all entries take together."""
        return sum(_size_of(entry) for entry in self._entries())

    def _warn(self, error: OSError) -> None:
        logger.warning(
            "%s: the plan cache cannot be used (%s); going on without it; see --cache and --cache-limit",
            self.folder,
            error.strerror or error,
        )

    def _entry(self, key: str) -> Path:
        return self.folder / "entries" / key

    def _lock_path(self, key: str) -> Path:
        return self.folder / "locks" / f"{key}.lock"

    def _entries(self) -> list[Path]:
        return sorted(path for path in (self.folder / "entries").glob("*") if path.is_dir())

    def _look_up(self, key: str) -> dict[str, Content] | None:
        entry = self._entry(key)
        if not entry.exists():
            return None
        if not _is_whole(entry):
            logger.warning("%s: a damaged cache entry (its files differ from their hashes); building anew", entry)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # it may be read-only
            os.utime(entry / _INDEX)
        return {path.name: path for path in sorted(entry.iterdir()) if path.name != _INDEX}

    def _store(self, key: str, files: Mapping[str, bytes | memoryview]) -> None:
        entry, draft = self._entry(key), self._entry(f"{key}.draft")
        try:
            shutil.rmtree(draft, ignore_errors=True)  # of a builder that was killed
            draft.mkdir(parents=True)
            for name, content in files.items():
                write_content(content, draft / name)
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            (draft / _INDEX).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
            draft.rename(entry)
        except OSError as error:
            self._warn(error)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._evict(key)

    def _evict(self, kept: str) -> None:
        """Drop the least recently used entries, and drafts that nobody writes any more, until the limit holds."""
        entries = sorted(self._entries(), key=_last_used)
        total = sum(map(_size_of, entries))
        for entry in entries:
            key = entry.name.removesuffix(".draft")
            is_abandoned = entry.name.endswith(".draft")
            if key == kept or (total <= self.limit_bytes and not is_abandoned):
                continue
            size = _size_of(entry)
            with contextlib.suppress(OSError), _locked(self._lock_path(key), key, wait=False) as is_ours:
                if is_ours:
                    shutil.rmtree(entry)
                    total -= size
        if total > self.limit_bytes:
            logger.warning(
                "%s: the plan cache takes %d bytes, more than its limit of %d, all in use; raise --cache-limit",
                self.folder,
                total,
                self.limit_bytes,
            )


def _is_whole(entry: Path) -> bool:
    try:
        hashes = dict(json.loads((entry / _INDEX).read_text(encoding="utf-8")))
        names = {path.name for path in entry.iterdir()} - {_INDEX}
        return bool(names) and names == set(hashes) and all(_sha256(entry / name) == hashes[name] for name in names)
    except (OSError, ValueError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_of(entry: Path) -> int:
    # Another process may be removing it.
    size = 0
    for path in entry.glob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size


def _last_used(entry: Path) -> float:
    try:
        return (entry / _INDEX).stat().st_mtime
    except OSError:
        return 0.0


@contextlib.contextmanager
def _locked(path: Path, key: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file of the operating system's; it is let go when the process ends, however it ends.

    Yields whether it is held, which without `wait` it may not be. The empty files stay: a removed one could be locked
    by two at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        is_ours = _try_lock(file)
        if not is_ours and wait:
            logger.info("another process is building %s; waiting for it", key[:12])
            while not _try_lock(file):
                time.sleep(0.1)
            is_ours = True
        try:
            yield is_ours
        finally:
            if is_ours:
                _unlock(file)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
