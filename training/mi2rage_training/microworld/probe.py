"""A small convolutional net that says what is visible in a picture: a measuring device, never a training signal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError
from mi2rage_training.microworld.relations import CUES
from mi2rage_training.microworld.words import COLORS, SETTINGS

if TYPE_CHECKING:
    import torch

__all__ = ["ATTRIBUTES", "AttributeProbe"]

ATTRIBUTES: tuple[str, ...] = (
    *(f"cue:{cue}" for cue in CUES),
    *(f"setting:{setting}" for setting in SETTINGS),
    *(f"shirt:{color}" for color in COLORS),
)
"""What can be asked for and seen, in the order of the probe's outputs."""

_FILE = "model.safetensors"


def _network() -> torch.nn.Module:
    from torch import nn

    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]

    body = [*block(3, 24, 1), *block(24, 48, 2), *block(48, 64, 1), *block(64, 80, 2)]
    return nn.Sequential(*body, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(80, len(ATTRIBUTES)))


class AttributeProbe:
    """Finds the attributes in pictures of the micro-world.

    Args:
        network: maps float32 `(B, 3, 24, 24)` in [-1, 1] to one logit for each of `ATTRIBUTES`.
    """

    def __init__(self, network: Any) -> None:
        self._network = network

    @classmethod
    def untrained(cls) -> AttributeProbe:
        """A probe with random weights."""
        return cls(_network())

    @classmethod
    def load(cls, folder: Path | None = None) -> AttributeProbe:
        """The probe of a models folder (default: the embedded one).

        Raises:
            ModelFolderError: the folder holds no probe.
        """
        from safetensors.torch import load_file

        from mi2rage_training.microworld import models_folder

        path = (folder or models_folder()) / "probe" / _FILE
        if not path.is_file():
            raise ModelFolderError(
                f"{path}: no such file; expected the attribute probe of a folder that `mi2rage-rt pretrain` made"
            )
        probe = cls.untrained()
        probe._network.load_state_dict(load_file(path))
        probe._network.eval()
        return probe

    @property
    def network(self) -> Any:
        """The torch module."""
        return self._network

    def save(self, folder: Path) -> None:
        """Write the weights as `folder/probe/model.safetensors`."""
        from safetensors.torch import save_file

        (folder / "probe").mkdir(parents=True, exist_ok=True)
        save_file(self._network.state_dict(), folder / "probe" / _FILE)

    def scores(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Probability of each attribute, float32 `(B, 19)`, for uint8 `(B, 24, 24, 3)`."""
        import torch

        pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            found = [torch.sigmoid(self._network(pixels[at : at + 512])) for at in range(0, len(pixels), 512)]
        scores: NDArray[np.float32] = torch.cat(found).numpy()
        return scores

    def present(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[frozenset[str]]:
        """The attributes that are more likely in each picture than not."""
        return [
            frozenset(name for name, score in zip(ATTRIBUTES, row, strict=True) if score > 0.5)
            for row in self.scores(images)
        ]

    def cues(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[str | None]:
        """The likeliest cue in each picture, or None where none is more likely than not."""
        best = [row[: len(CUES)] for row in self.scores(images)]
        return [CUES[int(row.argmax())] if row.max() > 0.5 else None for row in best]
