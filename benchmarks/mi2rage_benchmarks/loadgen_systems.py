"""A bundle's models as systems that LoadGen can put to the test.

What LoadGen's sample library holds is in memory and as large as the model wants it: files are read, decoded and resized
before a run. Tokenizing, normalising, noise and decoding of the answer belong to what is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_benchmarks.loadgen_answers import System
from mi2rage_benchmarks.whole_calls import pictures, sentences
from mi2rage_engines.errors import DataError
from mi2rage_rt.image_folder import find_image
from mi2rage_rt.images import fitted, load_image
from mi2rage_rt.noise import seed_from
from mi2rage_rt.samples import Sample, read_samples

if TYPE_CHECKING:
    from mi2rage_engines.spec import GraphSpec, ImagePreprocessing
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.protocols import Image

__all__ = ["ROLES", "SystemOptions", "system_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class SystemOptions:
    """What the samples are, and how they are computed.

    Attributes:
        samples: JSONL or MNRE rows; None makes sentences of 4 to 24 words and pictures up.
        images: the folder of their images; None for the file's own.
        library: samples at most.
        batch_size: items computed together at most; None for the model's own number.
        steps: of denoising; None for the bundle's own. tokens: new ones of a caption at most; None for the bundle's.
        seed: of what is made up, and of noise.
    """

    samples: Path | None = None
    images: Path | None = None
    library: int = 64
    batch_size: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seed: int = 0


def system_of(role: str, bundle: Bundle, options: SystemOptions) -> System[Any]:
    """A component of a bundle as a system.

    Raises:
        BundleError: the bundle has no such component.
        DataError: the samples cannot be read, or the captioner's have no image.
    """
    return ROLES[role](bundle, options)


def _samples(options: SystemOptions) -> list[Sample]:
    if options.samples is None:
        return sentences(options.library, options.seed, length=None)
    return read_samples(options.samples)[: options.library]


def _images(
    samples: Sequence[Sample], options: SystemOptions, size: ImagePreprocessing, *, as_they_are: bool
) -> list[Image | None]:
    """The samples' images, resized unless the graph does that; made up where there is no file of samples."""
    if options.samples is None:
        return list(pictures(len(samples), size, options.seed))
    folder = options.images or options.samples.parent
    found = [None if sample.image is None else load_image(find_image(folder, sample.image)) for sample in samples]
    return [image if image is None or as_they_are else fitted(image, size) for image in found]


def _resizes(graphs: Mapping[Any, GraphSpec]) -> bool:
    return any(tensor.name == "image" for graph in graphs.values() for tensor in graph.inputs)


def _own(image: Image, number: int) -> Image:
    """A copy whose first pixel is the request's number: an image that two requests share would be encoded once."""
    copy = image.copy()
    copy[0, 0] = np.array([number >> 16, number >> 8, number], dtype=np.int64) & 255
    return copy


def _classifier(bundle: Bundle, options: SystemOptions) -> System[tuple[Sample, Image | None]]:
    model = bundle.classifier() if options.batch_size is None else bundle.classifier(options.batch_size)
    samples = _samples(options)
    images = _images(samples, options, model.spec.preprocessing, as_they_are=_resizes(model.spec.graphs))

    def request(index: int, number: int) -> tuple[Sample, Image | None]:
        image = images[index]
        return samples[index], None if image is None else _own(image, number)

    def call(items: list[tuple[Sample, Image | None]]) -> Any:
        return model.logits([sample for sample, _ in items], [image for _, image in items])

    return System(model.spec.name, len(samples), request, call, model.batch_size)


def _captioner(bundle: Bundle, options: SystemOptions) -> System[Image]:
    from mi2rage_rt.captioner import CaptionOptions

    usual = CaptionOptions()
    size = options.batch_size or usual.batch_size
    model = bundle.captioner(CaptionOptions(max_new_tokens=options.tokens, batch_size=size))
    found = _images(_samples(options), options, model.spec.preprocessing, as_they_are=_resizes(model.spec.graphs))
    images = [image for image in found if image is not None]
    if not images:
        raise DataError(
            f"{options.samples}: none of its {len(found)} samples has an image; expected some, which captions are "
            "written of; give a file whose rows name images, or none for pictures that are made up"
        )
    return System(model.name, len(images), lambda index, number: _own(images[index], number), model.caption, size)


def _generator(bundle: Bundle, options: SystemOptions) -> System[tuple[str, int]]:
    from mi2rage_rt.generator import GenerateOptions

    usual = GenerateOptions().batch_size
    size = options.batch_size or (usual if isinstance(usual, int) else 8)
    model = bundle.generator(GenerateOptions(steps=options.steps, batch_size=size))
    texts = [sample.text for sample in _samples(options)]

    def request(index: int, number: int) -> tuple[str, int]:
        # With the number in it no prompt is encoded once for two.
        return f"{texts[index]} {number}", seed_from("loadgen", options.seed, number)

    def call(items: list[tuple[str, int]]) -> Any:
        return model.generate([prompt for prompt, _ in items], [seed for _, seed in items])

    return System(model.name, len(texts), request, call, size)


ROLES: dict[str, Callable[[Bundle, SystemOptions], System[Any]]] = {
    "classifier": _classifier,
    "captioner": _captioner,
    "generator": _generator,
}
"""The components by the names they have on the command line."""
