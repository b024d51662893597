"""What the python-backend models do with requests that Triton hands over: read, compute and encode, without Triton."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mi2rage_engines.engine import Array, Engine
from mi2rage_engines.errors import DataError
from mi2rage_engines.spec import CaptionerSpec, ClassifierSpec, ComponentSpec, GeneratorSpec
from mi2rage_rt.caption_options import CaptionOptions
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.classifier import RuntimeClassifier, softmax
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.images import encode_image
from mi2rage_rt.serve import rows
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.uploads import image_from_upload
from mi2rage_rt.text import EntityMarkedTokenizer, PlainTokenizer

__all__ = ["COMPONENT_FILE", "Loop", "ServedComponent", "Work", "open_loop"]

COMPONENT_FILE = "component.json"


class ServedComponent(BaseModel):
    """`component.json`, beside `model.py`.

    Attributes:
        component: its part of the bundle's manifest; files are relative to the version folder.
        graphs: the names of the models that run its graphs, by graph.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    component: ComponentSpec = Field(discriminator="kind")
    graphs: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One request, checked: its rows, and what they must have in common with others to share a run."""

    rows: Sequence[Any]
    key: Hashable


class Loop(abc.ABC):
    """What one service does with requests; `name` is that of its tensors in `MODELS`."""

    name: str

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    @abc.abstractmethod
    def read(self, inputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> Work:
        """Check a request.

        Args:
            inputs: by name, `(B, ...)`; BYTES as objects.
            parameters: the request's.

        Raises:
            InputError: it cannot be used.
        """

    @abc.abstractmethod
    def run(self, work: Work) -> dict[str, Array]:
        """The outputs of all rows, `(B, ...)`. Raises as the model's own call."""


class _Classifier(Loop):
    name = "classifier"

    def __init__(self, model: RuntimeClassifier, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.model = model

    def read(self, inputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> Work:
        rows.checked_parameters(self.name, parameters)
        files = _files(inputs, "image", len(inputs["tokens"]))
        found = [
            rows.relation_row(rows.words_from_json(text), head.tolist(), tail.tolist(), file, self.limits)
            for text, head, tail, file in zip(
                _texts(inputs, "tokens"), inputs["head"], inputs["tail"], files, strict=True
            )
        ]
        processing = self.model.spec.preprocessing
        images = [row.image and image_from_upload(row.image, self.limits, processing) for row in found]
        return Work([(row.sample, image) for row, image in zip(found, images, strict=True)], None)

    def run(self, work: Work) -> dict[str, Array]:
        samples, images = zip(*work.rows, strict=True)
        logits = self.model.logits(samples, images)
        shares = softmax(logits)
        labels = np.array([self.model.labels[place].encode() for place in shares.argmax(axis=1)], dtype=object)
        return {
            "relation": labels[:, None],
            "probability": shares.max(axis=1, keepdims=True),
            "logits": logits,
        }


class _Captioner(Loop):
    name = "captioner"

    def __init__(self, model: RuntimeCaptioner, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.model = model
        # A vision graph with preprocessing resizes by itself.
        in_graph = any(tensor.name == "image" for tensor in model.spec.graphs["vision"].inputs)
        self._processing = None if in_graph else model.spec.preprocessing

    def read(self, inputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> Work:
        given = rows.checked_parameters(self.name, parameters)
        options = rows.caption_options(self.model.options, given, self.limits)
        files = _files(inputs, "image", len(inputs["image"]))
        prefixes = _texts(inputs, "prefix") if "prefix" in inputs else [""] * len(files)
        seeds: Sequence[int | None] = _seeds(inputs) if "seed" in inputs else [None] * len(files)
        found = []
        for file, prefix, seed in zip(files, prefixes, seeds, strict=True):
            if file is None:
                raise DataError("image: is empty; expected an encoded image file; send one")
            rows.short_text("prefix", prefix, self.limits)
            found.append((image_from_upload(file, self.limits, self._processing), prefix, seed))
        return Work(found, (options, "seed" in inputs))

    def run(self, work: Work) -> dict[str, Array]:
        images, prefixes, seeds = zip(*work.rows, strict=True)
        options, is_drawn = cast(tuple[CaptionOptions, bool], work.key)
        captions = self.model.caption(images, prefixes, seeds if is_drawn else None, options)
        return {"caption": np.array([caption.encode() for caption in captions], dtype=object)[:, None]}


class _Generator(Loop):
    name = "generator"

    def __init__(self, model: RuntimeGenerator, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.model = model

    def read(self, inputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> Work:
        given = rows.checked_parameters(self.name, parameters)
        size = (self.model.spec.height, self.model.spec.width)
        options = rows.generate_options(self.model.options, given, size, self.limits)
        found = [
            rows.prompt_row(prompt, seed, self.limits)
            for prompt, seed in zip(_texts(inputs, "prompt"), _seeds(inputs), strict=True)
        ]
        return Work(found, options)

    def run(self, work: Work) -> dict[str, Array]:
        options = cast(GenerateOptions, work.key)
        images = self.model.generate([row.prompt for row in work.rows], [row.seed for row in work.rows], options)
        return {"image": np.array([encode_image(image) for image in images], dtype=object)[:, None]}


def _texts(inputs: Mapping[str, Array], name: str) -> list[str]:
    try:
        return [bytes(value).decode("utf-8") for value in inputs[name].reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); encode the text again") from error


def _files(inputs: Mapping[str, Array], name: str, count: int) -> list[bytes | None]:
    if name not in inputs:
        return [None] * count
    return [bytes(value) or None for value in inputs[name].reshape(-1).tolist()]


def _seeds(inputs: Mapping[str, Array]) -> list[int]:
    return [int(seed) for seed in inputs["seed"].reshape(-1).tolist()]


def open_loop(served: ServedComponent, engines: Mapping[str, Engine], folder: Path, batch_size: int) -> Loop:
    """The loop of a component around its graphs.

    Args:
        served: as `component.json` has it.
        engines: by graph.
        folder: where the component's files lie.
        batch_size: rows that the graphs are called with at most.

    Raises:
        ModelFolderError: a tokenizer is missing or damaged.
        EngineError: a graph lacks a tensor.
    """
    spec = served.component
    if isinstance(spec, ClassifierSpec):
        words = EntityMarkedTokenizer.from_spec(spec.tokenizer, folder)
        return _Classifier(RuntimeClassifier(spec, engines, words, batch_size))
    tokenizer = PlainTokenizer(spec.tokenizer, folder)
    if isinstance(spec, CaptionerSpec):
        return _Captioner(RuntimeCaptioner(spec, engines, tokenizer, CaptionOptions(batch_size=batch_size)))
    assert isinstance(spec, GeneratorSpec)
    second = None if spec.tokenizer_2 is None else PlainTokenizer(spec.tokenizer_2, folder)
    return _Generator(RuntimeGenerator(spec, engines, tokenizer, GenerateOptions(batch_size=batch_size), second))
