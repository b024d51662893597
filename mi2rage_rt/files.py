"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mi2rage_engines.errors import InputError

__all__ = ["atomic_bytes", "atomic_folder", "atomic_text", "check_absent"]


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def atomic_text(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 text file, written beside `path` and renamed onto it when the block ends well."""
    draft = _beside(path)
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            _to_disk(file)
        draft.chmod(0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def atomic_bytes(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and rename it onto `path`."""
    draft = _beside(path)
    try:
        with draft.open("wb") as file:
            file.write(content)
            _to_disk(file)
        draft.chmod(0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _to_disk(file: IO[Any]) -> None:
    """So that after a power failure the new name is never that of an empty file."""
    file.flush()
    os.fsync(file.fileno())


def check_absent(path: Path, *, force: bool = False) -> None:
    """Refuse early what `atomic_folder` would refuse.

    Raises:
        InputError: `path` is a file, a folder that cannot be replaced, or not empty and `force` is off.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; expected the name of a folder to write")
    here, place = Path.cwd(), path.resolve()
    if place == here or place in here.parents or os.path.ismount(place):
        raise InputError(
            f"{path}: is the current folder, one around it, or a mount point; expected a folder that can be replaced "
            "as a whole; give the name of one inside it"
        )
    if path.is_dir() and any(path.iterdir()) and not force:
        raise InputError(f"{path}: exists and is not empty; give another folder, or --force to replace it")


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder that is filled beside `path` and takes its place when the block ends well.

    Args:
        path: the folder to make.
        force: replace a folder that is there already (only once the new one is complete).

    Raises:
        InputError: `path` exists and `force` is off, or `path` is a file.
    """
    check_absent(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        check_absent(path, force=force)  # another may have finished meanwhile
        draft.chmod(0o755)
        old = draft.with_name(draft.name + ".old")
        if path.exists():
            path.rename(old)
        try:
            draft.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
