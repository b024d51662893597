"""Memory: lack of it, which PyTorch reports as any other fault, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from mi2rage_engines.errors import Mi2rageError

__all__ = ["give_back", "is_lack_of_memory", "naming_lack_of_memory"]

_WORDS = ("can't allocate memory", "not enough memory", "out of memory")
"""Of PyTorch's allocators on Linux, on Windows and on GPUs."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )


@contextlib.contextmanager
def naming_lack_of_memory(subject: str) -> Iterator[None]:
    """Say what to do where the block ends for lack of memory.

    Raises:
        Mi2rageError: in place of whatever says so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise Mi2rageError(
            f"{subject}: out of memory; expected room for a component's weights about three times; export one "
            "component at a time, or on a machine with more"
        ) from error


def give_back() -> None:
    """Give freed memory back to the system: glibc keeps blocks below 32 MB, which activations mostly are."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)
