"""How a request is refused: one exception with an HTTP status, and what other errors become for a client."""

from __future__ import annotations

import logging

from mi2rage_engines.errors import BundleError, InputError, Mi2rageError, MissingExtraError
from mi2rage_rt.batch_errors import ClosedError, DeadlineError, QueueFullError

__all__ = ["RefusedError", "refusal_from_error"]

logger = logging.getLogger(__name__)

_NOT_THE_CLIENTS = (BundleError, MissingExtraError)


class RefusedError(Mi2rageError):
    """A request that gets no result.

    Attributes:
        status: of HTTP; `grpc_service` translates it.
        retry_after_s: when another try may succeed, where that is known.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


def refusal_from_error(error: Exception) -> RefusedError:
    """What a client is told; faults of the server go to the log, with their trace, and not to the client."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        return RefusedError(429, str(error), error.retry_after_s)
    if isinstance(error, DeadlineError):
        return RefusedError(504, str(error))
    if isinstance(error, ClosedError):
        return RefusedError(503, "this server is stopping, or its model has failed; ask another one", 1.0)
    if isinstance(error, InputError) and not isinstance(error, _NOT_THE_CLIENTS):
        return RefusedError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return RefusedError(500, "the model failed on this request; the server's log says why")
