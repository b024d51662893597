"""Samples written here, and models that are cheap and exact."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.noise import rng
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Provenance, Sample, Span
from mi2rage_training.store import Candidate

LABELS = ("None", "/per/per/peer", "/per/org/member_of")


def samples(count: int) -> list[Sample]:
    """Sentences of six words, labels in turn."""
    return [
        Sample(f"s{i}", ("Ana", f"Lo{i}", "meets", "Bo", "Tan", "!"), Span(0, 2), Span(3, 5), LABELS[i % len(LABELS)])
        for i in range(count)
    ]


class NoiseGenerator:
    """Images of uniform noise keyed by prompt length and seed; counts its calls."""

    name = "noise"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (B, 8, 8, 3)."""
        self.calls.append((list(prompts), list(seeds)))
        return np.stack(
            [
                rng(seed, len(p)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                for p, seed in zip(prompts, seeds, strict=True)
            ]
        )


class MeanCaptioner:
    """Captions that name the mean of the image, and the seed's parity."""

    name = "mean"

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        """One caption an image; without seeds the mean alone."""
        draws = [""] * len(images) if seeds is None else [f" {seed % 1000}" for seed in seeds]
        starts = [f"{prefix} " if prefix and with_prefix else "" for prefix in prefixes or [""] * len(images)]
        return [
            f"{start}mean {image.mean():.0f}{draw}" for start, image, draw in zip(starts, images, draws, strict=True)
        ]


def candidates(parents: int, links: int = 2) -> list[Candidate]:
    """Candidates with one-pixel PNGs' worth of bytes; the teacher's tests replace the fitting."""
    made = []
    for sample in samples(parents):
        for link in range(1, links + 1):
            identity = f"{sample.id}/0.{link}"
            origin = Provenance(sample.id, link, 0, link, {"generator": "noise", "captioner": "mean"})
            child = Sample(identity, sample.tokens, sample.head, sample.tail, sample.label, f"{link}.png", origin)
            made.append(Candidate(child, b"x", sample.text))
    return made
