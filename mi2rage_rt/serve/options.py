"""What is served, and how requests are put together."""

from __future__ import annotations

import dataclasses

from mi2rage_rt.batch_queue import BatchOptions
from mi2rage_rt.serve.limits import Limits

__all__ = ["BATCH_SIZES", "ServiceOptions"]

BATCH_SIZES = {"classifier": 32, "captioner": 16, "generator": 8}
"""Requests of a batch at most, by default."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What is served, and how.

    Attributes:
        models: names among those of the bundle.
        max_batch: requests of a batch at most; None takes `BATCH_SIZES`.
        max_wait_ms, max_queue: of each model's queue, see `BatchOptions`.
        stall_s: a model that computes on one batch for longer is taken for dead.
        limits: of requests.
    """

    models: tuple[str, ...]
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    max_queue: int = 128
    stall_s: float = 300.0
    limits: Limits = dataclasses.field(default_factory=Limits)

    def batch_options(self, model: str) -> BatchOptions:
        """Of one model's queue. Raises InputError where a number is out of range."""
        return BatchOptions(self.max_batch or BATCH_SIZES[model], self.max_wait_ms, self.max_queue)
