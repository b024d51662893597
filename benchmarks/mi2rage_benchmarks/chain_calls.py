"""The chain as a call: micro-world texts to images to captions into a store, by PyTorch's models or by the bundle's."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_benchmarks.limits import OperationCounter
from mi2rage_benchmarks.whole_calls import torch_generator
from mi2rage_benchmarks.work import GENERATION_ALONE, Call, Work, WorkOptions
from mi2rage_engines.bundle import ParityRecord
from mi2rage_export import parity
from mi2rage_rt.images import decode_image
from mi2rage_rt.noise import seed_from
from mi2rage_rt.samples import Sample

if TYPE_CHECKING:
    from mi2rage_benchmarks.sides import BundleSide
    from mi2rage_engines.spec import Precision
    from mi2rage_training.pairs import Pair
    from mi2rage_training.stages import Overlap

__all__ = ["chain_works"]

_SHARD = 16
"""Texts a shard: several shards even of few texts, so that their stages can overlap."""


class _Counting:
    """A model whose calls are counted, in whatever thread they are made."""

    def __init__(self, model: Any, counter: OperationCounter) -> None:
        self._model = model
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._counter.counting():
            return self._model.generate(*args, **kwargs)

    def caption(self, *args: Any, **kwargs: Any) -> Any:
        with self._counter.counting():
            return self._model.caption(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chain(Work):
    """Texts into a store; `folder` is where stores are made, one a call."""

    pairs: Sequence[Pair]
    links: int
    steps: int
    guidance_scale: float
    seed: int
    folder: Path

    def on_torch(self, models: Mapping[str, Any]) -> Call:
        generator = torch_generator(models["generator"], self.steps, self.guidance_scale)
        return self._chain(generator, models["captioner"])

    def count(self, models: Mapping[str, Any]) -> tuple[Any, OperationCounter]:
        counter = OperationCounter()
        generator = torch_generator(models["generator"], self.steps, self.guidance_scale)
        return self._chain(_Counting(generator, counter), _Counting(models["captioner"], counter))(), counter

    def on_bundle(self, side: BundleSide) -> dict[str, Call]:
        from mi2rage_rt.generator import GenerateOptions
        from mi2rage_training.chain_models import Sampling, models_from_bundle

        options = GenerateOptions(steps=self.steps, guidance_scale=self.guidance_scale)
        generator = side.component("generator", options)
        if side.backend == "ort-cpu":  # as `synthesize --bundle` has it
            models = models_from_bundle(
                side.folder, Sampling(self.steps, self.guidance_scale), "cpu", threads=side.threads
            )
            chain = self._chain(models.generator, models.captioner, models.overlap)
        else:
            chain = self._chain(generator, side.component("captioner"))
        return {"": chain, GENERATION_ALONE: lambda: self._generate(generator)}

    def _chain(self, generator: Any, captioner: Any, overlap: Overlap | None = None) -> Call:
        from mi2rage_training.chain import ChainConfig, synthesize

        config = ChainConfig(links=self.links, seed=self.seed, shard_size=_SHARD)
        home = Path(tempfile.mkdtemp(dir=self.folder))
        numbers = itertools.count()

        def run() -> Path:
            number = next(numbers)
            shutil.rmtree(home / f"{number - 1}", ignore_errors=True)
            synthesize(self.pairs, home / f"{number}", generator, captioner, config, overlap=overlap)
            return home / f"{number}"

        return run

    def _generate(self, generator: Any) -> None:
        """As many images in batches as large, of the first link's prompts, and nothing done with them."""
        texts = [pair.sample.text for pair in self.pairs]
        for link, start in itertools.product(range(self.links), range(0, len(texts), _SHARD)):
            prompts = texts[start : start + _SHARD]
            generator.generate(prompts, [seed_from(self.seed, link, start, row) for row in range(len(prompts))])

    def compare(self, found: Any, expected: Any, precision: Precision) -> tuple[ParityRecord, ...]:
        from mi2rage_training.store import read_store

        mine, theirs = ({item.sample.id: item for item in read_store(store)} for store in (found, expected))
        first = [name for name, item in theirs.items() if item.provenance.link == 1]
        # Only the first link is made from the same prompts whatever rounding did to a caption.
        images = [np.stack([decode_image(side[name].image, name) for name in first]) for side in (mine, theirs)]
        same = float(np.mean([mine[name].caption == theirs[name].caption for name in first]))
        bound = parity.BOUNDS[precision].image_psnr_db
        return (
            parity.record(self.title, "image_psnr_db", parity.psnr_db(*images), bound, len(first), least=True),
            parity.record(self.title, "caption_agreement", same, None, len(first), least=True),
        )


def chain_works(side: BundleSide, batch_size: int, options: WorkOptions) -> list[Work]:
    """The chain of a number of texts; its batches are its shards, so that `batch_size` is not asked for."""
    from mi2rage_training.microworld.world import draw_post
    from mi2rage_training.pairs import Pair

    spec = side.manifest.generator
    assert spec is not None
    posts = [draw_post("test", options.seed, row) for row in range(options.texts)]
    pairs = [
        Pair(Sample(f"text-{row}", post.tweet.tokens, post.tweet.head, post.tweet.tail, post.label))
        for row, post in enumerate(posts)
    ]
    steps = options.steps or spec.steps
    folder = Path(tempfile.mkdtemp(prefix="mi2rage-bench-"))
    work = _Chain(
        roles=("generator", "captioner"),
        batch_size=min(_SHARD, len(pairs)),
        items=options.links * len(pairs),
        pairs=pairs,
        links=options.links,
        steps=steps,
        guidance_scale=spec.guidance_scale,
        seed=options.seed,
        sizes={"texts": len(pairs), "links": options.links, "shard": _SHARD, "steps": steps},
        folder=folder,
        title=f"chain, {len(pairs)} texts, {options.links} links, {steps} steps",
    )
    weakref.finalize(work, shutil.rmtree, folder, ignore_errors=True)
    return [work]
