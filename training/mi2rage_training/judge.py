"""A judge of children inside the chain: the cross-fitted teachers of an earlier selection, kept in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.store import Candidate

__all__ = ["Judge"]


class Judge(Protocol):
    """Says how much the made modality of a child adds to what the real one says of the label."""

    @property
    def name(self) -> str:
        """What stands in the store's settings."""
        ...

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """log q(y | both) - log q(y | real modality), float64 (N,), by teachers that never saw the child's parent."""
        ...
