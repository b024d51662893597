"""How many rows to compute together: what memory holds, and of that the number that makes most rows a second."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mi2rage_engines.errors import EngineError, InputError
from mi2rage_rt.memory_use import Memory

logger = logging.getLogger(__name__)

__all__ = ["LEAST_GAIN", "BatchSearch"]

LEAST_GAIN = 0.03
"""Rows a second that doubling the batch must gain, as a share, to be worth its memory and its delay."""

_USABLE = 0.9
"""Share of the memory there is that a search without a limit of its own may use."""


class BatchSearch:
    """Tries batches of one kind of work; what was measured is kept as long as the object lives.

    Args:
        trial: does the work of so many rows, or enough of it, and returns the seconds that the whole would take.
        memory: where the work's arrays lie.
        least_row_bytes: of a row's inputs and outputs; what else a row takes drowns, where rows are small, in what
            allocators round up.
        least_gain: see `LEAST_GAIN`.
    """

    def __init__(
        self, trial: Callable[[int], float], memory: Memory, least_row_bytes: int, least_gain: float = LEAST_GAIN
    ) -> None:
        self._trial = trial
        self._memory = memory
        self._least_row_bytes = least_row_bytes
        self._least_gain = least_gain
        self._peaks_bytes: tuple[int, int] | None = None
        self._rates: dict[int, float] = {}

    def within(self, limit_bytes: int | None = None) -> int:
        """How many rows memory holds, were each further row to cost what the second of two does.

        Args:
            limit_bytes: what may be in use in all, weights too; by default 90% of what there is.

        Raises:
            InputError: one row is too much already, or the system does not tell.
        """
        if limit_bytes is None:
            limit_bytes = int(_USABLE * self._memory.limit_bytes())
        if self._peaks_bytes is None:
            one = self._memory.peak_bytes(lambda: self._trial(1))
            self._peaks_bytes = one, self._memory.peak_bytes(lambda: self._trial(2))
        one, two = self._peaks_bytes
        if one > limit_bytes:
            raise InputError(
                f"memory limit {limit_bytes / 1e9:.3g} GB: one row takes {one / 1e9:.3g} GB in all, weights and "
                "libraries among it; expected at least as much; raise the limit, or choose a smaller size or precision"
            )
        return 1 + (limit_bytes - one) // max(two - one, self._least_row_bytes)

    def fastest(self, most: int) -> int:
        """The smallest of 1, 2, 4, 8, ... up to `most` rows whose double does not pay.

        A batch that the engine cannot run, for want of memory or because no profile holds it, ends the search.

        Raises:
            EngineError: not even one row can be computed.
        """
        chosen = 1
        while 2 * chosen <= most:
            if self._rate(2 * chosen) < (1 + self._least_gain) * self._rate(chosen):
                break
            chosen *= 2
        return chosen

    def _rate(self, rows: int) -> float:
        if rows not in self._rates:
            try:
                self._trial(rows)  # the first of a shape makes room
                self._rates[rows] = rows / self._trial(rows)
                logger.info("batch %d: %.3g a second", rows, self._rates[rows])
            except EngineError as error:
                if rows == 1:
                    raise
                logger.info("batch %d cannot be run, which ends the search: %s", rows, error)
                self._rates[rows] = 0.0
        return self._rates[rows]
