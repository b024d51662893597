"""Whole calls: what a user of the runtime calls, tokenizing, preprocessing, noise and decoding included."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_benchmarks.limits import OperationCounter
from mi2rage_benchmarks.work import Call, Work, WorkOptions
from mi2rage_engines.bundle import Manifest, ParityRecord
from mi2rage_export import parity
from mi2rage_rt.generate_options import GenerateOptions, graphs_to_load
from mi2rage_rt.noise import rng, seed_from
from mi2rage_rt.samples import Sample, Span

if TYPE_CHECKING:
    from mi2rage_benchmarks.sides import BundleSide
    from mi2rage_engines.spec import ImagePreprocessing, Precision
    from mi2rage_rt.protocols import Image

__all__ = ["caption_works", "classify_works", "generate_works", "pictures", "sentences"]

_WORDS = ("a", "man", "near", "the", "red", "car", "with", "two", "dogs", "at", "park", "#team", "@news", "RT", "!")
_LENGTH = 20


def sentences(count: int, seed: int, *, length: int | None = _LENGTH) -> list[Sample]:
    """Random sentences with two mentions, of `length` words, or of 4 to 24 where that is None."""
    samples = []
    for row in range(count):
        draws = rng(seed_from("bench sentence", seed, row))
        size = int(draws.integers(4, 25)) if length is None else length
        tokens = tuple(_WORDS[index] for index in draws.integers(0, len(_WORDS), size))
        head, tail = sorted(int(place) for place in draws.choice(size, 2, replace=False))
        samples.append(Sample(str(row), tokens, Span(head, head + 1), Span(tail, tail + 1)))
    return samples


def pictures(count: int, size: ImagePreprocessing, seed: int) -> list[Image]:
    """Smooth random pictures of the size that a model takes, uint8 (H, W, 3)."""
    made: list[Image] = []
    for row in range(count):
        coarse = rng(seed_from("bench picture", seed, row)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        places = np.arange(size.height) * 4 // size.height, np.arange(size.width) * 4 // size.width
        made.append(coarse[np.ix_(*places)])
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Classify(Work):
    """Samples with their images, to logits."""

    samples: Sequence[Sample]
    images: Sequence[Image]

    def on_torch(self, models: Mapping[str, Any]) -> Call:
        model = models["classifier"]
        return lambda: model.logits(self.samples, self.images, batch_size=len(self.samples))

    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        runtime = side.component("classifier", max(32, len(self.samples)))
        return {"": lambda: runtime.logits(self.samples, self.images)}

    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        apart, count = parity.difference(found, expected).max_abs_scaled, len(self.samples)
        agree = parity.agreement(found, expected)
        return (
            parity.record(self.title, "max_abs_scaled", apart, parity.BOUNDS[precision].max_abs_scaled, count),
            parity.record(self.title, "decision_agreement", agree, None, count, least=True),
        )


def classify_works(side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]:
    """One batch of sentences of twenty words, each with a picture of the size that the model takes."""
    spec = side.manifest.classifier
    assert spec is not None
    size = spec.preprocessing
    sizes = {"batch": batch_size, "words": _LENGTH, "height": size.height, "width": size.width}
    work = _Classify(
        title="classification",
        roles=("classifier",),
        batch_size=batch_size,
        items=batch_size,
        sizes=sizes,
        samples=sentences(batch_size, options.seed),
        images=pictures(batch_size, size, options.seed),
    )
    return [work]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generate(Work):
    """Prompts, no two alike, to images.

    Attributes:
        feature_cache: of bundles, see `GenerateOptions`; PyTorch runs every step whole. Above 1 the difference between
            the images has no bound, but is the price of what is gained, and operations are not held against anything.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    feature_cache: int = 1

    def on_torch(self, models: Mapping[str, Any]) -> Call:
        generator = torch_generator(models["generator"], self.steps, self.guidance_scale)
        return lambda: generator.generate(self.prompts, self.seeds)

    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        options = GenerateOptions(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=len(self.prompts),
            feature_cache=self.feature_cache,
        )
        runtime = side.component("generator", GenerateOptions(feature_cache=self.feature_cache))
        return {"": lambda: runtime.generate(self.prompts, self.seeds, options)}

    def count(self, models: Mapping[str, Any]) -> tuple[Any, OperationCounter]:
        answer, counter = super().count(models)
        if self.feature_cache > 1:  # those of PyTorch, of which bundles leave some out
            counter.flop = counter.moved_bytes = 0
        return answer, counter

    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        value = parity.psnr_db(found, expected)
        bound = parity.BOUNDS[precision].image_psnr_db if self.feature_cache == 1 else None
        return (parity.record(self.title, "image_psnr_db", value, bound, len(self.prompts), least=True),)

    def graphs(self, manifest: Manifest) -> tuple[str, ...]:
        assert manifest.generator is not None
        loaded = graphs_to_load(manifest.generator, GenerateOptions(feature_cache=self.feature_cache))
        return tuple(f"generator/{name}" for name in loaded)


def torch_generator(generator: Any, steps: int, guidance_scale: float) -> Any:
    """The generator with other settings, weights shared."""
    settings = dataclasses.replace(generator.settings, steps=steps, guidance_scale=guidance_scale)
    return type(generator)(generator.name, generator.pipeline, settings)


def generate_works(side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]:
    """One batch with classifier-free guidance and one without, where the model knows both; with caching, both again."""
    spec = side.manifest.generator
    assert spec is not None
    steps = options.steps or spec.steps
    distilled = any(tensor.name == "timestep_cond" for tensor in spec.graphs["unet"].inputs)
    scales = {"": spec.guidance_scale}
    if spec.guidance_scale > 1 and not distilled:
        scales = {", guided": spec.guidance_scale, ", no guidance": 1.0}
    prompts = tuple(" ".join(sample.tokens) for sample in sentences(batch_size, options.seed))
    seeds = tuple(seed_from("bench image", options.seed, row) for row in range(batch_size))
    sizes = {"batch": batch_size, "steps": steps, "height": spec.height, "width": spec.width}
    caches = {"": 1}
    if options.feature_cache > 1:
        graphs_to_load(spec, GenerateOptions(feature_cache=options.feature_cache))  # refuses a bundle that has none
        caches[f", feature cache {options.feature_cache}"] = options.feature_cache
    return [
        _Generate(
            title=f"generation, {steps} steps{words}{behind}",
            roles=("generator",),
            batch_size=batch_size,
            items=batch_size,
            sizes=sizes,
            prompts=prompts,
            seeds=seeds,
            steps=steps,
            guidance_scale=scale,
            feature_cache=interval,
        )
        for behind, interval in caches.items()
        for words, scale in scales.items()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Caption(Work):
    """Images to greedy captions."""

    images: Sequence[Image]
    tokens: int

    def on_torch(self, models: Mapping[str, Any]) -> Call:
        captioner = copy.copy(models["captioner"])
        captioner.max_new_tokens = self.tokens
        return lambda: captioner.caption(self.images)

    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        from mi2rage_rt.captioner import CaptionOptions

        runtime = side.component("captioner")
        options = CaptionOptions(max_new_tokens=self.tokens, batch_size=len(self.images))
        return {"": lambda: runtime.caption(self.images, options=options)}

    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        pairs = list(zip(found, expected, strict=True))
        shares = [parity.common_prefix(mine, theirs) for mine, theirs in pairs]
        bound = parity.BOUNDS[precision].caption_prefix
        # A caption that ends earlier is less work: where lengths differ, times are of unlike things.
        written = [sum(map(len, captions)) for captions in (found, expected)]
        return (
            parity.record(self.title, "caption_prefix", float(np.mean(shares)), bound, len(pairs), least=True),
            parity.record(self.title, "characters_written", written[0] / max(1, written[1]), None, len(pairs)),
        )


def caption_works(side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]:
    """One batch of pictures of the size that the model takes."""
    spec = side.manifest.captioner
    assert spec is not None
    size = spec.preprocessing
    sizes = {"batch": batch_size, "tokens": options.tokens, "height": size.height, "width": size.width}
    work = _Caption(
        title="caption, greedy",
        roles=("captioner",),
        batch_size=batch_size,
        items=batch_size,
        sizes=sizes,
        images=pictures(batch_size, size, options.seed),
        tokens=options.tokens,
    )
    return [work]
