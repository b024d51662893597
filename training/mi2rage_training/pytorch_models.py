"""PyTorch models behind the runtime's protocols: diffusers pipelines and transformers' BLIP.

The noise of every row is drawn by `mi2rage_rt.noise` from the row's seed, with the same stream numbers as the
runtime uses, so that the same seed makes the same image and the same caption on both sides:

- stream 0: the initial latents; stream 1 + i: the noise that step i of a stochastic sampler adds;
- captions: see `mi2rage_rt.decoding`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, ModelFolderError, require
from mi2rage_rt import noise
from mi2rage_training.pytorch_sources import (
    EMBEDDED,
    default_device,
    dtype_for,
    loading,
    quiet_loading,
    resolve,
    small_files,
)
from mi2rage_training.samplers import scheduler_class, scheduler_noise

if TYPE_CHECKING:
    import torch

    from mi2rage_engines.spec import ImagePreprocessing
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.text import PlainTokenizer

__all__ = ["EMBEDDED", "TorchCaptioner", "TorchGenerator", "quiet_loading", "resolve"]

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

        _same_length("prompts", prompts, "seeds", seeds)
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


def _same_length(first: str, a: Sequence[object], second: str, b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise DataError(f"{len(a)} {first} but {len(b)} {second}; expected one of each for every row")


class TorchCaptioner:
    """transformers' `BlipForConditionalGeneration` as `ImageToText`.

    Attributes:
        name: the hub id, or the folder's name.
        module: the model, in evaluation mode.
        tokenizer: as the runtime reads it.
        tokenizer_file: its `tokenizer.json`.
        preprocessing: how images become `pixel_values`.
        bos_id, eos_id, pad_id: BLIP's `[DEC]`, `[SEP]` and `[PAD]`.
        max_new_tokens: tokens written after the prefix, at most.
    """

    def __init__(
        self, name: str, module: Any, tokenizer_file: Path, preprocessing: ImagePreprocessing, max_new_tokens: int
    ) -> None:
        from mi2rage_engines.spec import TokenizerSpec
        from mi2rage_rt.text import PlainTokenizer

        self.name = name
        self.module = module.eval()
        self.tokenizer_file = tokenizer_file
        self.preprocessing = preprocessing
        text = self.module.config.text_config
        self.bos_id, self.eos_id, self.pad_id = int(text.bos_token_id), int(text.sep_token_id), int(text.pad_token_id)
        self.max_length = int(text.max_position_embeddings)
        self.max_new_tokens = max_new_tokens
        spec = TokenizerSpec(file=tokenizer_file.name, max_length=self.max_length, pad_id=self.pad_id)
        self.tokenizer: PlainTokenizer = PlainTokenizer(spec, tokenizer_file.parent)

    @classmethod
    def from_folder(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_new_tokens: int | None = None,
    ) -> TorchCaptioner:
        """Load a captioner from a folder, the hub, or (`embedded`) from the package.

        Args:
            device, dtype: default CUDA and float16 where there is a GPU, else the CPU and float32.
            max_new_tokens: default what the folder's generation config says, else 20.

        Raises:
            ModelFolderError: nothing there, not a `BlipForConditionalGeneration`, or a file of it cannot be read.
        """
        transformers = require("transformers", "train")

        from mi2rage_rt.images import preprocessing_from_folder

        source = resolve(name_or_folder, "captioner")
        expected = "a BLIP captioner (config.json with the architecture BlipForConditionalGeneration)"
        device = device or default_device()
        with loading(source, expected):
            found = transformers.PretrainedConfig.get_config_dict(source)[0].get("architectures") or ["unknown"]
            if "BlipForConditionalGeneration" in found:
                module = transformers.BlipForConditionalGeneration.from_pretrained(
                    source, dtype=dtype or dtype_for(device)
                ).to(device)
                files = small_files(source)
        if "BlipForConditionalGeneration" not in found:
            raise ModelFolderError(f"{source}: its class is {found[0]}; expected {expected}; give another captioner")
        limit = max_new_tokens or module.generation_config.max_new_tokens or 20
        name = Path(source).name if Path(source).is_dir() else source
        return cls(name, module, files / "tokenizer.json", preprocessing_from_folder(files), limit)

    def prompt_ids(self, prefix: str) -> list[int]:
        """The ids that decoding starts from: `[DEC]`, then the prefix's ids."""
        return [self.bos_id, *self.tokenizer.bare_ids(prefix)]

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Captions, greedy without seeds, nucleus-sampled with them; rows of equal prefix length run together."""
        prompts = [self.prompt_ids(prefix) for prefix in (prefixes if prefixes is not None else [""] * len(images))]
        _same_length("images", images, "prefixes", prompts)
        if seeds is not None:
            _same_length("images", images, "seeds", seeds)
        captions = [""] * len(images)
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids = self.generate_ids(
                [images[row] for row in rows],
                [prompts[row] for row in rows],
                None if seeds is None else [seeds[row] for row in rows],
            )
            for row, sequence in zip(rows, ids, strict=True):
                captions[row] = self.tokenizer.decode(sequence)
        return captions

    def generate_ids(
        self, images: Sequence[Image], prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The ids after `[DEC]` and before `[SEP]`, prefix included, of each row.

        Args:
            images: uint8 `(H, W, 3)` each.
            prompts: what `prompt_ids` gave, all of one length.
            seeds: None for greedy decoding.
        """
        import torch

        from mi2rage_rt.images import pixel_values

        pixels = torch.from_numpy(pixel_values(images, self.preprocessing))
        start = torch.tensor(prompts, dtype=torch.int64, device=self.module.device)
        room = self.max_length - start.shape[1]
        if room < 1:
            raise DataError(
                f"{self.name}: a prefix of {start.shape[1]} tokens leaves no room; expected a shorter one "
                f"(the model has {self.max_length} positions)"
            )
        # BLIP's generate drops the last column of what it is given (the tokenizer's [SEP]) and sets the first.
        padded = torch.nn.functional.pad(start, (0, 1), value=self.eos_id)
        with torch.inference_mode(), quiet_loading():
            output = self.module.generate(
                pixels.to(self.module.device, self.module.dtype),
                padded,
                attention_mask=torch.ones_like(padded),
                num_beams=1,
                do_sample=False,
                max_new_tokens=min(self.max_new_tokens, room),
                logits_processor=None if seeds is None else [self._sampler(seeds, start.shape[1])],
            )
        return [_between(row, self.eos_id) for row in output.tolist()]

    @staticmethod
    def _sampler(seeds: Sequence[int], start: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A logits processor that leaves only the token which the runtime's own sampling chooses."""
        import torch

        from mi2rage_rt.decoding import choose_tokens

        def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            chosen = choose_tokens(scores.float().cpu().numpy(), seeds, input_ids.shape[1] - start)
            only = torch.full_like(scores, float("-inf"))
            return only.scatter_(1, torch.from_numpy(chosen).to(scores.device)[:, None], 0.0)

        return choose


def _between(ids: list[int], eos_id: int) -> list[int]:
    """What stands after the first id and before the first `eos_id` behind it."""
    body = ids[1:]
    return body[: body.index(eos_id)] if eos_id in body else body
