"""Beam search over the logits of several images at once, as transformers' `generate` defines it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BeamSearch", "BeamSettings", "best_continuations"]


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSettings:
    """How beams are kept and compared.

    Attributes:
        beams: kept of each image.
        length_penalty: a caption's score is the sum of its log-probabilities over (its length)^length_penalty, the
            prefix not counted, the end counted.
        early_stopping: True ends an image at its first `beams` captions; False where its best open beam, scored at its
            present length, is no better than the worst of them; `never` scores it at the greatest length
            (for a positive penalty) before it gives up.
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


def best_continuations(logits: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The most probable tokens of each row and their log-probabilities, best first, of equals the lower id first.

    Args:
        logits: float32 `(..., V)`.
        count: V at most; few, as each costs a pass.

    Returns:
        Log-probabilities float32 and ids int64, `(..., count)` each.
    """
    left = logits - logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(left).sum(axis=-1, keepdims=True))
    likely, ids = [], []
    for _ in range(count):  # a partition takes ten times as long as so many passes
        best = left.argmax(axis=-1, keepdims=True)
        ids.append(best)
        likely.append(np.take_along_axis(left, best, -1) - log_sum)
        np.put_along_axis(left, best, -np.inf, -1)
    return np.concatenate(likely, axis=-1), np.concatenate(ids, axis=-1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ended:
    """A caption that ended, without its end."""

    score: np.float32
    ids: tuple[int, ...]


class BeamSearch:
    """The beams of some images, from the prefill's logits on until each image has its caption.

    Rows of logits are beams, an image's side by side; the prefill has one row an image, as all its beams are still
    alike. After each step `ids` and `origin` say how the decoder goes on.

    Args:
        images: how many.
        settings: see there.
        eos_id: ends a caption.
        limit: tokens that may be written.

    Attributes:
        open: the images that are not done, in order; `settings.beams` rows each.
        ids: int64 `(rows,)`, the token that each row goes on with.
        origin: int64 `(rows,)`, the row of the last logits that each row came from.
    """

    def __init__(self, images: int, settings: BeamSettings, eos_id: int, limit: int) -> None:
        self._settings = settings
        self._eos_id = eos_id
        self._limit = limit
        self._ended: list[list[_Ended]] = [[] for _ in range(images)]
        self._written = np.zeros((images, 1, 0), dtype=np.int64)
        self._scores = np.zeros((images, 1), dtype=np.float32)
        self.open: NDArray[np.int64] = np.arange(images)
        self.ids: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.origin: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def step(self) -> int:
        """Tokens written so far."""
        return int(self._written.shape[-1])

    def best(self) -> list[list[int]]:
        """Each image's caption as ids, without its end; once `open` is empty."""
        return [list(ended[0].ids) for ended in self._ended]

    def advance(self, logits: NDArray[np.float32]) -> None:
        """Take one step from the logits `(rows, V)` of the open images' beams."""
        images, width = self._scores.shape
        beams = self._settings.beams
        scores, parents, tokens = self._candidates(logits.reshape(images, width, -1))
        ends = (tokens == self._eos_id) | (self.step + 1 >= self._limit)
        for row, image in enumerate(self.open):
            # Those behind the first `beams` only stand in for those that end.
            for place in np.flatnonzero(ends[row, :beams]):
                ids = (*self._written[row, parents[row, place]].tolist(), int(tokens[row, place]))
                self._end(int(image), scores[row, place], ids)
        last = self.step + 1 >= self._limit
        chosen = np.argsort(ends, axis=-1, kind="stable")[:, :beams]
        self._scores = np.take_along_axis(scores, chosen, -1)
        parents, tokens = np.take_along_axis(parents, chosen, -1), np.take_along_axis(tokens, chosen, -1)
        before = np.take_along_axis(self._written, parents[..., None], axis=1)
        self._written = np.concatenate([before, tokens[..., None]], axis=-1)
        goes_on = np.array([not last and self._can_improve(row) for row in range(images)], dtype=np.bool_)
        self.origin = (parents + np.arange(images)[:, None] * width)[goes_on].reshape(-1)
        self.ids = tokens[goes_on].reshape(-1)
        self.open = self.open[goes_on]
        self._scores, self._written = self._scores[goes_on], self._written[goes_on]

    def _candidates(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """The best continuations of each image, twice as many as beams, since one a beam may end.

        Args:
            logits: `(images, width, V)`.

        Returns:
            Summed log-probabilities, the beam they continue, and the token, `(images, 2 * beams)` each, best first.
        """
        count = 2 * self._settings.beams
        # The best of all beams are among the best of each.
        likely, tokens = best_continuations(logits, count)
        likely = (likely + self._scores[..., None]).reshape(len(logits), -1)
        order = np.argsort(-likely, axis=-1, kind="stable")[:, :count]
        tokens = np.take_along_axis(tokens.reshape(len(logits), -1), order, axis=-1)
        return np.take_along_axis(likely, order, axis=-1), order // count, tokens

    def _end(self, image: int, score: np.float32, ids: Sequence[int]) -> None:
        """Keep a caption among the image's best."""
        settings = self._settings
        ended = self._ended[image]
        words = ids[:-1] if ids[-1] == self._eos_id else ids
        ended.append(_Ended(score / np.float32(len(ids) ** settings.length_penalty), tuple(words)))
        ended.sort(key=lambda caption: -caption.score)  # stable: of equals the earlier
        del ended[settings.beams :]

    def _can_improve(self, row: int) -> bool:
        """Whether an open image may still find a better caption than the worst it has kept."""
        settings = self._settings
        ended = self._ended[int(self.open[row])]
        if len(ended) < settings.beams:
            return True
        if settings.early_stopping is True:
            return False
        never = settings.early_stopping == "never" and settings.length_penalty > 0
        length = np.float32((self._limit if never else self.step) ** settings.length_penalty)
        return bool(self._scores[row, 0] / length > ended[-1].score)
