"""What an export is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import Precision

__all__ = ["OPSET", "ExportRequest", "parts_from_options", "precisions_from_options"]

OPSET = 20
"""GELU is one operator from 20 on; from 23 on TensorRT refuses fp32 `Attention` (ENGINES.md)."""
_OPSETS = range(18, 26)
_ROLES = ("generator", "captioner", "classifier")


@dataclasses.dataclass(frozen=True, slots=True)
class ExportRequest:
    """Which models become a bundle, and how.

    Attributes:
        generator, captioner: a folder, a hub id, or `embedded`.
        classifier: a folder written by `mi2rage-rt train`.
        random_weights: real architectures with random weights, by name (`random_weights.NAMES`), one a role.
        scheduler: a sampler in place of the generator's own, one of `samplers.SCHEDULERS`.
        precisions: by graph (`generator/unet` or `unet`), by role, or for all (the empty name); fp32 otherwise.
        keep_fp32: parts that stay in fp32 in a lower precision, by graph: submodules of the graph's wrapper, or layers
            of an int8 graph.
        opset: 18 to 25.
        preprocess_in_graph: images go in as they are, resized in the captioner's graph as Pillow does it.
        static_cache: the captioner gets a second decoder graph, with a cache of fixed length (`decoder_static`).
        feature_cache: the generator gets graphs for feature caching across steps (`denoise_step_full`,
            `denoise_step_shallow`).
        verify: samples to measure the task's own figures on, before and after.
        calibration: samples that `int8-qdq` takes its scales from.
        images: folder of both files' images; by default each file's own.
        limit: rows of both files at most.
        seed: of random weights and of the inputs that parity checks draw.
    """

    generator: str | Path | None = None
    captioner: str | Path | None = None
    classifier: str | Path | None = None
    random_weights: tuple[str, ...] = ()
    scheduler: str | None = None
    precisions: Mapping[str, Precision] = dataclasses.field(default_factory=dict)
    keep_fp32: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    opset: int = OPSET
    preprocess_in_graph: bool = False
    static_cache: bool = False
    feature_cache: bool = False
    verify: Path | None = None
    calibration: Path | None = None
    images: Path | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources and not self.random_weights:
            raise InputError(
                "nothing to export: no model was given; expected at least one of --generator, --captioner, "
                "--classifier, --random-weights"
            )
        if self.opset not in _OPSETS:
            raise InputError(
                f"opset {self.opset}: expected {_OPSETS.start} to {_OPSETS.stop - 1}; {OPSET} suits every target"
            )
        if "int8-qdq" in self.precisions.values() and self.calibration is None:
            raise InputError(
                "precision int8-qdq: came without data to take its scales from; expected some; give samples with "
                "--calibration"
            )

    @property
    def sources(self) -> dict[str, str]:
        """The models that were named, by role."""
        return {role: str(getattr(self, role)) for role in _ROLES if getattr(self, role) is not None}

    def precision_of(self, graph: str) -> Precision:
        """What a graph, e.g. `generator/unet`, is to compute in."""
        role, _, name = graph.partition("/")
        return next((self.precisions[key] for key in (graph, name, role, "") if key in self.precisions), "fp32")

    def kept_parts(self, graph: str) -> tuple[str, ...]:
        """What is to stay in fp32 of a graph."""
        return (*self.keep_fp32.get(graph, ()), *self.keep_fp32.get(graph.partition("/")[2], ()))

    def check_names(self, graphs: Sequence[str]) -> None:
        """Refuse precisions and parts of graphs that are not among those exported, and parts of graphs in fp32 anyway.

        Raises:
            InputError: naming those that are, or what to do.
        """
        known = {
            "",
            *graphs,
            *(graph.partition("/")[0] for graph in graphs),
            *(graph.partition("/")[2] for graph in graphs),
        }
        if unknown := sorted(set(self.precisions) - known):
            raise InputError(
                f"precision of {unknown[0]!r}: no such graph here; expected one of {', '.join(sorted(known - {''}))}; "
                "name one of them"
            )
        self._check_parts(graphs)

    def _check_parts(self, graphs: Sequence[str]) -> None:
        # A role's graphs have different parts: what a role was given would be in none, or in one by accident.
        named = {*graphs, *(graph.partition("/")[2] for graph in graphs)}
        if unknown := sorted(set(self.keep_fp32) - named):
            raise InputError(
                f"keep in fp32 of {unknown[0]!r}: no such graph here; expected one of {', '.join(graphs)}; name one of "
                "them"
            )
        for graph in graphs:
            if self.kept_parts(graph) and self.precision_of(graph) == "fp32":
                raise InputError(
                    f"keep in fp32 of {graph}: came with {', '.join(self.kept_parts(graph))}; expected a graph in a "
                    f"lower precision, and all of this one is in fp32; give --precision {graph}=fp16, or leave it out"
                )


def parts_from_options(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """From `vae_decoder=vae.decoder.mid_block`, ... to names of parts by graph.

    Raises:
        InputError: an option is not of this form.
    """
    found: dict[str, tuple[str, ...]] = {}
    for option in options:
        graph, sign, part = option.partition("=")
        if not (graph and sign and part):
            raise InputError(
                f"keep in fp32 {option!r}: expected GRAPH=PART, e.g. vae_decoder=vae.decoder.mid_block; name both"
            )
        found[graph] = (*found.get(graph, ()), part)
    return found


def precisions_from_options(options: Sequence[str]) -> dict[str, Precision]:
    """From `fp16`, `unet=fp16`, `captioner=int8-weights`, ... to precisions by name.

    Raises:
        InputError: a precision is not known, or a name is given twice.
    """
    known: tuple[Precision, ...] = get_args(Precision)
    found: dict[str, Precision] = {}
    for option in options:
        name, sign, value = option.rpartition("=")
        precision = next((item for item in known if item == value), None)
        if precision is None or (sign and not name):
            raise InputError(
                f"precision {option!r}: expected one of {', '.join(known)}, alone or as GRAPH=PRECISION, e.g. "
                "unet=fp16; name one of them"
            )
        if name in found:
            raise InputError(
                f"precision {option!r}: {name or 'a precision for all'} was given before; expected it once"
            )
        found[name] = precision
    return found
