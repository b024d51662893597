"""How good the embedded models are: what was asked for and is there, what is there and is said."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError
from mi2rage_rt.progress import track
from mi2rage_training.microworld import Corpus, attributes_in
from mi2rage_training.microworld import corpus as draw_corpus
from mi2rage_training.microworld.probe import AttributeProbe

__all__ = ["PARTS", "GeneratorSetting", "captions_of", "generated_images", "measure_models"]

PARTS: tuple[str, ...] = ("generator", "captioner", "image_encoder", "text_encoder", "probe")
_MEASURE_STREAM = 1_000_003
"""Added to the seed: measured on scenes that no pretraining seed in use has seen."""


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratorSetting:
    """How the generator is run: DDIM steps and guidance scale."""

    steps: int = 10
    guidance_scale: float = 2.5


def generated_images(pipeline: Any, prompts: Sequence[str], setting: GeneratorSetting, seed: int) -> NDArray[np.uint8]:
    """Images for prompts by a diffusers pipeline, uint8 `(B, H, W, 3)`."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    made = []
    for at in track(range(0, len(prompts), 64), "images"):
        noise = torch.Generator().manual_seed(seed + at)
        out = pipeline(
            list(prompts[at : at + 64]),
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance_scale,
            generator=noise,
            output_type="np",
        ).images
        made.append(np.round(out * 255).astype(np.uint8))
    return np.concatenate(made)


def captions_of(folder: Path, images: NDArray[np.uint8], prefix: str = "") -> list[str]:
    """Greedy captions of uint8 `(B, 24, 24, 3)` by the captioner in `folder`, without their prefix."""
    import torch
    from transformers import BertTokenizer, BlipForConditionalGeneration

    from mi2rage_training.pretrain_loop import clip_pixels

    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prefix).input_ids])
    captions: list[str] = []
    for at in track(range(0, len(images), 128), "captions"):
        pixels = clip_pixels(images[at : at + 128])
        with torch.no_grad():
            out = model.generate(pixel_values=pixels, input_ids=ids.expand(len(pixels), -1).clone(), max_new_tokens=24)
        captions += tokenizer.batch_decode(out[:, ids.shape[1] - 1 :], skip_special_tokens=True)
    return captions


def _kind(attribute: str) -> str:
    return attribute.split(":", maxsplit=1)[0]


def _rates(wanted: Sequence[frozenset[str]], found: Sequence[frozenset[str]]) -> dict[str, dict[str, float]]:
    """Recall of `wanted` and precision of `found`, overall and by kind of attribute."""
    hits: collections.Counter[str] = collections.Counter()
    want: collections.Counter[str] = collections.Counter()
    have: collections.Counter[str] = collections.Counter()
    for asked, seen in zip(wanted, found, strict=True):
        for counter, group in ((hits, asked & seen), (want, asked), (have, seen)):
            counter.update(key for attribute in group for key in ("all", _kind(attribute)))
    return {
        key: {"recall": round(hits[key] / want[key], 4), "precision": round(hits[key] / max(1, have[key]), 4)}
        for key in sorted(want)
    }


def _measured_generator(folder: Path, corpus: Corpus, probe: AttributeProbe, seed: int) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder / "generator")
    asked = [attributes_in(caption) for caption in corpus.captions]
    result: dict[str, Any] = {}
    for setting in (GeneratorSetting(10, 2.5), GeneratorSetting(10, 1.0), GeneratorSetting(5, 2.5)):
        images = generated_images(pipeline, corpus.captions, setting, seed)
        rates = _rates(asked, probe.present(images))
        result[f"steps={setting.steps}, guidance_scale={setting.guidance_scale}"] = {
            kind: rate["recall"] for kind, rate in rates.items()
        }
    return result


def measure_models(folder: Path | str, *, seed: int = 0, count: int = 400) -> dict[str, Any]:
    """The model card's numbers, on `count` fresh scenes.

    Returns:
        `probe`: recall and precision of the attribute probe on rendered scenes. `generator`: for each setting the share
        of asked-for attributes that the probe finds in the image. `captioner`: recall and precision of the attributes
        named in greedy captions of rendered scenes, without a prefix and after two names.

    Raises:
        ModelFolderError: a part of the models folder is missing.
    """
    folder = Path(folder)
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ModelFolderError(
                f"{folder}: has no folder '{part}'; expected the parts {', '.join(PARTS)}, "
                "as `mi2rage-rt pretrain --out FOLDER` makes them"
            )
    corpus = draw_corpus(seed + _MEASURE_STREAM, count)
    probe = AttributeProbe.load(folder)
    truth = [scene.attributes for scene in corpus.scenes]
    result: dict[str, Any] = {"seed": seed, "scenes": count, "probe": _rates(truth, probe.present(corpus.images))}
    result["generator"] = _measured_generator(folder, corpus, probe, seed)
    named = "keemina brosson and stal city :"
    result["captioner"] = {
        name: _rates(
            truth, [attributes_in(caption) for caption in captions_of(folder / "captioner", corpus.images, prefix)]
        )
        for name, prefix in (("no prefix", ""), ("after two names", named))
    }
    return result
