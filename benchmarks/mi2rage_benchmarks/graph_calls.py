"""Graph calls: the engine of one graph (or of two in a row) against the PyTorch module behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_benchmarks.work import Call, Work, WorkOptions, Works
from mi2rage_engines.bundle import Manifest, ParityRecord
from mi2rage_engines.engine import Array
from mi2rage_engines.errors import BundleError
from mi2rage_engines.spec import TensorSpec
from mi2rage_export import parity
from mi2rage_export.reference import draw_inputs, read_references

if TYPE_CHECKING:
    import torch

    from mi2rage_benchmarks.sides import BundleSide
    from mi2rage_engines.spec import Precision

__all__ = ["graph_works"]

_PLACES = "image_index"
"""The classifier's input that says which image a row has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GraphWork(Work):
    """Random arrays through graphs, each fed by those before it where it takes what they give.

    Attributes:
        names: of the graphs.
        specs: what the first graphs take and no earlier one gives; arrays: values for them.
        outputs: of the last graph.
    """

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    arrays: dict[str, Array]
    outputs: tuple[str, ...]
    folder: str

    def graphs(self, manifest: Manifest) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in manifest.graphs)

    def on_torch(self, models: Mapping[str, Any]) -> Call:
        import torch

        from mi2rage_export.families import family_of

        (role,) = self.roles
        model: Any = models[role]
        graphs = {graph.name: graph for graph in family_of(role, model).graphs(model)}  # type: ignore[arg-type]
        taken = {item.name: item.spec for name in self.names if name in graphs for item in graphs[name].inputs}
        self._check_fits(taken)
        network = model.pipeline.unet if role == "generator" else model.module
        place = next(network.parameters())
        host = {name: torch.from_numpy(array) for name, array in self.arrays.items()}

        def given() -> dict[str, torch.Tensor]:
            # Within the timed call: engines take arrays of the host too.
            return {
                name: tensor.to(place.device, place.dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in host.items()
            }

        # A classifier may be cut into two graphs; the module is one.
        if role == "classifier":
            del host[_PLACES]
            return lambda: _on_host((_inferred(model.module, **given()),))
        graph = graphs[self.names[-1]]
        names = [item.name for item in graph.inputs]

        def call() -> tuple[torch.Tensor, ...]:
            tensors = given()
            return _on_host(_inferred(graph.reference, *(tensors[name] for name in names)))

        return call

    def _check_fits(self, taken: Mapping[str, TensorSpec]) -> None:
        for theirs in self.specs:
            mine = taken.get(theirs.name)
            if mine is None or mine.shape != theirs.shape:
                raise BundleError(
                    f"{self.folder}: its {self.title} takes {theirs.name} {theirs.shape}, the given model "
                    f"{'no such input' if mine is None else f'{mine.name} {mine.shape}'}; expected the model that the "
                    "bundle was exported from; give that one, or export again"
                )

    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        engines = [side.engine(name) for name in self.graphs(side.manifest)]
        wanted = [[tensor.name for tensor in engine.inputs] for engine in engines]

        def run() -> list[Array]:
            known = dict(self.arrays)
            for engine, names in zip(engines, wanted, strict=True):
                known |= engine.run({name: known[name] for name in names})
            return [known[name] for name in self.outputs]

        return {"": run}

    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        worst = max(
            parity.difference(np.asarray(mine), np.asarray(theirs)).max_abs_scaled
            for mine, theirs in zip(found, expected, strict=True)
        )
        bound = parity.BOUNDS[precision].max_abs_scaled
        return (parity.record(self.title, "max_abs_scaled", worst, bound, 1),)


def _on_host(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float().cpu() for tensor in tensors)


def _inferred(call: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    with torch.inference_mode():
        return call(*args, **kwargs)


def _works(title: str, names: tuple[str, ...], side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]:
    references = read_references(side.folder).graphs
    present = tuple(name for name in names if name in side.manifest.graphs)
    specs: dict[str, TensorSpec] = {}
    sizes: dict[str, int] = {}
    given: set[str] = set()
    for name in present:
        graph = side.manifest.graphs[name]
        specs |= {tensor.name: tensor for tensor in graph.inputs if tensor.name not in given}
        given |= {tensor.name for tensor in graph.outputs}
        # Of the sizes that the export was checked at, the last but one is the usual one.
        sizes |= references[name].cases[-2].sizes
    sizes |= {axis: batch_size for axis in ("batch", "images") if axis in sizes}
    draws = {name: draw for graph in present for name, draw in references[graph].inputs.items()}
    arrays = draw_inputs(tuple(specs.values()), draws, sizes, options.seed)
    if present[-1] == "classifier/classifier":
        # Every row has an image of its own, as the module has it.
        arrays[_PLACES] = np.arange(batch_size)
    work = _GraphWork(
        title=title,
        kind="graph",
        items=batch_size,
        roles=(present[-1].partition("/")[0],),
        batch_size=batch_size,
        sizes=sizes,
        names=names,
        specs=tuple(specs.values()),
        arrays=arrays,
        outputs=references[present[-1]].outputs,
        folder=str(side.folder),
    )
    return [work]


def graph_works(title: str, *names: str) -> Works:
    """The work of graphs in a row, e.g. `generator/unet`; those that a bundle lacks are left out, but not the last."""
    return partial(_works, title, names)
