"""Who comes in: requests that compute are counted from their headers to their answer, and turned away beyond that."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from mi2rage_rt.serve.refusals import RefusedError

if TYPE_CHECKING:
    from mi2rage_rt.serve.service import Service

__all__ = ["Admission", "Place"]


class Admission:
    """Decides on a request by its model alone, before its body is read or anything is made for it.

    At twice the load that a server can bear half of its requests must cost next to nothing. A model's queue does not
    tell enough: what was let in a moment ago has not reached it yet, and under load there may be thousands of those.

    Args:
        service: whose models compute.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.inside: collections.Counter[str] = collections.Counter()

    def enter(self, model: str, protocol: str) -> Place:
        """Let a request in; it leaves when it is answered, or given up.

        Args:
            model: one that is served.
            protocol: for the metrics, see `Service.answer`.

        Raises:
            RefusedError: 429 where too many are inside, 503 where the model is not ready; it is counted.
        """
        place = Place(self, model, protocol)
        place.enter()
        return place


class Place:
    """One request's place inside, see `Admission.enter`."""

    def __init__(self, admission: Admission, model: str, protocol: str) -> None:
        self._admission = admission
        self._model = model
        self._protocol = protocol
        self._is_inside = False

    def enter(self) -> None:
        """Come in, or stay. Raises what `Admission.enter` does."""
        if self._is_inside:
            return
        service, inside = self._admission.service, self._admission.inside
        try:
            service.check_room(self._model, inside=inside[self._model])
        except RefusedError as refusal:
            service.metrics.count(self._model, self._protocol, refusal.status, 0.0)
            raise
        inside[self._model] += 1
        self._is_inside = True

    def leave(self) -> None:
        """Go out, or stay outside."""
        if self._is_inside:
            self._admission.inside[self._model] -= 1
            self._is_inside = False
