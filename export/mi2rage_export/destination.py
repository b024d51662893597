"""Where an export is to stand: what must not be replaced is refused first, and a failure leaves no folder behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from mi2rage_engines.bundle import MANIFEST_NAME
from mi2rage_engines.errors import InputError
from mi2rage_rt.files import check_absent

__all__ = ["destination"]


@contextlib.contextmanager
def destination(out: Path, *, force: bool) -> Iterator[Path]:
    """The folder that a bundle is to take, links followed; parents that were made for it go again when the block fails.

    SIGTERM, which a container or a scheduler sends, ends the block as Ctrl-C does.

    Args:
        out: as the user gave it.
        force: replace a bundle that is there already; nothing else is ever replaced.

    Raises:
        InputError: it is a file, the current folder, not empty, no bundle, or cannot be written.
        OSError: what the block raises of the kind, its subject named.
    """
    place = Path(os.path.realpath(out))
    check_absent(out, force=force)
    _check_replaceable(out, place)
    missing = [parent for parent in place.parents if not parent.exists()]
    _check_writable(out, place.parents[len(missing)])
    try:
        with _clearing_up_when_terminated():
            yield place
    except BaseException as error:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            # Of a full disk Python names no file where it was writing already.
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise


@contextlib.contextmanager
def _clearing_up_when_terminated() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_replaceable(out: Path, place: Path) -> None:
    if place.is_dir() and any(place.iterdir()) and not (place / MANIFEST_NAME).is_file():
        raise InputError(
            f"{out}: is no bundle (it has no {MANIFEST_NAME}) and is not empty; expected a bundle to replace; give "
            "another folder, or empty this one"
        )


def _check_writable(out: Path, parent: Path) -> None:
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{out}: {parent} is no folder that can be written; expected one that takes the bundle; give another --out"
        )
