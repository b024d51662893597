"""PyTorch modules with exactly the inputs and outputs that a bundle's graphs have (see `mi2rage_engines.spec`).

Each holds the original module's own submodules and weights; nothing is copied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BlipDecoder", "BlipVision", "TextEncoder", "UNet", "VaeDecoder"]


class TextEncoder(nn.Module):
    """`CLIPTextModel`: input_ids int64 (B, T) -> last_hidden_state (B, T, width), pooler_output (B, width)."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(input_ids=input_ids)
        return output.last_hidden_state, output.pooler_output


class UNet(nn.Module):
    """`UNet2DConditionModel`: sample (B, C, h, w), timestep (), encoder_hidden_states (B, T, width) -> (B, C, h, w)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return output


class VaeDecoder(nn.Module):
    """`AutoencoderKL` or `AutoencoderTiny`: latent_sample (B, C, h, w), unscaled already -> sample (B, 3, H, W).

    The scaling factor stays outside, as in optimum's layout: the caller divides by it.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        sample: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return sample


def _split(states: Tensor, heads: int) -> Tensor:
    """(B, T, heads * size) -> (B, heads, T, size)."""
    return states.reshape(*states.shape[:2], heads, -1).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as BLIP computes it: (B, heads, T, size) each -> (B, T, heads * size); `mask` is added."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


class BlipVision(nn.Module):
    """BLIP's vision tower and the decoder's cross-attention projections of it, which depend on the image alone.

    pixel_values float32 (B, 3, H, W) -> cross_keys, cross_values (layers, B, heads, patches, size).
    """

    def __init__(self, captioner: Any) -> None:
        super().__init__()
        self.vision_model = captioner.vision_model
        layers = captioner.text_decoder.bert.encoder.layer
        self.heads = int(captioner.config.text_config.num_attention_heads)
        self.keys = nn.ModuleList([layer.crossattention.self.key for layer in layers])
        self.values = nn.ModuleList([layer.crossattention.self.value for layer in layers])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        keys = torch.stack([_split(project(states), self.heads) for project in self.keys])
        values = torch.stack([_split(project(states), self.heads) for project in self.values])
        return keys, values


class BlipDecoder(nn.Module):
    """BLIP's text decoder with its state as tensors; past length 0 is the prefill, so one graph serves every step.

    input_ids int64 (B, T), past_keys, past_values (layers, B, heads, P, size), cross_keys, cross_values
    (layers, B, heads, patches, size) -> logits (B, T, vocabulary), present_keys, present_values
    (layers, B, heads, P + T, size).
    """

    def __init__(self, captioner: Any) -> None:
        super().__init__()
        decoder = captioner.text_decoder
        self.embeddings: Any = decoder.bert.embeddings
        self.layers = decoder.bert.encoder.layer
        self.head = decoder.cls
        self.heads = int(captioner.config.text_config.num_attention_heads)

    def forward(
        self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        past, length = past_keys.shape[3], input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device) + past
        # Built from ids, not from a slice of the position buffer: a slice from 0 would be traced as a special case.
        states = self.embeddings(input_ids, position_ids=positions.unsqueeze(0))
        hidden = torch.arange(past + length, device=input_ids.device) > positions.unsqueeze(1)
        mask = torch.zeros_like(hidden, dtype=states.dtype).masked_fill(hidden, torch.finfo(states.dtype).min)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            block: Any = layer
            states, own_keys, own_values = self._own(block, states, past_keys[index], past_values[index], mask)
            states = self._cross(block, states, cross_keys[index], cross_values[index])
            states = block.feed_forward_chunk(states)
            keys.append(own_keys)
            values.append(own_values)
        return self.head(states), torch.stack(keys), torch.stack(values)

    def _own(
        self, layer: Any, states: Tensor, past_keys: Tensor, past_values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.attention.self
        keys = torch.cat((past_keys, _split(attention.key(states), self.heads)), 2)
        values = torch.cat((past_values, _split(attention.value(states), self.heads)), 2)
        context = _attend(_split(attention.query(states), self.heads), keys, values, mask)
        return layer.attention.output(context, states), keys, values

    def _cross(self, layer: Any, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = layer.crossattention
        context = _attend(_split(attention.self.query(states), self.heads), keys, values, None)
        output: Tensor = attention.output(context, states)
        return output
