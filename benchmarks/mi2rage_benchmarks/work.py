"""What every cell's work has in common: one task, put to PyTorch and to bundles alike."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mi2rage_benchmarks.limits import OperationCounter, counted
from mi2rage_benchmarks.report import Kind
from mi2rage_engines.bundle import Manifest, ParityRecord

if TYPE_CHECKING:
    from mi2rage_benchmarks.sides import BundleSide
    from mi2rage_engines.spec import Precision

__all__ = ["GENERATION_ALONE", "Call", "Work", "WorkOptions", "Works"]

Call = Callable[[], Any]

GENERATION_ALONE = "generation alone"
"""The further call of a chain's work: its images and nothing else."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkOptions:
    """What cells ask for beside the batch size.

    Attributes:
        steps: denoising steps; None takes the bundle's own.
        tokens: new tokens of a caption, at most.
        texts: real samples of a chain; links: of it.
        seed: of inputs and noise.
        feature_cache: above 1 generations are done once more, by bundles with feature caching.
    """

    steps: int | None = None
    tokens: int = 20
    texts: int = 64
    links: int = 2
    seed: int = 0
    feature_cache: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(abc.ABC):
    """One task of fixed inputs; every side answers in the same form, which `compare` reads.

    Attributes:
        title: what it is. kind: see `Kind`.
        roles: the components it runs.
        sizes: what the work depends on.
        items: what a call makes.
    """

    title: str
    kind: Kind = "whole"
    roles: tuple[str, ...]
    batch_size: int
    sizes: dict[str, int]
    items: int

    @abc.abstractmethod
    def on_torch(self, models: Mapping[str, Any]) -> Call:
        """The task for models by role."""

    @abc.abstractmethod
    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        """The task under the empty name, and calls that are only timed beside it."""

    @abc.abstractmethod
    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        """A side's answer against eager's, held to the bounds of a precision."""

    def count(self, models: Mapping[str, Any]) -> tuple[Any, OperationCounter]:
        """PyTorch's answer, and the operations it took."""
        return counted(self.on_torch(models))

    def graphs(self, manifest: Manifest) -> tuple[str, ...]:
        """The graphs that the task runs, e.g. `generator/unet`: as a rule those that the runtime loads for its roles.

        Of a generator that is the whole denoising step where there is one, of a captioner the decoder for CPUs.
        """
        names = [name for name in manifest.graphs if name.partition("/")[0] in self.roles]
        unused = {"captioner/decoder_static", "generator/denoise_step_full", "generator/denoise_step_shallow"}
        if "generator/denoise_step" in names:
            unused.add("generator/unet")
        return tuple(name for name in names if name not in unused)


class Works(Protocol):
    """Makes the tasks of a subject at one batch size, for one bundle's inputs."""

    def __call__(self, side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]: ...
