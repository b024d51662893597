"""What the workers of a cluster are given to do in the tests; importable there by name."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import MissingExtraError
from mi2rage_training.chain_models import ChainModels, ModelChoice
from tests.training.fakes import MeanCaptioner, NoiseGenerator


@dataclasses.dataclass(frozen=True)
class Count:
    """A worker that notes that it has begun, and keeps its process id."""

    folder: Path

    def __call__(self) -> int:
        (self.folder / f"begun-{os.getpid()}").touch()
        return os.getpid()


def refuse() -> None:
    """A worker that cannot begin."""
    raise MissingExtraError("onnxruntime", "cpu")


def die() -> None:
    """A worker that never lives."""
    os.kill(os.getpid(), signal.SIGKILL)


def doubled(_: object, item: int) -> int:
    """Twice the item, after a moment."""
    time.sleep(0.02)
    return 2 * item


def deadly(_: object, item: int) -> int:
    """Kills its worker at 3."""
    if item == 3:
        die()
    return 2 * item


def failing(_: object, item: int) -> int:
    """Raises at 5."""
    if item == 5:
        raise ValueError("five")
    return item


@dataclasses.dataclass(frozen=True)
class Once:
    """Kills, or holds up, the first worker that is given the item."""

    folder: Path
    item: int
    hang_s: float = 0.0

    def __call__(self, _: object, item: int) -> int:
        mark = self.folder / "given"
        if item == self.item and not mark.exists():
            mark.touch()
            if not self.hang_s:
                die()
            time.sleep(self.hang_s)
        return item


class Poisoned(NoiseGenerator):
    """Raises at a prompt that names one sample, and kills its process at one that names another."""

    def __init__(self, raises: str = "", kills: str = "") -> None:
        super().__init__()
        self.raises = raises
        self.kills = kills

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        words = {word for prompt in prompts for word in prompt.split()}
        if self.kills in words:
            die()
        if self.raises in words:
            raise RuntimeError(f"cannot draw {self.raises}")
        return super().generate(prompts, seeds)


@dataclasses.dataclass(frozen=True)
class FakeChoice(ModelChoice):
    """The fake models in place of real ones."""

    raises: str = ""
    kills: str = ""

    def load(self) -> ChainModels:
        return ChainModels(Poisoned(self.raises, self.kills), MeanCaptioner(), {})
