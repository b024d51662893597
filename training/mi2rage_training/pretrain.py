"""The embedded models from nothing: corpus, tokenizers, tiny CLIP, VAE, UNet, captioner, text encoder, probe."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import InputError, require
from mi2rage_rt.files import atomic_folder
from mi2rage_training.microworld import IMAGE_PX, Corpus
from mi2rage_training.microworld import corpus as draw_corpus
from mi2rage_training.microworld.probe import ATTRIBUTES, AttributeProbe
from mi2rage_training.pretrain_captioner import pretrain_captioner, pretrain_text_encoder, slotted_posts
from mi2rage_training.pretrain_card import write_card
from mi2rage_training.pretrain_clip import pretrain_clip, write_preprocessor
from mi2rage_training.pretrain_generator import new_scheduler, pretrain_unet
from mi2rage_training.pretrain_loop import Budget, Log, batches, clip_pixels, fit
from mi2rage_training.pretrain_measure import GeneratorSetting, measure_models
from mi2rage_training.pretrain_vae import vae_from_patches
from mi2rage_training.pretrain_words import bert_tokenizer, clip_tokenizer, save_bert_tokenizer, save_clip_tokenizer
from mi2rage_training.pytorch_models import SETTINGS_NAME
from mi2rage_training.slots import POST_PREFIX

__all__ = ["FULL", "PretrainSettings", "PretrainSummary", "measure_models", "pretrain"]


_FIRST_CORPUS = 6
"""Corpus seeds below it are for galleries and tests; pretraining with seed s draws corpus 6 + s."""
_FIRST_PROBE_CORPUS = 500_000


@dataclasses.dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Sizes of the pretraining; `scaled` shortens all of it."""

    scenes: int
    clip: Budget
    unet: Budget
    captioner: Budget
    text: Budget
    probe: Budget

    def scaled(self, scale: float) -> PretrainSettings:
        """The same with `scale` times the scenes and steps."""
        budgets = {
            field.name: getattr(self, field.name).scaled(scale)
            for field in dataclasses.fields(self)
            if field.name != "scenes"
        }
        return PretrainSettings(scenes=max(128, round(self.scenes * min(1.0, scale))), **budgets)


FULL = PretrainSettings(
    scenes=30_000,
    clip=Budget(steps=1200, batch=128, rate=1e-3),
    unet=Budget(steps=12_000, batch=64, rate=1.5e-3),
    captioner=Budget(steps=4500, batch=48, rate=1.5e-3),
    text=Budget(steps=3000, batch=64, rate=1.5e-3),
    probe=Budget(steps=900, batch=64, rate=2e-3),
)
"""The pretraining of the committed models."""


@dataclasses.dataclass(frozen=True, slots=True)
class PretrainSummary:
    """What `pretrain` wrote: the folder, its size, how long it took, and the measured figures if asked for."""

    folder: Path
    seed: int
    seconds: float
    size_bytes: int
    measured: dict[str, Any] | None


def pretrain(
    out: Path | str,
    *,
    seed: int = 0,
    scale: float = 1.0,
    measure: bool = False,
    force: bool = False,
    settings: PretrainSettings = FULL,
) -> PretrainSummary:
    """Make all embedded models from nothing and write them to `out`, whole or not at all.

    Args:
        out: the folder to write, in the layout of `microworld.models_folder()`.
        seed: keys the corpus, the weights and every draw.
        scale: times the steps (and, below 1, the scenes) of the full pretraining; 1 takes about an hour on one core.
        measure: measure the models once they are made and write `measured.json`.
        force: replace a folder that is there.
        settings: what `scale` multiplies.

    Raises:
        InputError: `scale` is not between 0.001 and 100, or `out` is not empty and `force` is off.
        MissingExtraError: torch, transformers or diffusers is not installed.
    """
    if not 0.001 <= scale <= 100:
        raise InputError(f"scale {scale}: expected a number from 0.001 to 100; 1 is the full pretraining")
    for package in ("torch", "transformers", "diffusers"):
        require(package, "train")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    settings = settings.scaled(scale)
    with atomic_folder(Path(out), force=force) as draft:
        log = Log()
        corpus = draw_corpus(_FIRST_CORPUS + seed, settings.scenes)
        _make_generator_and_eye(draft, corpus, settings, seed, log)
        _make_captioner_and_text_encoder(draft, corpus, settings, seed, log)
        _make_probe(draft, settings, seed, log)
        log.write(draft / "pretrain_log.jsonl")
        _write_recipe(draft, settings, seed, scale)
        measured = measure_models(draft, seed=seed) if measure else None
        if measured is not None:
            (draft / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        write_card(draft)
        size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    return PretrainSummary(Path(out), seed, round(time.perf_counter() - start, 1), size, measured)


def _texts(corpus: Corpus) -> list[list[str]]:
    return [
        [text, caption] if tweeted else [text]
        for text, caption, tweeted in zip(corpus.texts, corpus.captions, corpus.is_tweet, strict=True)
    ]


def _make_generator_and_eye(folder: Path, corpus: Corpus, settings: PretrainSettings, seed: int, log: Log) -> None:
    texts = _texts(corpus)
    tokenizer = clip_tokenizer(text for options in texts for text in options)
    text_model, vision_model = pretrain_clip(corpus.images, texts, tokenizer, settings.clip, seed, log)
    vision_model.save_pretrained(folder / "image_encoder")
    write_preprocessor(folder / "image_encoder", "CLIPImageProcessor")
    vae = vae_from_patches(corpus.images)
    unet = pretrain_unet(corpus.images, texts, tokenizer, text_model, vae, settings.unet, seed, log)
    _save_generator(folder / "generator", tokenizer, text_model, vae, unet)


def _save_generator(folder: Path, tokenizer: Any, text_model: Any, vae: Any, unet: Any) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_clip_tokenizer(tokenizer, folder / "tokenizer")
    chosen = GeneratorSetting()
    defaults = {"steps": chosen.steps, "guidance_scale": chosen.guidance_scale, "height": IMAGE_PX, "width": IMAGE_PX}
    (folder / SETTINGS_NAME).write_text(json.dumps(defaults, indent=1) + "\n", encoding="utf-8")


def _make_captioner_and_text_encoder(
    folder: Path, corpus: Corpus, settings: PretrainSettings, seed: int, log: Log
) -> None:
    tokenizer = bert_tokenizer([*corpus.texts, *corpus.captions, *slotted_posts(corpus)])
    captioner = pretrain_captioner(corpus, tokenizer, settings.captioner, seed, log)
    captioner.save_pretrained(folder / "captioner")
    save_bert_tokenizer(tokenizer, folder / "captioner")
    write_preprocessor(folder / "captioner", "BlipImageProcessor")
    proposed = json.dumps({"text_prefixes": [POST_PREFIX]}, indent=1)
    (folder / "captioner" / SETTINGS_NAME).write_text(proposed + "\n", encoding="utf-8")
    posts = [" ".join(tweet.tokens) for tweet in corpus.tweets if tweet is not None]
    encoder = pretrain_text_encoder(posts, tokenizer, settings.text, seed, log)
    encoder.save_pretrained(folder / "text_encoder")
    save_bert_tokenizer(tokenizer, folder / "text_encoder")


def _make_probe(folder: Path, settings: PretrainSettings, seed: int, log: Log) -> None:
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    scenes = draw_corpus(_FIRST_PROBE_CORPUS + seed, settings.scenes)
    pixels = clip_pixels(scenes.images)
    targets = torch.tensor(_targets([scene.attributes for scene in scenes.scenes]))
    probe = AttributeProbe.untrained()

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(probe.network(pixels[rows]), targets[rows])

    budget = settings.probe
    fit("probe", probe.network.parameters(), budget, batches(len(pixels), budget, "probe", seed), loss_of, log)
    probe.save(folder)


def _targets(attributes: Sequence[frozenset[str]]) -> NDArray[np.float32]:
    return np.array([[name in seen for name in ATTRIBUTES] for seen in attributes], dtype=np.float32)


def _write_recipe(folder: Path, settings: PretrainSettings, seed: int, scale: float) -> None:
    import diffusers
    import torch
    import transformers

    recipe = {
        "schema": "mi2rage-pretrain",
        "version": 1,
        "command": f"mi2rage-rt pretrain --out DIR --seed {seed} --scale {scale}",
        "seed": seed,
        "scale": scale,
        "settings": dataclasses.asdict(settings),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
    }
    (folder / "pretrain.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
