"""Who comes in: requests that compute are counted from their headers to their answer, and turned away beyond that."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mi2rage_rt.serve.refusals import RefusedError

if TYPE_CHECKING:
    from mi2rage_rt.serve.service import Service

__all__ = ["Admission", "Place"]


class Admission:
    """Decides on a request by its first line alone, before its body is read or anything is made for it.

    At twice the load that a server can bear half of its requests must cost next to nothing. A model's queue does not
    tell enough: what was let in a moment ago has not reached it yet, and under load there may be thousands of those.

    Args:
        service: whose models compute.
        targets: model and protocol by path, of all requests that compute.
    """

    def __init__(self, service: Service, targets: Mapping[str, tuple[str, str]]) -> None:
        self.service = service
        self.inside: collections.Counter[str] = collections.Counter()
        self._targets = targets

    def enter(self, method: str, path: str) -> Place:
        """Let a request in; it leaves when it is answered, or given up.

        Raises:
            RefusedError: 429 where too many are inside, 503 where the model is not ready; it is counted.
        """
        place = Place(self, self._targets.get(path) if method == "POST" else None)
        place.enter()
        return place


class Place:
    """One request's place inside; of a request that computes nothing it is none.

    Args:
        admission: keeps the count.
        target: the request's model and protocol, or None.
    """

    def __init__(self, admission: Admission, target: tuple[str, str] | None) -> None:
        self._admission = admission
        self._target = target
        self._is_inside = False

    def enter(self) -> None:
        """Come in, or stay. Raises what `Admission.enter` does."""
        if self._target is None or self._is_inside:
            return
        model, protocol = self._target
        service, inside = self._admission.service, self._admission.inside
        try:
            service.check_room(model, inside=inside[model])
        except RefusedError as refusal:
            service.metrics.count(model, protocol, refusal.status, 0.0)
            raise
        inside[model] += 1
        self._is_inside = True

    def leave(self) -> None:
        """Go out; a second time changes nothing."""
        if self._is_inside and self._target is not None:
            self._admission.inside[self._target[0]] -= 1
            self._is_inside = False
