"""Real architectures with random weights: what they cost can be measured where no weights can be had.

A weight is drawn uniformly with standard deviation 1 / sqrt(inputs of its unit), so that activations keep their size
from layer to layer and fit into fp16; what comes out is finite and neither flat nor constant, and means nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.images import preprocessing_from_folder
from mi2rage_rt.noise import seed_from
from mi2rage_training import random_architectures as architectures
from mi2rage_training.pytorch_sources import quiet_loading
from mi2rage_training.random_vocabularies import bert_tokenizer, clip_tokenizer, gpt2_tokenizer, save_tokenizer
from mi2rage_training.samplers import scheduler_class

if TYPE_CHECKING:
    from mi2rage_training.classifier_model import LoadedClassifier
    from mi2rage_training.pytorch_captioner import TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = [
    "CAPTIONERS",
    "CLASSIFIERS",
    "GENERATORS",
    "NAMES",
    "TINY_VAE",
    "draw_weights",
    "random_captioner",
    "random_classifier",
    "random_generator",
    "random_model",
]

GENERATORS = ("sd15", "sd21", "sd-turbo", "sdxl", "sdxl-turbo", "lcm")
CAPTIONERS = ("blip-base", "blip-large", "vit-gpt2")
CLASSIFIERS = ("bert-clip",)
NAMES = (*GENERATORS, *CAPTIONERS, *CLASSIFIERS)
TINY_VAE = "+taesd"
"""Behind a generator's name: AutoencoderTiny in place of its VAE."""

_LABELS = (
    *("None", "/per/per/parent", "/per/per/siblings", "/per/per/couple", "/per/per/neighbor", "/per/per/peer"),
    *("/per/per/charges", "/per/per/alumi", "/per/per/alternate_names", "/per/org/member_of"),
    *("/per/loc/place_of_residence", "/per/loc/place_of_birth", "/org/org/alternate_names", "/org/org/subsidiary"),
    *("/org/loc/locate_at", "/loc/loc/contain", "/per/misc/present_in", "/per/misc/awarded", "/per/misc/race"),
    *("/per/misc/religion", "/per/misc/nationality", "/misc/misc/part_of", "/misc/loc/held_on"),
)
"""MNRE's 23 relations, in its spelling."""

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_model(
    name: str, *, seed: int = 0, scheduler: str | None = None
) -> tuple[Literal["generator", "captioner", "classifier"], Any]:
    """The role and the model of a name, in fp32 on the CPU.

    Args:
        name: one of `NAMES`; a generator's may end in `+taesd`.
        seed: of the weights.
        scheduler: for a generator, one of `samplers.SCHEDULERS` in place of its own.

    Raises:
        ModelFolderError: no such name.
    """
    if name.removesuffix(TINY_VAE) in GENERATORS:
        return "generator", random_generator(name, seed=seed, scheduler=scheduler)
    if name in CAPTIONERS:
        return "captioner", random_captioner(name, seed=seed)
    if name in CLASSIFIERS:
        return "classifier", random_classifier(name, seed=seed)
    raise ModelFolderError(
        f"random weights {name!r}: not known; expected one of {', '.join(NAMES)}, a generator's with {TINY_VAE} behind "
        "it for the tiny VAE"
    )


def random_generator(name: str, *, seed: int = 0, scheduler: str | None = None) -> TorchGenerator:
    """A generator: `sd15` has 1.07 billion weights (4 GB), `sdxl` 3.5 billion (14 GB).

    Args:
        name: one of `GENERATORS`, with or without `+taesd`.
        seed: of the weights.
        scheduler: one of `samplers.SCHEDULERS` in place of its own.
    """
    from mi2rage_training.pytorch_models import TorchGenerator, usual_settings

    plain = name.removesuffix(TINY_VAE)
    with _Undrawn():
        unet, vae = architectures.unet(plain), architectures.vae(plain, tiny=name != plain)
        encoders = architectures.text_encoders(plain)
    for part, module in (("unet", unet), ("vae", vae), *((f"text {index}", m) for index, m in enumerate(encoders))):
        draw_weights(module.eval(), seed_from("random weights", name, part, seed))
    if name != plain:
        _dampen(vae)
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        "text_encoder": encoders[0],
        "tokenizer": clip_tokenizer("!" if plain in ("sd21", "sd-turbo") else "<|endoftext|>"),
        "scheduler": architectures.scheduler(plain),
    }
    with quiet_loading():
        pipeline = _pipeline(plain, parts, encoders)
    if scheduler is not None:
        pipeline.scheduler = scheduler_class(scheduler).from_config(pipeline.scheduler.config)
    return TorchGenerator(name, pipeline, usual_settings(plain, pipeline))


@torch.no_grad()
def _dampen(vae: Any) -> None:
    """AutoencoderTiny has no norms: drawn as they are, its last weights would saturate most pixels."""
    last = vae.decoder.layers[-1]
    last.weight.mul_(0.2)
    last.bias.fill_(0.5)  # the middle of its pixels, which go from 0 to 1


def _pipeline(name: str, parts: dict[str, Any], encoders: tuple[nn.Module, ...]) -> Any:
    if name.startswith("sdxl"):
        second = {"text_encoder_2": encoders[1], "tokenizer_2": clip_tokenizer("!")}
        return diffusers.StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    kind = diffusers.LatentConsistencyModelPipeline if name == "lcm" else diffusers.StableDiffusionPipeline
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def random_captioner(name: str, *, seed: int = 0) -> TorchCaptioner:
    """A captioner, one of `CAPTIONERS`; its tokenizer lies in a temporary folder for as long as it is used."""
    from mi2rage_training.pytorch_captioner import TorchCaptioner

    with _Undrawn():
        module = architectures.captioner_module(name)
    draw_weights(module, seed_from("random weights", name, seed))
    files = tempfile.TemporaryDirectory(prefix="mi2rage-")
    folder = Path(files.name)
    tokenizer = gpt2_tokenizer() if name == "vit-gpt2" else bert_tokenizer("[DEC]", "[ENC]")
    tokenizer_file = save_tokenizer(tokenizer, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(name)), encoding="utf-8")
    captioner = TorchCaptioner(name, module, tokenizer_file, preprocessing_from_folder(folder))
    weakref.finalize(captioner, files.cleanup)
    return captioner


def _preprocessor(name: str) -> dict[str, Any]:
    if name == "vit-gpt2":
        half = [0.5, 0.5, 0.5]
        size = {"height": 224, "width": 224}
        return {
            "image_processor_type": "ViTImageProcessor",
            "size": size,
            "resample": 2,
            "image_mean": half,
            "image_std": half,
        }
    size = {"height": 384, "width": 384}
    return {
        "image_processor_type": "BlipImageProcessor",
        "size": size,
        "resample": 3,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }


def random_classifier(name: str = "bert-clip", *, seed: int = 0) -> LoadedClassifier:
    """BERT-base and CLIP ViT-B/32 under the relation classifier's fusion, of the size that `train` gives it."""
    from mi2rage_rt.text import EntityMarkedTokenizer
    from mi2rage_training.classifier_model import ClassifierConfig, LoadedClassifier, RelationModule
    from mi2rage_training.fit_config import FitConfig

    usual = FitConfig()
    tokenizer = EntityMarkedTokenizer(bert_tokenizer().backend_tokenizer, usual.max_length)
    with _Undrawn():
        text, image = architectures.classifier_towers(tokenizer.vocabulary_size)
        module = RelationModule(text, image, len(_LABELS), width=usual.width, heads=usual.heads, dropout=usual.dropout)
    draw_weights(module, seed_from("random weights", name, seed))
    config = ClassifierConfig(
        name=name,
        labels=_LABELS,
        text_encoder=text.config.to_dict(),
        image_encoder=image.config.to_dict(),
        sources={"text_encoder": "random weights", "image_encoder": "random weights"},
        preprocessing=ImagePreprocessing(
            height=224, width=224, resize="shortest_edge", shortest_edge=224, mean=_CLIP_MEAN, std=_CLIP_STD
        ),
        width=usual.width,
        heads=usual.heads,
        dropout=usual.dropout,
        max_length=usual.max_length,
    )
    return LoadedClassifier(config, module.eval(), tokenizer)


class _Undrawn(TorchFunctionMode):
    """Within it, modules are made without drawing weights (minutes, for SDXL): `draw_weights` does that."""

    _DRAWS = frozenset(
        {"normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            # Zeros, not what happens to be there: trunc_normal_ draws again until all is within its bounds.
            with torch.no_grad():
                return (args[0] if args else (kwargs or {})["tensor"]).zero_()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw all weights of a module in place; norms begin as the identity, biases at 0.

    Args:
        module: on any device, in a floating dtype.
        seed: 0 to 2^63 - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, name, parameter in _own_parameters(module):
        if name == "bias":
            parameter.zero_()
        elif name == "weight" and parameter.ndim == 1:
            parameter.fill_(1)
        else:
            # Uniform: four times as fast as normal, and as good.
            bound = math.sqrt(3) * _deviation(part, name, parameter)
            parameter.uniform_(-bound, bound, generator=generator)


def _own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in seen:  # a tied one is drawn where it is met first, as an embedding
                seen.add(id(parameter))
                yield part, name, parameter


def _deviation(part: nn.Module, name: str, parameter: Tensor) -> float:
    if isinstance(part, nn.Embedding) or name != "weight":
        return 0.02
    # transformers' Conv1D, in GPT-2, is a linear layer that keeps its weight transposed.
    inputs = parameter.shape[0] if type(part).__name__ == "Conv1D" else parameter[0].numel()
    return 1 / math.sqrt(inputs)
