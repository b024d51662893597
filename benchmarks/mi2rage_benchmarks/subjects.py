"""What can be benchmarked, by the names of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mi2rage_benchmarks.chain_calls import chain_works
from mi2rage_benchmarks.graph_calls import graph_works
from mi2rage_benchmarks.report import Kind
from mi2rage_benchmarks.whole_calls import caption_works, classify_works, generate_works
from mi2rage_benchmarks.work import Works
from mi2rage_engines.errors import BundleError, InputError

if TYPE_CHECKING:
    from mi2rage_benchmarks.sides import BundleSide

__all__ = ["ALL", "SUBJECTS", "Subject", "chosen_subjects"]

ALL = "all"


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """One thing to benchmark.

    Attributes:
        kind: see `Kind`.
        needs: the graphs without which a bundle does not have it.
        works: makes its cells' work.
        batched: whether it is run at each batch size; a chain has its own.
        usual: whether it is among those that are run when none is named.
    """

    name: str
    kind: Kind
    needs: tuple[str, ...]
    works: Works
    batched: bool = True
    usual: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The components it takes."""
        return tuple(dict.fromkeys(graph.partition("/")[0] for graph in self.needs))

    def is_in(self, side: BundleSide) -> bool:
        """Whether a bundle has what it takes."""
        return all(graph in side.manifest.graphs for graph in self.needs)


_UNET, _VAE, _TEXT = "generator/unet", "generator/vae_decoder", "generator/text_encoder"
_CLASSIFIER, _DECODER = "classifier/classifier", "captioner/decoder"

_ALL = (
    Subject(
        "classifier",
        "graph",
        (_CLASSIFIER,),
        graph_works("classifier", "classifier/image", _CLASSIFIER),
        usual=True,
    ),
    Subject("unet", "graph", (_UNET,), graph_works("generator step (UNet)", _UNET), usual=True),
    Subject("text-encoder", "graph", (_TEXT,), graph_works("text encoder", _TEXT)),
    Subject("vae-decoder", "graph", (_VAE,), graph_works("VAE decoder", _VAE)),
    Subject("classify", "whole", (_CLASSIFIER,), classify_works),
    Subject("generate", "whole", (_UNET,), generate_works),
    Subject("caption", "whole", (_DECODER,), caption_works),
    Subject("chain", "whole", (_UNET, _DECODER), chain_works, batched=False),
)
SUBJECTS = {subject.name: subject for subject in _ALL}
"""By name, in the order in which they are run."""


def chosen_subjects(names: Sequence[str], roles: Sequence[str], sides: Sequence[BundleSide]) -> list[Subject]:
    """The subjects to run, in their usual order.

    Args:
        names: as given; `all` stands for all that the bundles have, none for the graph calls of the classifier and the
            UNet.
        roles: the models that were named; where there are some and no subject is named, only what they do is run.
        sides: the bundles.

    Raises:
        InputError: a name is not known.
        BundleError: a bundle lacks what a named subject or model takes.
    """
    if unknown := sorted(set(names) - {ALL, *SUBJECTS}):
        raise InputError(f"subject {unknown[0]!r}: not known; expected some of {', '.join((*SUBJECTS, ALL))}")
    for side in sides:
        for role in roles:
            if getattr(side.manifest, role) is None:
                raise BundleError(
                    f"{side.folder}: this bundle has no {role}; leave --{role} out, or export a bundle that has one"
                )
    named = [subject for subject in _ALL if subject.name in names]
    for subject in named:
        for side in sides:
            if not subject.is_in(side):
                raise BundleError(
                    f"{side.folder}: this bundle has not all of {', '.join(subject.needs)}, which the subject "
                    f"{subject.name!r} takes; leave the subject out, or export a bundle that has them"
                )
    if named and ALL not in names:
        return named
    found = [subject for subject in _ALL if all(subject.is_in(side) for side in sides)]
    if ALL not in names:
        found = [item for item in found if item.usual and (not roles or set(item.roles) <= set(roles))]
    if not found:
        raise InputError(
            "nothing to run: the bundle has no graph calls among the usual ones (classifier, unet) for the models "
            f"given; name what to run with --subject: {', '.join((*SUBJECTS, ALL))}"
        )
    return found
