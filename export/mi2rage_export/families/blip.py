"""BLIP captioners: a vision graph that emits the cross-attention's keys and values once, and one decoder graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mi2rage_export.families.captioning import (
    CaptionShape,
    decoder_graph,
    decoder_reference,
    halves,
    listed_cache,
    split_heads,
    static_decoder_graph,
    vision_graph,
    write_captioner,
)
from mi2rage_export.families.family import Family
from mi2rage_export.graphs import Graph

if TYPE_CHECKING:
    from mi2rage_training.pytorch_captioner import TorchCaptioner

__all__ = ["FAMILY"]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as BLIP computes it: (B, heads, T, size) each -> (B, T, heads * size); `mask` is added."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


class BlipVision(nn.Module):
    """BLIP's vision tower and the decoder's cross-attention projections of it, which depend on the image alone.

    pixel_values float32 (B, 3, H, W) -> `CaptionShape.cross`.
    """

    def __init__(self, captioner: Any) -> None:
        super().__init__()
        self.vision_model = captioner.vision_model
        layers = captioner.text_decoder.bert.encoder.layer
        self.heads = int(captioner.config.text_config.num_attention_heads)
        self.keys = nn.ModuleList([layer.crossattention.self.key for layer in layers])
        self.values = nn.ModuleList([layer.crossattention.self.value for layer in layers])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return tuple(split_heads(project(states), self.heads) for project in (*self.keys, *self.values))


class BlipDecoder(nn.Module):
    """BLIP's text decoder with its state as tensors; past length 0 is the prefill, so one graph serves every step.

    input_ids int64 (B, T), past_keys, past_values (layers, B, heads, P, size), `CaptionShape.cross` -> logits
    (B, 1, vocabulary) of the last position, present_keys, present_values (layers, B, heads, P + T, size).
    """

    def __init__(self, captioner: Any) -> None:
        super().__init__()
        decoder = captioner.text_decoder
        self.embeddings: Any = decoder.bert.embeddings
        self.layers = decoder.bert.encoder.layer
        self.head = decoder.cls
        self.heads = int(captioner.config.text_config.num_attention_heads)

    def forward(
        self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor, *cross: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        past, length = past_keys.shape[3], input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device) + past
        places = torch.arange(past + length, device=input_ids.device)

        def extended(past_states: Tensor, states: Tensor) -> Tensor:
            return torch.cat((past_states, states), 2)

        return self._decode(input_ids, positions, places, extended, (past_keys, past_values), cross)

    def _decode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        places: Tensor,
        extended: Callable[[Tensor, Tensor], Tensor],
        past: tuple[Tensor, Tensor],
        cross: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers; ids stand at `positions` (T,), keys at `places`; `extended` adds a layer's new to its past."""
        # Built from ids, not from a slice of the position buffer: a slice from 0 would be traced as a special case.
        states = self.embeddings(input_ids, position_ids=positions.unsqueeze(0))
        hidden = places > positions.unsqueeze(1)
        mask = torch.zeros_like(hidden, dtype=states.dtype).masked_fill(hidden, torch.finfo(states.dtype).min)
        seen_keys, seen_values = halves(cross)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            block: Any = layer
            attention = block.attention.self
            keys.append(extended(past[0][index], split_heads(attention.key(states), self.heads)))
            values.append(extended(past[1][index], split_heads(attention.value(states), self.heads)))
            context = _attend(split_heads(attention.query(states), self.heads), keys[-1], values[-1], mask)
            states = block.attention.output(context, states)
            states = self._cross(block, states, seen_keys[index], seen_values[index])
            states = block.feed_forward_chunk(states)
        return self.head(states[:, -1:]), torch.stack(keys), torch.stack(values)

    def _cross(self, layer: Any, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = layer.crossattention
        context = _attend(split_heads(attention.self.query(states), self.heads), keys, values, None)
        output: Tensor = attention.output(context, states)
        return output


class BlipStaticDecoder(BlipDecoder):
    """The decoder with a cache of fixed length, see `captioning.static_decoder_graph`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        *cross: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + position
        places = torch.arange(past_keys.shape[3], device=input_ids.device)

        def extended(past_states: Tensor, states: Tensor) -> Tensor:
            return past_states.index_copy(2, positions, states)

        return self._decode(input_ids, positions, places, extended, (past_keys, past_values), cross)


def _shape(captioner: TorchCaptioner) -> CaptionShape:
    text, vision = captioner.module.config.text_config, captioner.module.config.vision_config
    heads = int(text.num_attention_heads)
    return CaptionShape(
        layers=int(text.num_hidden_layers),
        heads=heads,
        head_size=int(text.hidden_size) // heads,
        patches=(vision.image_size // vision.patch_size) ** 2 + 1,
        vocabulary=int(text.vocab_size),
        positions=int(text.max_position_embeddings),
    )


def _graphs(captioner: TorchCaptioner) -> tuple[Graph, ...]:
    """`vision` and `decoder` of a BLIP captioner."""
    model, shape = captioner.module, _shape(captioner)
    vision = model.config.vision_config

    def reference(pixel_values: Tensor) -> tuple[Tensor, ...]:
        states = model.vision_model(pixel_values)[0]
        start = torch.full((len(states), 1), captioner.bos_id, device=states.device)
        output = model.text_decoder(start, encoder_hidden_states=states, use_cache=True)
        return listed_cache(output.past_key_values.cross_attention_cache)

    size_px = (int(vision.image_size), int(vision.image_size))
    return (
        vision_graph(BlipVision(model), size_px, shape, reference),
        decoder_graph(BlipDecoder(model), shape, decoder_reference(model.text_decoder, int(vision.hidden_size))),
    )


def _static_cache(captioner: TorchCaptioner) -> Graph:
    """`decoder_static`; with weights of its own, for its precision is its own affair."""
    model = captioner.module
    reference = decoder_reference(model.text_decoder, int(model.config.vision_config.hidden_size))
    return static_decoder_graph(copy.deepcopy(BlipStaticDecoder(model)), _shape(captioner), reference)


def _write(folder: Path, captioner: TorchCaptioner) -> dict[str, Any]:
    """The tokenizer; returns the manifest's fields."""
    return write_captioner(folder, captioner, _shape(captioner))


FAMILY = Family(
    name="blip",
    role="captioner",
    fits=lambda model: model.module.config.model_type == "blip",
    graphs=_graphs,
    write=_write,
    static_cache=_static_cache,
)
