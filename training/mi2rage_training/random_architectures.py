"""Published architectures, as their `config.json` files on the hub describe them; the weights are up to the caller."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from torch import nn

__all__ = ["captioner_module", "classifier_towers", "scheduler", "text_encoders", "unet", "vae"]

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Published with PNDM, which remembers earlier steps and cannot be put into a table.
    "sd15": ("DDIMScheduler", _DDIM),
    "sd21": ("DDIMScheduler", {**_DDIM, "prediction_type": "v_prediction"}),
    "sd-turbo": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "original_inference_steps": 50}),
}

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD21: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": {**_SD21, "sample_size": 96, "upcast_attention": True},
    "sd-turbo": {**_SD21, "sample_size": 64},
    "sdxl": {**_SDXL, "sample_size": 128},
    "sdxl-turbo": {**_SDXL, "sample_size": 64},
    "lcm": {**_SD15, "sample_size": 96, "time_cond_proj_dim": 256},
}

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_OPENCLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPENCLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

_BLIP_VISION: dict[str, dict[str, Any]] = {
    "blip-base": {"num_attention_heads": 12},
    "blip-large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
_BLIP_TEXT: dict[str, Any] = {"num_attention_heads": 12}
_VIT: dict[str, Any] = {}
_GPT2: dict[str, Any] = {"add_cross_attention": True, "is_decoder": True}
_BERT: dict[str, Any] = {}
_CLIP_VISION: dict[str, Any] = {}
"""What differs from transformers' defaults, which are the base-sized models'."""


def scheduler(name: str) -> Any:
    """The sampler that a generator is published with (`sd15`: DDIM)."""
    kind, options = _SCHEDULERS[name]
    return getattr(diffusers, kind)(**_NOISE, **options)


def unet(name: str) -> nn.Module:
    """A generator's UNet."""
    module: nn.Module = diffusers.UNet2DConditionModel(**_UNETS[name])
    return module


def vae(name: str, *, tiny: bool = False) -> nn.Module:
    """A generator's VAE, or (`tiny`) the AutoencoderTiny (TAESD) that may stand for it."""
    if tiny:
        small: nn.Module = diffusers.AutoencoderTiny()
        return small
    size, factor = (1024, 0.13025) if name.startswith("sdxl") else (512, 0.18215)
    module: nn.Module = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
        scaling_factor=factor,
        force_upcast=name == "sdxl",
    )
    return module


def text_encoders(name: str) -> tuple[nn.Module, ...]:
    """A generator's text encoder, or the two of SDXL."""
    if name.startswith("sdxl"):
        return _clip_text(_CLIP_L), _clip_text(_OPENCLIP_G, projected=True)
    return (_clip_text(_OPENCLIP_H if name in ("sd21", "sd-turbo") else _CLIP_L),)


def _clip_text(options: dict[str, Any], *, projected: bool = False) -> nn.Module:
    # 2 as the end's id is what the published files say: CLIP then pools at the largest id, which is the end's.
    config = transformers.CLIPTextConfig(
        vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1, **options
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    module: nn.Module = kind(config)
    return module


def captioner_module(name: str) -> nn.Module:
    """`blip-base`, `blip-large` (384 px), or `vit-gpt2` (224 px)."""
    if name == "vit-gpt2":
        return _vit_gpt2()
    vision = {"image_size": 384, "patch_size": 16, "initializer_range": 0.02, **_BLIP_VISION[name]}
    text = {**_BLIP_TEXT, "encoder_hidden_size": vision.get("hidden_size", 768)}
    module: nn.Module = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=vision)
    )
    return module


def _vit_gpt2() -> nn.Module:
    encoder = transformers.ViTModel(transformers.ViTConfig(**_VIT))
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))
    module: Any = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    end = int(decoder.config.eos_token_id)
    for config in (module.config, module.generation_config):
        config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = config.bos_token_id = end
    made: nn.Module = module
    return made


def classifier_towers(vocabulary_size: int) -> tuple[Any, Any]:
    """BERT-base with a vocabulary of the given size, and the vision tower of CLIP ViT-B/32."""
    text = transformers.BertModel(transformers.BertConfig(vocab_size=vocabulary_size, **_BERT))
    return text, transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_CLIP_VISION))
