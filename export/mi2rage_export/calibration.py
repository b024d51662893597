"""Real inputs of a component's graphs: the runtime runs given samples, and what each graph is fed is kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mi2rage_engines.engine import Array, Engine, HostEngine
from mi2rage_engines.errors import DataError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import TensorSpec
from mi2rage_export.given_data import first_equal_images
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.noise import seed_from

if TYPE_CHECKING:
    from mi2rage_engines.bundle import Manifest
    from mi2rage_export.given_data import GivenData

__all__ = ["inputs_of_graphs"]

_MOST = 64
"""Calls of a graph that are kept, the first of them; a generator makes one a step."""
_SENTENCES = 4
_IMAGES = 16
_ROWS = 128


class _Recorder(HostEngine):
    """An engine that notes what it is given."""

    def __init__(self, engine: Engine, calls: list[dict[str, Array]]) -> None:
        self._engine = engine
        self._calls = calls

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(self._calls) < _MOST:
            self._calls.append({name: array.copy() for name, array in inputs.items()})
        return self._engine.run(inputs)


def inputs_of_graphs(folder: Path, manifest: Manifest, role: str, data: GivenData) -> dict[str, list[dict[str, Array]]]:
    """Inputs by graph name (`unet`, `decoder`, ...), at most 64 calls of each.

    Args:
        folder: the bundle, or its draft.
        manifest: with the component in fp32.
        role: `generator` draws the first 4 sentences, `captioner` describes the first 16 images, `classifier` reads
            the first 128 samples.
        data: the samples.

    Raises:
        DataError: a captioner is to be calibrated, and no sample has an image.
    """
    spec = getattr(manifest, role)
    calls: dict[str, list[dict[str, Array]]] = {name: [] for name in spec.graphs}
    by_file = {folder / graph.file: calls[name] for name, graph in spec.graphs.items()}
    bundle = Bundle(folder, manifest, lambda file: _Recorder(OrtEngine(file), by_file[file]))
    if role == "generator":
        samples = data.samples[:_SENTENCES]
        bundle.generator().generate([item.text for item in samples], [seed_from("calibration", s.id) for s in samples])
    elif role == "captioner":
        images = list(itertools.islice((image for image in data.images if image is not None), _IMAGES))
        if not images:
            raise DataError(f"{data.file}: no sample has an image; expected some to calibrate the captioner with")
        for static in (False, True) if "decoder_static" in spec.graphs else (False,):
            bundle.captioner(CaptionOptions(static_cache=static)).caption(images)
    else:
        shown = data.images[:_ROWS]
        bundle.classifier(batch_size=8).logits(data.samples[:_ROWS], shown, first_equal_images(shown))
    return calls
