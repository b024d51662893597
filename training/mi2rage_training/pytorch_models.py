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

__all__ = ["EMBEDDED", "TorchGenerator", "quiet_loading", "resolve"]

SETTINGS_NAME = "mi2rage.json"
"""Optional file of a generator's folder: `{"steps": .., "guidance_scale": .., "height": .., "width": ..}`."""


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
    """How images are sampled; sizes in pixels. A `guidance_scale` of 1 or less means no guidance."""

    steps: int
    guidance_scale: float
    height: int
    width: int


def _settings(folder: str, pipeline: Any, given: dict[str, Any]) -> GeneratorSettings:
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else (size[0], size[1])
    values: dict[str, Any] = {
        "steps": 20,
        "guidance_scale": 7.5,
        "height": rows * pipeline.vae_scale_factor,
        "width": columns * pipeline.vae_scale_factor,
    }
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


class TorchGenerator:
    """A Stable Diffusion pipeline of diffusers as `TextToImage`.

    Attributes:
        name: the hub id, or the folder's name.
        pipeline: the `StableDiffusionPipeline`, without its safety checker.
        settings: steps, guidance scale and image size.
    """

    def __init__(self, name: str, pipeline: Any, settings: GeneratorSettings) -> None:
        self.name = name
        self.pipeline = pipeline
        self.settings = settings
        pipeline.set_progress_bar_config(disable=True)
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

        What is not given comes from the folder's `mi2rage.json`, else 20 steps, guidance 7.5, the UNet's own size.

        Args:
            device, dtype: default CUDA and float16 where there is a GPU, else the CPU and float32.
            scheduler: one of `SCHEDULERS`, in place of the pipeline's own.

        Raises:
            ModelFolderError: nothing there, not a `StableDiffusionPipeline`, or a file of it cannot be read.
        """
        diffusers = require("diffusers", "train")
        require("transformers", "train")
        source = resolve(name_or_folder, "generator")
        expected = "a Stable Diffusion pipeline (model_index.json with _class_name StableDiffusionPipeline)"
        device = device or default_device()
        with loading(source, expected):
            found = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
            if found == "StableDiffusionPipeline":
                pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                    source,
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                ).to(device, dtype or dtype_for(device))
        if found != "StableDiffusionPipeline":
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
