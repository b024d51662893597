"""Stable Diffusion pipelines of diffusers' classes (1 and 2, LCM, SDXL) in about 0.2 M parameters each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.models.vocabularies import save_clip_tokenizer

MAX_LENGTH = 24
PIXELS = 24


def build_generator(
    folder: Path,
    *,
    vae: Literal["kl", "tiny"] = "kl",
    scheduler: str = "DDIMScheduler",
    scheduler_options: dict[str, Any] | None = None,
    text_width: int = 32,
    unet_options: dict[str, Any] | None = None,
    pipeline: str = "StableDiffusionPipeline",
    seed: int = 0,
) -> Path:
    """Write a random pipeline: 24 px images, 6x6x4 latents, one down-sampling in the UNet."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    vocabulary = save_clip_tokenizer(folder / "tokenizer", MAX_LENGTH)
    from transformers import CLIPTokenizer

    made = getattr(diffusers, pipeline)(
        vae=_vae(vae),
        text_encoder=_text_encoder(vocabulary, text_width),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=_unet(text_width, **(unet_options or {})),
        scheduler=_scheduler(scheduler, **(scheduler_options or {})),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(folder, made)


def build_lcm(folder: Path, *, seed: int = 0) -> Path:
    """Write a random latent consistency model: the UNet takes the embedded guidance scale."""
    return build_generator(
        folder,
        scheduler="LCMScheduler",
        unet_options={"time_cond_proj_dim": 16},
        pipeline="LatentConsistencyModelPipeline",
        seed=seed,
    )


def build_xl(
    folder: Path, *, scheduler: str = "EulerDiscreteScheduler", zero_negative: bool = True, seed: int = 0
) -> Path:
    """Write a random SDXL pipeline with text encoders of 32 and 48 channels, the second padded with `!`."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    vocabulary = save_clip_tokenizer(folder / "tokenizer", MAX_LENGTH)
    from transformers import CLIPTokenizer

    made = diffusers.StableDiffusionXLPipeline(
        vae=_vae("kl"),
        text_encoder=_text_encoder(vocabulary, 32),
        text_encoder_2=_text_encoder(vocabulary, 48, hidden_act="gelu", projection_dim=40, projected=True),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!"),
        unet=_unet(
            32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
            use_linear_projection=True,
        ),
        scheduler=_scheduler(scheduler),
        force_zeros_for_empty_prompt=zero_negative,
        add_watermarker=False,
    )
    return _save(folder, made)


def _scheduler(name: str, **options: Any) -> Any:
    import diffusers

    usual: dict[str, Any] = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    if name == "DDIMScheduler":
        usual |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return getattr(diffusers, name)(**(usual | options))


def _save(folder: Path, pipeline: Any) -> Path:
    pipeline.save_pretrained(folder)
    settings = {"steps": 4, "guidance_scale": 2.0, "height": PIXELS, "width": PIXELS}
    (folder / "mi2rage.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _text_encoder(vocabulary: int, width: int, *, projected: bool = False, **options: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    usual: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPTextConfig(**(usual | options))
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _unet(text_width: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    usual: dict[str, Any] = {
        "sample_size": 6,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(usual | options)).eval()


def _vae(kind: str) -> Any:
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=0.18215,
    )
    with torch.no_grad():  # PyTorch's own initialisation leaves the pictures all but grey
        vae.decoder.conv_out.weight.mul_(3)
    return vae.eval()


def check_generator(folder: Path) -> None:
    """Pictures must differ between seeds and between prompts, and must not be flat."""
    from mi2rage_training.pytorch_models import TorchGenerator

    images = TorchGenerator.from_folder(folder, device="cpu").generate(["a dog", "a dog", "a red car"], [1, 2, 1])
    assert images.shape == (3, PIXELS, PIXELS, 3)
    assert images.dtype == np.uint8
    spread = images.astype(np.float32)
    assert spread.std() > 10, spread.std()
    assert np.abs(spread[0] - spread[1]).mean() > 2
    assert np.abs(spread[0] - spread[2]).mean() > 0.01
