"""transformers' `VisionEncoderDecoderModel`: ViT and GPT-2, Swin and BERT, TrOCR, ...

Encoder and decoder are traced as they are: the wrappers only move tensors in and out of transformers' own caches, so
that what a decoder does with its heads and positions stays its own affair.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mi2rage_export.families.captioning import (
    CaptionShape,
    decoder_graph,
    decoder_reference,
    filled_cache,
    halves,
    listed_cache,
    placed_cache,
    split_heads,
    stacked_cache,
    static_decoder_graph,
    vision_graph,
    write_captioner,
)
from mi2rage_export.families.family import Family
from mi2rage_export.graphs import Graph

if TYPE_CHECKING:
    from mi2rage_training.pytorch_captioner import TorchCaptioner

__all__ = ["FAMILY"]


_CROSS_ATTENTION = {
    "gpt2": ("transformer.h", "crossattention", ("c_attn",)),
    "bert": ("bert.encoder.layer", "crossattention.self", ("key", "value")),
    "roberta": ("roberta.encoder.layer", "crossattention.self", ("key", "value")),
    "trocr": ("model.decoder.layers", "encoder_attn", ("k_proj", "v_proj")),
}
"""By the decoder's kind: its layers, the cross-attention in each, its projections to keys and values (one is both)."""


class EncoderWithCrossStates(nn.Module):
    """The vision encoder and the decoder's cross-attention projections of its states.

    pixel_values float32 (B, 3, H, W) -> `CaptionShape.cross`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        text = model.config.decoder
        layers, attention, names = _CROSS_ATTENTION[text.model_type]
        self.encoder = model.encoder
        self.to_decoder = getattr(model, "enc_to_dec_proj", None) or nn.Identity()
        self.heads = int(text.num_attention_heads)
        self.projections = nn.ModuleList(
            nn.ModuleList(layer.get_submodule(f"{attention}.{name}") for name in names)
            for layer in model.decoder.get_submodule(layers)
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        states = self.to_decoder(self.encoder(pixel_values=pixel_values).last_hidden_state)
        keys, values = [], []
        for item in self.projections:
            parts: Any = item
            projected = [project(states) for project in parts]
            key, value = projected if len(projected) == 2 else projected[0].chunk(2, -1)
            keys.append(split_heads(key, self.heads))
            values.append(split_heads(value, self.heads))
        return (*keys, *values)


class DecoderWithCache(nn.Module):
    """Any decoder of transformers with cross-attention, its caches as tensors.

    input_ids int64 (B, T), past_keys, past_values (layers, B, heads, P, size), `CaptionShape.cross` -> logits
    (B, 1, vocabulary) of the last position, present_keys, present_values (layers, B, heads, P + T, size).
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        # Where the decoder itself can leave the other positions out, it saves them the vocabulary's product.
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(decoder.forward).parameters else {}

    def forward(
        self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor, *cross: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        past, length = past_keys.shape[3], input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device) + past
        places = torch.arange(past + length, device=input_ids.device)
        return self._decode(
            input_ids, positions, places, filled_cache(past_keys, past_values), filled_cache(*halves(cross))
        )

    def _decode(
        self, input_ids: Tensor, positions: Tensor, places: Tensor, own: Any, cross: Any, **more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids stand at `positions` (T,), the keys in the decoder's own cache at `places`."""
        from transformers.cache_utils import EncoderDecoderCache

        cross_keys = cross.layers[0].keys
        # Given to the decoder, not left to it: transformers chooses between masks by sizes, and a trace would keep
        # what it chose for the sizes it saw.
        hidden = places > positions.unsqueeze(1)
        mask = torch.zeros_like(hidden, dtype=cross_keys.dtype).masked_fill(hidden, torch.finfo(cross_keys.dtype).min)
        output = self.decoder(
            input_ids,
            attention_mask=mask.expand(input_ids.shape[0], 1, -1, -1),
            # Only its shape is looked at, the cache holds what would be made of it.
            encoder_hidden_states=cross_keys.transpose(1, 2).flatten(2),
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
            **self._last,
            **more,
        )
        return output.logits[:, -1:], *stacked_cache(output.past_key_values.self_attention_cache)


class _PlacedPositions(nn.Module):
    """TrOCR's learned positions, counted on from a tensor; its own forward would read the tensor as a number."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, past_key_values_length: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + past_key_values_length
        states: Tensor = self.table(input_ids, position_ids=positions)
        return states


class StaticDecoderWithCache(DecoderWithCache):
    """The decoder with a cache of fixed length, see `captioning.static_decoder_graph`.

    Args:
        decoder: belongs to this module from now on.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        kind = decoder.config.model_type
        self._takes_positions = kind in ("gpt2", "bert")
        if kind == "trocr" and decoder.config.use_learned_position_embeddings:
            inner = decoder.model.decoder
            inner.embed_positions = _PlacedPositions(inner.embed_positions)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        *cross: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + position
        return self._decode(
            input_ids,
            positions,
            torch.arange(past_keys.shape[3], device=input_ids.device),
            placed_cache(past_keys, past_values, positions),
            filled_cache(*halves(cross)),
            **({"position_ids": positions.unsqueeze(0)} if self._takes_positions else {}),
        )


def _shape(captioner: TorchCaptioner) -> CaptionShape:
    model, spec = captioner.module, captioner.preprocessing
    text = model.config.decoder
    heads = int(text.num_attention_heads)
    blank = torch.zeros(1, 3, spec.height, spec.width, dtype=model.dtype, device=model.device)
    with torch.inference_mode():
        patches = model.encoder(pixel_values=blank).last_hidden_state.shape[1]
    return CaptionShape(
        layers=int(text.num_hidden_layers),
        heads=heads,
        head_size=int(text.hidden_size) // heads,
        patches=patches,
        vocabulary=int(text.vocab_size),
        positions=captioner.max_length,
    )


def _graphs(captioner: TorchCaptioner) -> tuple[Graph, ...]:
    """`vision` and `decoder`."""
    model, spec = captioner.module, captioner.preprocessing
    shape = _shape(captioner)

    def reference(pixel_values: Tensor) -> tuple[Tensor, ...]:
        start = torch.full((len(pixel_values), 1), captioner.bos_id, device=pixel_values.device)
        output = model(pixel_values=pixel_values, decoder_input_ids=start, use_cache=True)
        return listed_cache(output.past_key_values.cross_attention_cache)

    vision = EncoderWithCrossStates(model)
    width = int(model.decoder.config.hidden_size)
    return (
        vision_graph(vision, (spec.height, spec.width), shape, reference),
        decoder_graph(DecoderWithCache(model.decoder), shape, decoder_reference(model.decoder, width)),
    )


def _static_cache(captioner: TorchCaptioner) -> Graph:
    """`decoder_static`; with weights of its own, for its precision is its own affair."""
    decoder = captioner.module.decoder
    reference = decoder_reference(decoder, int(decoder.config.hidden_size))
    return static_decoder_graph(StaticDecoderWithCache(copy.deepcopy(decoder)), _shape(captioner), reference)


def _write(folder: Path, captioner: TorchCaptioner) -> dict[str, Any]:
    """The tokenizer; returns the manifest's fields."""
    return write_captioner(folder, captioner, _shape(captioner))


FAMILY = Family(
    name="vision-encoder-decoder",
    role="captioner",
    fits=lambda model: model.module.config.model_type == "vision-encoder-decoder",
    graphs=_graphs,
    write=_write,
    static_cache=_static_cache,
)
