"""Where a store is: a local folder, or an address that fsspec knows (`s3://bucket/run`, `gs://...`, `memory://run`).

A local file is written beside its name and renamed; an object store shows an object once all of it is there. Elsewhere
(`sftp://`, say) an interrupted write leaves a part of a file, which the checks of `store` tell from a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mi2rage_engines.errors import InputError, Mi2rageError, MissingExtraError, require
from mi2rage_rt.files import atomic_bytes

__all__ = ["Files", "LocalFiles", "RemoteFiles", "StorePlace", "absolute", "files_at", "is_address"]

StorePlace = Path | str
"""A folder, or an address; a `Path` is always a folder, for it loses one slash of `//`."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Files(Protocol):
    """The files of one folder, without its subfolders."""

    def names(self) -> dict[str, int]:
        """What is in it and how many bytes it has, a subfolder as `name/`; nothing where there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def open(self, name: str) -> IO[bytes]:
        """A file to read parts of; raises as `read`."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of one that is there.

        Raises:
            InputError: nothing can be written there, ever.
            Mi2rageError: the disk is full, or the place cannot be reached.
        """
        ...

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def at(self, name: str) -> str:
        """A file's path or address, for messages."""
        ...


def is_address(place: StorePlace) -> bool:
    """Whether a place is given as `protocol://...`."""
    return isinstance(place, str) and "://" in place


def absolute(place: StorePlace) -> StorePlace:
    """The place as a process in another folder finds it."""
    return place if is_address(place) else Path(place).absolute()


def files_at(place: StorePlace) -> Files:
    """The files of a folder or at an address, whether anything is there or not.

    Raises:
        InputError: no such protocol is known.
        MissingExtraError: what reads it is not installed.
    """
    if isinstance(place, str) and is_address(place):
        parts = urlsplit(place)
        return LocalFiles(Path(url2pathname(parts.path))) if parts.scheme == "file" else RemoteFiles(place)
    return LocalFiles(Path(place))


def _size_of(item: os.DirEntry[str]) -> int:
    try:
        return item.stat().st_size
    except FileNotFoundError:  # a draft that was finished meanwhile, or a link to nowhere
        return 0


class LocalFiles:
    """Those of a local folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> dict[str, int]:
        try:
            with os.scandir(self.folder) as entries:
                return {f"{item.name}/" if item.is_dir() else item.name: _size_of(item) for item in entries}
        except FileNotFoundError:
            return {}
        except NotADirectoryError as error:
            raise InputError(f"{self.folder}: is a file; expected the name of a folder") from error

    def read(self, name: str) -> bytes:
        with _no_folder_no_file():
            return (self.folder / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        with _no_folder_no_file():
            return (self.folder / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        try:
            atomic_bytes(self.folder / name, content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            disk, free = _disk_of(self.folder)
            raise Mi2rageError(
                f"{self.at(name)}: {error.strerror} (the disk at {disk} has {free / 1e6:,.2f} MB left, "
                f"{len(content) / 1e6:,.2f} MB were to be written); what was finished is kept; make room, and give the "
                "same command again to go on"
            ) from error

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def at(self, name: str) -> str:
        return str(self.folder / name)


@contextlib.contextmanager
def _no_folder_no_file() -> Iterator[None]:
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from error


def _disk_of(folder: Path) -> tuple[Path, int]:
    """Where the disk that holds `folder` is mounted, and the bytes that are free there."""
    place = folder.absolute()
    while not place.is_mount() and place != place.parent:
        place = place.parent
    return place, shutil.disk_usage(place).free


class RemoteFiles:
    """Those at an address, by fsspec."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        require("fsspec", "scale")
        from fsspec.core import url_to_fs

        try:
            with self._faults():
                self._system, self._root = url_to_fs(address)
        except ImportError as error:
            if address.startswith("s3"):
                raise MissingExtraError("s3fs", "scale") from error
            raise InputError(f"{address}: {error}") from error
        except ValueError as error:
            raise InputError(
                f"{address}: {error}; expected a folder, or an address that fsspec knows, e.g. s3://bucket/folder"
            ) from error

    def __str__(self) -> str:
        return self.address

    def names(self) -> dict[str, int]:
        self._system.invalidate_cache()  # other processes write here too
        try:
            with self._faults():
                found = self._system.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return dict(_name_and_size(item) for item in found if item["name"].strip("/") != self._root.strip("/"))

    def read(self, name: str) -> bytes:
        with self._faults():
            content: bytes = self._system.cat_file(self._within(name))
        return content

    def open(self, name: str) -> IO[bytes]:
        with self._faults():
            file: IO[bytes] = self._system.open(self._within(name), "rb")
        return file

    def write(self, name: str, content: bytes) -> None:
        try:
            with self._faults():
                self._system.pipe_file(self._within(name), content)
        except FileNotFoundError as error:
            raise InputError(
                f"{self.at(name)}: cannot be written ({error}); expected a bucket that is there; make it, or check the "
                "address"
            ) from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._faults():
            self._system.rm_file(self._within(name))

    def at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _within(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What the libraries behind fsspec raise, as errors of ours; theirs have no common root."""
        try:
            yield
        except (FileNotFoundError, ImportError, ValueError):
            raise
        except Exception as error:
            said = f"{self.address}: {type(error).__name__}: {error}"
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise InputError(
                    f"{said}; expected credentials that may list, read and write there; set them as its own tools want "
                    "them (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
                ) from error
            raise Mi2rageError(
                f"{said}; what was finished is kept; check the address and the network, and give the same command again"
            ) from error


def _name_and_size(item: dict[str, Any]) -> tuple[str, int]:
    name = PurePosixPath(item["name"]).name
    return (f"{name}/" if item["type"] == "directory" else name), item["size"] or 0
