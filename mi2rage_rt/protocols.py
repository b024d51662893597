"""The three model protocols, fulfilled alike by PyTorch modules and by the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.samples import Sample

__all__ = ["Image", "ImageToText", "RelationClassifier", "TextToImage"]

Image = NDArray[np.uint8]
"""One RGB image, uint8 `(H, W, 3)`, 0 to 255."""


@runtime_checkable
class TextToImage(Protocol):
    """Makes one image for each prompt; the noise of a row is drawn from its seed alone."""

    name: str

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Images for prompts, uint8 `(B, H, W, 3)`, in the order given."""
        ...


@runtime_checkable
class ImageToText(Protocol):
    """Writes one caption for each image."""

    name: str

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        """Captions in the order of the images, each beginning with its prefix, or (`with_prefix` off) what follows it.

        Without seeds decoding is greedy, or a beam search where the model is set to it; with them it is nucleus
        sampling, the draws of a row keyed by its seed alone.
        """
        ...


@runtime_checkable
class RelationClassifier(Protocol):
    """Scores the relation between the head and the tail of each sample."""

    labels: tuple[str, ...]

    def logits(self, samples: Sequence[Sample], images: Sequence[Image | None]) -> NDArray[np.float32]:
        """Unnormalised log-probabilities, float32 `(B, len(labels))`; an image may be missing."""
        ...
