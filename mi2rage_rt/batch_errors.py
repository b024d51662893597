"""How a request ends that a micro-batcher does not compute; leaves of the tree in `mi2rage_engines.errors`."""

from __future__ import annotations

from mi2rage_engines.errors import Mi2rageError

__all__ = ["ClosedError", "DeadlineError", "QueueFullError"]


class QueueFullError(Mi2rageError):
    """A request was not taken, as many as may wait being there already.

    Attributes:
        retry_after_s: when those that wait now will be done, by the rate of late; 1 s before the first batch.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(Mi2rageError):
    """A request's deadline passed before it was computed; it was dropped."""


class ClosedError(Mi2rageError):
    """The batcher is closed, or was closed before the request was computed."""
