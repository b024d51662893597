"""Ask the unpatched PyTorch models, in fp32, what the exports will be held to; see `reference`."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mi2rage_engines.bundle import sha256_of
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.parity import random_images, random_samples
from mi2rage_export.reference import (
    CaptionerReference,
    Case,
    ClassifierReference,
    DataReference,
    GeneratorReference,
    GraphReference,
    References,
    Sizes,
    picked,
    sha256_of_arrays,
    write_answers,
)
from mi2rage_rt.noise import seed_from

if TYPE_CHECKING:
    from mi2rage_export.given_data import GivenData
    from mi2rage_training.classifier_model import LoadedClassifier
    from mi2rage_training.pytorch_captioner import TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["record_component", "record_data", "record_graph"]

_PROMPTS = ("", "a photo of a dog", "two men near a red car in the park", "RT @news: what a game! #team")
_PREFIXES = ("", "a photo of")
_ROWS = 64
"""Samples of one batch of given data."""
_LARGE_CELLS = 32 * 32
"""Latent cells above which a generator is asked for two images of four steps: minutes, not hours, on a CPU."""


def record_graph(graph: Graph, folder: Path, seed: int) -> GraphReference:
    """Answers of the graph's module at its smallest, usual and largest sizes, into `parity/`.

    Args:
        graph: its `reference` is asked.
        folder: the bundle.
        seed: of the inputs.

    Raises:
        ParityError: an answer holds NaN or infinity; the first layer that made them is named.
    """
    cases: list[Case] = []
    answers: dict[str, NDArray[np.float32]] = {}
    for number, sizes in enumerate(graph.checked):
        case_seed = seed_from("parity", graph.name, seed, number)
        digest, found = _answers(graph, sizes, case_seed)
        answers |= {f"{number}/{name}": output for name, output in found.items()}
        cases.append(Case(sizes=dict(sizes), seed=case_seed, inputs_sha256=digest))
    write_answers(folder, graph.name.replace("/", "-"), answers)
    return GraphReference(
        graph=graph.name,
        inputs={item.name: item.draw for item in graph.inputs},
        outputs=tuple(spec.name for spec in graph.outputs),
        cases=tuple(cases),
    )


def _answers(graph: Graph, sizes: Sizes, seed: int) -> tuple[str, dict[str, NDArray[np.float32]]]:
    """The SHA-256 of one case's inputs, and what is kept of the outputs; all else is let go of with the call."""
    arrays = random_inputs(graph, sizes, seed)
    tensors = tuple(torch.from_numpy(arrays[item.name]) for item in graph.inputs)
    with torch.inference_mode():
        outputs = graph.reference(*tensors)
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        from mi2rage_export.finite import demand_finite

        demand_finite(graph, [arrays])
    kept = {spec.name: picked(output.numpy()) for spec, output in zip(graph.outputs, outputs, strict=True)}
    return sha256_of_arrays(arrays), kept


def record_component(references: References, role: str, model: Any, folder: Path, seed: int) -> References:
    """Add the answers of one component, end to end."""
    recorders: dict[str, Callable[[Any, Path, int], object]] = {
        "generator": _generator,
        "captioner": _captioner,
        "classifier": _classifier,
    }
    found = recorders[role](model, folder, seed)
    return references.model_copy(update={role: found})


def _generator(model: TorchGenerator, folder: Path, seed: int) -> GeneratorReference:
    model = _in_few_steps(model)
    settings = model.settings
    prompts = _PROMPTS[2:] if _is_large(model) else _PROMPTS
    seeds = tuple(seed_from("parity", seed, row) for row in range(len(prompts)))
    write_answers(folder, "generator", {"images": model.generate(prompts, seeds)})
    return GeneratorReference(
        prompts=prompts,
        seeds=seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
    )


def _is_large(model: TorchGenerator) -> bool:
    settings = model.settings
    return settings.height * settings.width > _LARGE_CELLS * int(model.pipeline.vae_scale_factor) ** 2


def _in_few_steps(model: TorchGenerator) -> TorchGenerator:
    """The same generator, in four steps at most where it is large."""
    if not _is_large(model):
        return model
    short = copy.copy(model)
    short.settings = dataclasses.replace(model.settings, steps=min(model.settings.steps, 4))
    return short


def _captioner(model: TorchCaptioner, folder: Path, seed: int) -> CaptionerReference:
    count = 8 if model.preprocessing.height <= 64 else 4
    images = random_images(count, model.preprocessing.height, model.preprocessing.width, seed)
    ids = tuple(
        tuple(tuple(row) for row in model.generate_ids(images, [model.prompt_ids(prefix)] * count))
        for prefix in _PREFIXES
    )
    return CaptionerReference(seed=seed, images=count, prefixes=_PREFIXES, ids=ids)


def _classifier(model: LoadedClassifier, folder: Path, seed: int) -> ClassifierReference:
    count = 16
    samples, images = random_samples(count, model.preprocessing, seed)
    write_answers(folder, "classifier", {"logits": model.logits(samples, images)})
    return ClassifierReference(seed=seed, samples=count)


def _logits(model: LoadedClassifier, data: GivenData) -> NDArray[np.float32]:
    """Of all samples, with the images of one batch in memory."""
    batches = [slice(start, start + _ROWS) for start in range(0, len(data.samples), _ROWS)]
    return np.concatenate(
        [model.logits(data.samples[batch], list(data.images[batch]), batch_size=_ROWS) for batch in batches]
    )


def record_data(models: dict[str, Any], data: GivenData, folder: Path) -> DataReference:
    """What the models make of given samples: logits of all, captions of 32 images, images of 4 sentences.

    Args:
        models: by role.
        data: the samples.
        folder: the bundle.
    """
    answers: dict[str, Any] = {}
    fields: dict[str, Any] = {"file": data.file.name, "sha256": sha256_of(data.file), "rows": len(data.samples)}
    if "classifier" in models:
        answers["logits"] = _logits(models["classifier"], data)
    if "captioner" in models:
        shown = list(itertools.islice((image for image in data.images if image is not None), 32))
        fields |= {"images": len(shown), "captions": tuple(models["captioner"].caption(shown) if shown else ())}
    if "generator" in models:
        generator = _in_few_steps(models["generator"])
        drawn = data.samples[:4]
        seeds = [seed_from("parity data", sample.id) for sample in drawn]
        answers["images"] = generator.generate([sample.text for sample in drawn], seeds)
        fields |= {"prompts": len(drawn), "steps": generator.settings.steps}
    write_answers(folder, "data", {name: np.asarray(array) for name, array in answers.items()})
    return DataReference(**fields)
