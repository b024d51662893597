"""A captioner's decoder between two tokens: what is past, and what it sees of the images, kept where it computes."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.engine import Array, DeviceArray, Engine
from mi2rage_engines.errors import EngineError
from mi2rage_engines.spec import CaptionerSpec

__all__ = [
    "DecoderState",
    "GrowingState",
    "StaticBuffers",
    "StaticState",
    "cross_names",
    "is_on_host",
    "room_for",
    "rows_axis",
]

_PAST = {"past_keys": "present_keys", "past_values": "present_values"}
_ROOM_STEP = 8
"""Static caches come in so many sizes fewer: each size is a CUDA graph, or a plan's shape, of its own."""


class DecoderState(abc.ABC):
    """Rows of captions on their way; only logits come to the host.

    Args:
        engine: the decoder graph.
        past: keys and values of what is past, `(layers, rows, heads, length, size)`; those on a device are the state's
            to write.
        cross: keys and values of the images, `(rows, heads, patches, size)` for each layer, or one array with the
            layers before; those on a device lie on this engine's.
        on_host: the engine computes in the host's memory, where rows are dropped without a copy to a device and back.

    Attributes:
        rows: captions that the decoder writes.
    """

    def __init__(
        self,
        engine: Engine,
        past: Mapping[str, Array | DeviceArray],
        cross: Mapping[str, Array | DeviceArray],
        *,
        on_host: bool,
    ) -> None:
        self._engine = engine
        self._on_host = on_host
        self._past = {
            name: engine.put(array, name) if isinstance(array, np.ndarray) else array for name, array in past.items()
        }
        self._cross = {name: self._taken(array, name) for name, array in cross.items()}
        self.rows = int(self._past["past_keys"].shape[1])

    def _taken(self, array: Array | DeviceArray, name: str) -> DeviceArray:
        """What another graph gave, as this one takes it: it may be of another precision, or another backend's."""
        own = self._past["past_keys"]
        if isinstance(array, np.ndarray):
            return self._engine.put(array, name)
        # An engine takes another backend's arrays too, but would copy them again for every token.
        return array if type(array) is type(own) and array.dtype == own.dtype else self._engine.put(array.numpy(), name)

    @abc.abstractmethod
    def _call(self, ids: NDArray[np.int64]) -> DeviceArray:
        """Run the decoder, move what is past on, and return the logits."""

    @abc.abstractmethod
    def worth_dropping(self, left: int) -> bool:
        """Whether it pays to drop finished rows where `left` go on."""

    def advance(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the decoder on `ids` `(rows, L)` and return the logits of the last position, `(rows, V)`.

        Raises:
            EngineError: the graph failed, or gave NaN.
        """
        logits: NDArray[np.float32] = self._call(ids).numpy()[:, -1].astype(np.float32, copy=False)
        if np.isnan(logits.max(initial=-np.inf)):
            raise EngineError(
                f"{self._engine.name}: the logits hold NaN; the graph's precision is too low for this model; "
                "export it in a higher one"
            )
        return logits

    def reorder(self, origin: NDArray[np.int64]) -> None:
        """Row i goes on from what was row `origin[i]`, of the same image; as many rows as before."""
        if not np.array_equal(origin, np.arange(self.rows)):
            self._past = self._gathered(self._past, origin)

    def keep(self, origin: NDArray[np.int64]) -> None:
        """Row i goes on from what was row `origin[i]`; fewer rows, or more."""
        self._past, self._cross = self._gathered(self._past, origin), self._gathered(self._cross, origin)
        self.rows = len(origin)

    def _gathered(self, arrays: dict[str, DeviceArray], origin: NDArray[np.int64]) -> dict[str, DeviceArray]:
        host = {name: array.numpy() for name, array in arrays.items()}
        return {name: self._engine.put(array.take(origin, rows_axis(array.ndim)), name) for name, array in host.items()}


class GrowingState(DecoderState):
    """With the graph `decoder`: the past grows with each token.

    Args:
        engine, cross, on_host: see `DecoderState`.
        spec: the captioner's.
        rows: captions to write.
    """

    def __init__(
        self,
        engine: Engine,
        cross: Mapping[str, Array | DeviceArray],
        spec: CaptionerSpec,
        rows: int,
        *,
        on_host: bool,
    ) -> None:
        super().__init__(engine, _zeros(engine, spec, rows, 0), cross, on_host=on_host)

    def _call(self, ids: NDArray[np.int64]) -> DeviceArray:
        outputs = self._engine.call({"input_ids": ids, **self._past, **self._cross})
        self._past = {past: outputs[present] for past, present in _PAST.items()}
        return outputs["logits"]

    def worth_dropping(self, left: int) -> bool:
        # A drop on a device is a way there and back, dearer than some rows for nothing.
        return left < self.rows if self._on_host else 2 * left <= self.rows


@dataclasses.dataclass(frozen=True, slots=True)
class StaticBuffers:
    """The arrays of a static cache that has written its captions: at their addresses a CUDA graph goes on being valid.

    Attributes:
        past, into: of equal sizes; what they hold is of no account.
        cross: what the vision graph may write the next images' keys and values into; nothing where they were copied.
    """

    past: Mapping[str, DeviceArray]
    into: Mapping[str, DeviceArray]
    cross: Mapping[str, DeviceArray]


class StaticState(DecoderState):
    """With the graph `decoder_static`: room for the whole caption from the start, the same shapes at every step.

    Two buffers take turns, so that each step's addresses are those of the one before the last: a CUDA graph can be
    replayed. Rows are not dropped, which would be another shape.

    Args:
        engine, cross, on_host: see `DecoderState`.
        spec: the captioner's.
        rows: captions to write.
        room: ids that are fed to the decoder at most, see `room_for`.
        spare: of a state that is done, of as many rows and as much room; zeros by default.
    """

    def __init__(
        self,
        engine: Engine,
        cross: Mapping[str, Array | DeviceArray],
        spec: CaptionerSpec,
        rows: int,
        room: int,
        *,
        on_host: bool,
        spare: StaticBuffers | None = None,
    ) -> None:
        past = _zeros(engine, spec, rows, room) if spare is None else spare.past
        super().__init__(engine, past, cross, on_host=on_host)
        self._into = self._second_buffers() if spare is None else dict(spare.into)
        self._position = 0
        self._given = {name: array for name, array in self._cross.items() if array is cross[name]}

    def buffers(self) -> StaticBuffers:
        """What the next state may take over; this one is at its end."""
        return StaticBuffers(self._past, self._into, self._given)

    def _call(self, ids: NDArray[np.int64]) -> DeviceArray:
        position = np.array([self._position], dtype=np.int64)
        inputs: dict[str, Array | DeviceArray] = {
            "input_ids": ids,
            "position": position,
            **self._past,
            **self._cross,
        }
        outputs = self._engine.call(inputs, self._into)
        self._position += ids.shape[1]
        logits = self._into.get("logits", outputs["logits"])
        written, self._into = self._into, {present: self._past[past] for past, present in _PAST.items()}
        self._past = {past: written[present] for past, present in _PAST.items()}
        self._into["logits"] = logits
        return logits

    def worth_dropping(self, left: int) -> bool:
        return False

    def keep(self, origin: NDArray[np.int64]) -> None:
        super().keep(origin)
        self._into = self._second_buffers()

    def _second_buffers(self) -> dict[str, DeviceArray]:
        zeros = {name: np.zeros(array.shape, array.dtype) for name, array in self._past.items()}
        return {_PAST[name]: self._engine.put(array, name) for name, array in zeros.items()}


def cross_names(decoder: Engine) -> tuple[str, ...]:
    """What a decoder takes of the images: a tensor for each layer, or, in older bundles, one for all of them."""
    return tuple(tensor.name for tensor in decoder.inputs if tensor.name.startswith("cross_"))


def rows_axis(dimensions: int) -> int:
    """Which axis counts the captions, in an array of a layer, `(rows, heads, length, size)`, and in one of them all."""
    return dimensions - 4


def is_on_host(engine: Engine) -> bool:
    """Whether what an engine keeps lies in the host's memory."""
    return getattr(engine, "device", "cpu") == "cpu"


def room_for(fed: int, spec: CaptionerSpec) -> int:
    """The length of a static cache that holds `fed` ids, within what the graph was exported for."""
    room = -(-fed // _ROOM_STEP) * _ROOM_STEP
    known = spec.graphs["decoder_static"].axes.get("length")
    return room if known is None else max(known.min, min(room, known.max))


def _zeros(engine: Engine, spec: CaptionerSpec, rows: int, length: int) -> Mapping[str, Array]:
    dtype = next(tensor.dtype for tensor in engine.inputs if tensor.name == "past_keys")
    shape = (spec.layers, rows, spec.heads, length, spec.head_size)
    return {name: np.zeros(shape, dtype=dtype) for name in _PAST}
