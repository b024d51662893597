"""The embedded text-to-image model's scheduler and UNet, trained in latents under a frozen text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.pretrain_clip import TEXT_WIDTH, prompt_ids
from mi2rage_training.pretrain_loop import Budget, Log, batches, clip_pixels, fit
from mi2rage_training.pretrain_vae import LATENT_CHANNELS

__all__ = ["new_scheduler", "pretrain_unet"]

_PROMPT_DROP = 0.1
_EMA = 0.995


def new_scheduler() -> Any:
    """DDIM over 1,000 cosine steps; the UNet predicts the clean latents."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def _new_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=6,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
        # the sentence as a whole joins the time embedding, so that every block knows of it
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def _encoded(vae: Any, text_model: Any, images: NDArray[np.uint8], ids: Any) -> tuple[Any, Any]:
    import torch

    with torch.no_grad():
        latents = [vae.encode(clip_pixels(images[at : at + 512])).latents for at in range(0, len(images), 512)]
        states = [text_model(ids[at : at + 512]).last_hidden_state.half() for at in range(0, len(ids), 512)]
    return torch.cat(latents) * vae.config.scaling_factor, torch.cat(states)


def pretrain_unet(
    images: NDArray[np.uint8],
    texts: Sequence[Sequence[str]],
    tokenizer: Any,
    text_model: Any,
    vae: Any,
    budget: Budget,
    seed: int,
    log: Log,
) -> Any:
    """A `UNet2DConditionModel` that predicts clean latents from noisy ones and the frozen text tower's states.

    Latents and text states are computed once. One prompt in ten is dropped, for guidance. Returns the running average
    of the weights.

    Args:
        images: uint8 `(N, 24, 24, 3)`.
        texts: for each image, the texts that go with it; one is drawn each time.
    """
    import torch
    from diffusers.training_utils import EMAModel
    from torch.nn import functional as F

    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    unet = _new_unet()
    first = np.cumsum([0, *(len(options) for options in texts)])
    flat = [text for options in texts for text in options]
    latents, states = _encoded(vae, text_model, images, prompt_ids(tokenizer, [*flat, ""]))
    counts = torch.tensor([len(options) for options in texts])
    starts = torch.from_numpy(first[:-1])
    scheduler = new_scheduler()
    average = EMAModel(unet.parameters(), decay=_EMA, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        clean = latents[rows]
        size = len(rows)
        chosen = starts[rows] + (torch.rand(size, generator=rng) * counts[rows]).long()
        chosen[torch.rand(size, generator=rng) < _PROMPT_DROP] = len(flat)
        noise = torch.randn(clean.shape, generator=rng)
        timesteps = torch.randint(0, 1000, (size,), generator=rng)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, states[chosen].float()).sample, clean)

    def after(step: int) -> None:
        average.step(unet.parameters())

    fit("unet", unet.parameters(), budget, batches(len(images), budget, "unet", seed), loss_of, log, after)
    average.copy_to(unet.parameters())
    return unet.eval()
