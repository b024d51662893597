"""A tiny CLIP: its text tower conditions the generator, its vision tower is the classifier's eye."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_training.microworld import IMAGE_PX
from mi2rage_training.pretrain_loop import Budget, Log, batches, clip_pixels, fit
from mi2rage_training.pretrain_words import MAX_PROMPT_TOKENS

__all__ = ["TEXT_WIDTH", "pretrain_clip", "prompt_ids", "write_preprocessor"]

TEXT_WIDTH = 96
_VISION_WIDTH = 64
_SHARED_WIDTH = 64


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids as the diffusion pipeline makes them, int64 `(B, 40)`: start, pieces, end, ends to fill."""
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


def _towers(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_PROMPT_TOKENS,
        projection_dim=_SHARED_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=3 * _VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=4,
        projection_dim=_SHARED_WIDTH,
    )
    return CLIPTextModel(text), CLIPVisionModel(vision)


def pretrain_clip(
    images: NDArray[np.uint8],
    texts: Sequence[Sequence[str]],
    tokenizer: Any,
    budget: Budget,
    seed: int,
    log: Log,
) -> tuple[Any, Any]:
    """Contrastive training of both towers; returns `(CLIPTextModel, CLIPVisionModel)`, without the projections.

    The text side is read at the end token and at a random place of the padding after it: the tower is causal, so each
    of these has seen the whole sentence, and the generator's cross-attention meets it at all of them.

    Args:
        images: uint8 `(N, 24, 24, 3)`.
        texts: for each image, the texts that go with it; one is drawn each time.
        tokenizer: the `CLIPTokenizer`.
    """
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    text_model, vision_model = _towers(tokenizer)
    text_head = torch.nn.Linear(TEXT_WIDTH, _SHARED_WIDTH, bias=False)
    vision_head = torch.nn.Linear(_VISION_WIDTH, _SHARED_WIDTH, bias=False)
    log_scale = torch.nn.Parameter(torch.tensor(2.3))
    flat = prompt_ids(tokenizer, [text for options in texts for text in options])
    ids = torch.split(flat, [len(options) for options in texts])
    pixels = clip_pixels(images)

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        tokens = torch.stack([ids[row][int(torch.randint(len(ids[row]), (), generator=rng))] for row in rows])
        hidden = text_model(tokens).last_hidden_state
        end = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
        later = end + (torch.rand(len(rows), generator=rng) * (MAX_PROMPT_TOKENS - end)).long()
        seen = F.normalize(vision_head(vision_model(pixels[rows]).pooler_output), dim=-1)
        each, target = torch.arange(len(rows)), torch.arange(len(rows))
        loss = torch.zeros(())
        for place in (end, later):
            said = F.normalize(text_head(hidden[each, place]), dim=-1)
            scores = log_scale.exp().clamp(max=50) * said @ seen.T
            loss = loss + (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 4
        return loss

    modules = (text_model, vision_model, text_head, vision_head)
    parameters = [log_scale, *(parameter for module in modules for parameter in module.parameters())]
    fit("clip", parameters, budget, batches(len(images), budget, "clip", seed), loss_of, log)
    return text_model.eval(), vision_model.eval()


def write_preprocessor(folder: Path, processor: str) -> None:
    """`preprocessor_config.json` of `CLIPImageProcessor` or `BlipImageProcessor`: 24 px, bicubic, [-1, 1]."""
    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    config: dict[str, Any] = {
        "image_processor_type": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    if processor == "CLIPImageProcessor":
        config |= {"do_center_crop": False, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
