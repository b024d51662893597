"""diffusers' pipelines behind the runtime's protocol.

The noise of every row is drawn by `mi2rage_rt.noise` from the row's seed, with the same stream numbers as the runtime
uses, so that the same seed makes the same image on both sides: stream 0 is the initial latents, stream 1 + i the noise
that step i of a stochastic sampler adds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import ModelFolderError, require
from mi2rage_rt import noise
from mi2rage_training.pytorch_sources import (
    EMBEDDED,
    default_device,
    dtype_for,
    loading,
    quiet_loading,
    resolve,
    same_length,
)
from mi2rage_training.samplers import scheduler_class, scheduler_noise

if TYPE_CHECKING:
    import torch

__all__ = [
    "EMBEDDED",
    "PIPELINES",
    "GeneratorSettings",
    "TorchGenerator",
    "quiet_loading",
    "resolve",
    "usual_settings",
]

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
"""The pipelines of diffusers that `TorchGenerator` runs."""

_NO_CHECKS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": _NO_CHECKS,
    # Off even where the watermark's package is installed: images must not depend on that.
    "StableDiffusionXLPipeline": {"add_watermarker": False},
    "LatentConsistencyModelPipeline": _NO_CHECKS,
}

_DEFAULTS: dict[str, tuple[int, float]] = {
    "StableDiffusionPipeline": (20, 7.5),
    "StableDiffusionXLPipeline": (20, 5.0),
    "LatentConsistencyModelPipeline": (4, 8.5),
}
"""Steps and guidance scale of each kind."""

SETTINGS_NAME = "mi2rage.json"
"""Optional file of a generator's folder: `{"steps": .., "guidance_scale": .., "height": .., "width": ..}`."""


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
    """How images are sampled; sizes in pixels.

    A `guidance_scale` of 1 or less means no guidance, except where the UNet itself is told the scale (LCM).
    """

    steps: int
    guidance_scale: float
    height: int
    width: int


def usual_settings(name: str, pipeline: Any) -> GeneratorSettings:
    """What is usual for a pipeline's kind: steps and guidance of `_DEFAULTS`, the size that the UNet was trained for.

    Nothing in a turbo model's files tells it from another: it is known by its name, whose end is `turbo`.
    """
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else (size[0], size[1])
    steps, guidance_scale = (1, 0.0) if name.lower().endswith("turbo") else _DEFAULTS[type(pipeline).__name__]
    scale = int(pipeline.vae_scale_factor)
    return GeneratorSettings(steps, guidance_scale, height=rows * scale, width=columns * scale)


def _settings(folder: str, pipeline: Any, given: dict[str, Any]) -> GeneratorSettings:
    values = dataclasses.asdict(usual_settings(Path(folder).name, pipeline))
    path = Path(folder) / SETTINGS_NAME
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelFolderError(f"{path}: not valid JSON ({error}); expected an object of settings") from error
        unknown = sorted(set(stored) - set(values)) if isinstance(stored, dict) else [str(stored)]
        if unknown:
            raise ModelFolderError(f"{path}: unknown settings {unknown}; expected some of {sorted(values)}")
        values |= stored
    values |= {key: value for key, value in given.items() if value is not None}
    return GeneratorSettings(**values)


def _refuse_misfits(name: str, pipeline: Any) -> None:
    unet = pipeline.unet.config
    if unet.in_channels != unet.out_channels:
        raise ModelFolderError(
            f"{name}: its UNet takes {unet.in_channels} channels and gives {unet.out_channels}; expected a "
            "text-to-image UNet (in-painting and the like are not supported); give another generator"
        )
    scheduler = type(pipeline.scheduler).__name__
    if type(pipeline).__name__ == "LatentConsistencyModelPipeline" and scheduler != "LCMScheduler":
        raise ModelFolderError(
            f"{name}: a latent consistency model with {scheduler}; expected LCMScheduler; leave --scheduler out"
        )


class TorchGenerator:
    """A pipeline of diffusers as `TextToImage`: Stable Diffusion 1 and 2, SDXL, their turbo and LCM variants.

    Attributes:
        name: the hub id, or the folder's name.
        pipeline: one of `PIPELINES`, without safety checker and watermark.
        settings: steps, guidance scale and image size.

    Raises:
        ModelFolderError: the UNet does not make images from text alone, the sampler does not fit the pipeline, or the
            image size is no multiple of 8.
    """

    def __init__(self, name: str, pipeline: Any, settings: GeneratorSettings) -> None:
        self.name = name
        self.pipeline = pipeline
        self.settings = settings
        pipeline.set_progress_bar_config(disable=True)
        _refuse_misfits(name, pipeline)
        scale = pipeline.vae_scale_factor
        if settings.height % 8 or settings.width % 8:
            raise ModelFolderError(
                f"{name}: image size {settings.height} x {settings.width}; expected multiples of 8; pass another size"
            )
        self._latent_shape = (
            int(pipeline.unet.config.in_channels),
            settings.height // scale,
            settings.width // scale,
        )

    @classmethod
    def from_folder(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str | None = None,
    ) -> TorchGenerator:
        """Load a pipeline from a folder, the hub, or (`embedded`) from the package.

        What is not given comes from the folder's `mi2rage.json`, else it is usual for the kind: 20 steps and guidance
        7.5 (SDXL 5), for an LCM 4 and 8.5, without guidance in 1 step where the name ends in `turbo`; the UNet's size.

        Args:
            device, dtype: default CUDA and float16 where there is a GPU, else the CPU and float32.
            scheduler: one of `SCHEDULERS`, in place of the pipeline's own.

        Raises:
            ModelFolderError: nothing there, not one of `PIPELINES`, or a file of it cannot be read.
        """
        diffusers = require("diffusers", "train")
        require("transformers", "train")
        source = resolve(name_or_folder, "generator")
        expected = f"a Stable Diffusion pipeline (model_index.json with _class_name {', '.join(PIPELINES)})"
        device = device or default_device()
        with loading(source, expected):
            found = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
            if found in PIPELINES:
                pipeline = (
                    getattr(diffusers, found)
                    .from_pretrained(source, feature_extractor=None, image_encoder=None, **_OPTIONS[found])
                    .to(device, dtype or dtype_for(device))
                )
        if found not in PIPELINES:
            raise ModelFolderError(f"{source}: its class is {found}; expected {expected}; give another generator")
        if scheduler is not None:
            pipeline.scheduler = scheduler_class(scheduler).from_config(pipeline.scheduler.config)
        given = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
        name = Path(source).name if Path(source).is_dir() else source
        return cls(name, pipeline, _settings(source, pipeline, given))

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Images for prompts, uint8 `(B, H, W, 3)`; row i's noise is keyed by `seeds[i]` alone."""
        import torch

        same_length("prompts", prompts, "seeds", seeds)
        settings = self.settings
        if not prompts:
            return np.zeros((0, settings.height, settings.width, 3), dtype=np.uint8)
        pipeline = self.pipeline

        def draw(shape: tuple[int, ...], step: int) -> NDArray[np.float32]:
            return np.stack([noise.normal(seed, shape[1:], stream=1 + step) for seed in seeds])

        latents = np.stack([noise.normal(seed, self._latent_shape, stream=0) for seed in seeds])
        with torch.inference_mode(), quiet_loading(), scheduler_noise(pipeline.scheduler, draw):
            pixels = pipeline(
                prompt=list(prompts),
                latents=torch.from_numpy(latents).to(pipeline.device, pipeline.unet.dtype),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                height=settings.height,
                width=settings.width,
                output_type="np",
            ).images
        images: NDArray[np.uint8] = (pixels * 255).round().astype(np.uint8)
        return images
