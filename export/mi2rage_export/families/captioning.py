"""What the captioners' families share: the two graphs that the runtime runs, and the component's files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mi2rage_engines.spec import Axis, AxisRange, TokenizerSpec
from mi2rage_export.graphs import NORMAL, Graph, Input, below, outputs_from

if TYPE_CHECKING:
    from mi2rage_training.pytorch_captioner import TorchCaptioner

__all__ = [
    "CaptionShape",
    "decoder_graph",
    "decoder_reference",
    "filled_cache",
    "halves",
    "listed_cache",
    "placed_cache",
    "split_heads",
    "stacked_cache",
    "static_decoder_graph",
    "vision_graph",
    "write_captioner",
]


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionShape:
    """Sizes of a captioner's graphs: the decoder's layers, heads and head size, what the encoder gives, the ids.

    Attributes:
        patches: states that the encoder gives for an image.
        positions: ids that a caption may hold, the first one included.
    """

    layers: int
    heads: int
    head_size: int
    patches: int
    vocabulary: int
    positions: int

    @property
    def cross(self) -> dict[str, tuple[Axis, ...]]:
        """What the decoder sees of an image, by name: the layers' keys, then values, (batch, heads, patches, size).

        A tensor for each layer: out of one for all, a decoder would copy its part at every token.
        """
        names = [f"cross_{kind}_{layer}" for kind in ("keys", "values") for layer in range(self.layers)]
        return dict.fromkeys(names, ("batch", self.heads, self.patches, self.head_size))

    @property
    def cross_inputs(self) -> tuple[Input, ...]:
        """`cross`, as a decoder takes it."""
        return tuple(Input(name, "float32", shape, NORMAL) for name, shape in self.cross.items())

    def state(self, length: str) -> tuple[Axis, ...]:
        """(layers, batch, heads, `length`, size)"""
        return (self.layers, "batch", self.heads, length, self.head_size)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, T, heads * size) -> (B, heads, T, size)."""
    return states.reshape(*states.shape[:2], heads, -1).transpose(1, 2)


def halves(cross: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The keys of all layers, and their values, out of `CaptionShape.cross`."""
    return cross[: len(cross) // 2], cross[len(cross) // 2 :]


def filled_cache(keys: Tensor | Sequence[Tensor], values: Tensor | Sequence[Tensor]) -> Any:
    """A `DynamicCache` that holds keys and values of each layer, (B, heads, length, size)."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for index in range(len(keys)):
        cache.update(keys[index], values[index], index)
    return cache


def placed_cache(keys: Tensor, values: Tensor, positions: Tensor) -> Any:
    """A cache of fixed length that holds keys and values, each (layers, B, heads, length, size).

    What a decoder adds is written over what stands at `positions`, int64 (T,); the first of them counts as what is
    past, so that decoders number their positions from there.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class PlacedLayer(DynamicLayer):  # type: ignore[misc]
        keys: Tensor
        values: Tensor

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys = self.keys.index_copy(2, positions, key_states)
            self.values = self.values.index_copy(2, positions, value_states)
            return self.keys, self.values

        def get_seq_length(self) -> Tensor:
            return positions[0]

    cache = DynamicCache()
    for own_keys, own_values in zip(keys, values, strict=True):
        layer = PlacedLayer()
        layer.keys, layer.values, layer.is_initialized = own_keys, own_values, True
        cache.layers.append(layer)
    return cache


def listed_cache(cache: Any) -> tuple[Tensor, ...]:
    """The keys of each layer of a `DynamicCache`, then the values, (B, heads, length, size)."""
    return (*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers))


def stacked_cache(cache: Any) -> tuple[Tensor, Tensor]:
    """The keys and the values of a `DynamicCache`, each (layers, B, heads, length, size)."""
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


def vision_graph(
    module: nn.Module, size_px: tuple[int, int], shape: CaptionShape, reference: Callable[..., tuple[Tensor, ...]]
) -> Graph:
    """pixel_values float32 (B, 3, height, width) -> `shape.cross`."""
    return Graph(
        name="captioner/vision",
        module=module,
        inputs=(Input("pixel_values", "float32", ("batch", 3, *size_px), NORMAL),),
        outputs=outputs_from(**shape.cross),
        reference=reference,
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 2}, {"batch": 8}),
        axes={"batch": AxisRange(min=1, opt=8, max=32)},
    )


def decoder_graph(module: nn.Module, shape: CaptionShape, reference: Callable[..., tuple[Tensor, ...]]) -> Graph:
    """One graph for the prefill (past length 0) and every step; its tensors as `CaptionerSpec` has them.

    Its logits are those of the last position alone: of a prefill nothing else is asked, and a vocabulary is wide.
    """
    past, limit = shape.state("past"), shape.positions
    return Graph(
        name="captioner/decoder",
        module=module,
        inputs=(
            Input("input_ids", "int64", ("batch", "sequence"), below(shape.vocabulary)),
            Input("past_keys", "float32", past, NORMAL),
            Input("past_values", "float32", past, NORMAL),
            *shape.cross_inputs,
        ),
        outputs=outputs_from(
            logits=("batch", 1, shape.vocabulary),
            present_keys=shape.state("present"),
            present_values=shape.state("present"),
        ),
        reference=reference,
        traced={"batch": 2, "sequence": 3, "past": 4},
        checked=(
            {"batch": 1, "sequence": 1, "past": 0},
            {"batch": 3, "sequence": min(5, limit), "past": 0},
            {"batch": 4, "sequence": 1, "past": min(7, limit - 1)},
            {"batch": 2, "sequence": 3, "past": max(0, limit - 3)},
        ),
        axes={
            "batch": AxisRange(min=1, opt=8, max=32),
            "sequence": AxisRange(min=1, opt=1, max=min(32, limit)),
            "past": AxisRange(min=0, opt=min(16, limit - 1), max=limit - 1),
        },
    )


def decoder_reference(decoder: Any, encoder_width: int) -> Callable[..., tuple[Tensor, ...]]:
    """transformers' own decoder, its cache filled with the given keys and values, its masks and positions its own."""

    def reference(input_ids: Tensor, past_keys: Tensor, past_values: Tensor, *cross: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        own = filled_cache(past_keys, past_values) if past_keys.shape[3] else DynamicCache()
        cache = EncoderDecoderCache(own, filled_cache(*halves(cross)))
        # Their values are not read: the cache holds what the cross-attention would make of them.
        unused = torch.zeros(len(input_ids), cross[0].shape[2], encoder_width, device=input_ids.device)
        output = decoder(input_ids, encoder_hidden_states=unused, past_key_values=cache, use_cache=True)
        return output.logits[:, -1:], *stacked_cache(output.past_key_values.self_attention_cache)

    return reference


_LENGTHS = (8, 32, 64)
"""Smallest, usual and largest room of a static cache; what is written of a caption is mostly below 32."""
_PLACED_BELOW = 4
"""Parity cases begin at positions below."""


def static_decoder_graph(module: nn.Module, shape: CaptionShape, reference: Callable[..., tuple[Tensor, ...]]) -> Graph:
    """The decoder with a cache of fixed length, which holds the past up to `position` and is given back with the new.

    Every step has the same shapes, so that a CUDA graph of one can be replayed for all.

    Args:
        module: input_ids int64 (B, T), position int64 (1,), past_keys, past_values (layers, B, heads, length, size),
            `shape.cross` -> logits (B, 1, vocabulary), present_keys, present_values, of the past's shape.
        reference: of `decoder_graph`.
    """
    state, limit = shape.state("length"), shape.positions
    least, usual, most = (min(length, limit) for length in _LENGTHS)

    def placed(
        input_ids: Tensor, position: Tensor, past_keys: Tensor, past_values: Tensor, *cross: Tensor
    ) -> tuple[Tensor, ...]:
        start, end = int(position), int(position) + input_ids.shape[1]
        logits, keys, values = reference(input_ids, past_keys[..., :start, :], past_values[..., :start, :], *cross)
        keys = torch.cat((keys, past_keys[..., end:, :]), 3)
        return logits, keys, torch.cat((values, past_values[..., end:, :]), 3)

    return Graph(
        name="captioner/decoder_static",
        module=module,
        inputs=(
            Input("input_ids", "int64", ("batch", "sequence"), below(shape.vocabulary)),
            Input("position", "int64", (1,), below(min(_PLACED_BELOW, least - 2))),
            Input("past_keys", "float32", state, NORMAL),
            Input("past_values", "float32", state, NORMAL),
            *shape.cross_inputs,
        ),
        outputs=outputs_from(logits=("batch", 1, shape.vocabulary), present_keys=state, present_values=state),
        reference=placed,
        traced={"batch": 2, "sequence": 3, "length": 7},
        checked=(
            {"batch": 1, "sequence": 1, "length": least},
            {"batch": 3, "sequence": min(5, usual - _PLACED_BELOW), "length": usual},
            {"batch": 2, "sequence": 1, "length": most},
        ),
        axes={
            "batch": AxisRange(min=1, opt=8, max=32),
            "sequence": AxisRange(min=1, opt=1, max=min(32, limit)),
            "length": AxisRange(min=least, opt=usual, max=limit),
        },
    )


def write_captioner(folder: Path, captioner: TorchCaptioner, shape: CaptionShape) -> dict[str, Any]:
    """Copy the tokenizer into the component's folder; returns the manifest's fields."""
    shutil.copyfile(captioner.tokenizer_file, folder / "tokenizer.json")
    return {
        "name": captioner.name,
        "tokenizer": TokenizerSpec(
            file="captioner/tokenizer.json", max_length=captioner.max_length, pad_id=captioner.pad_id
        ),
        "preprocessing": captioner.preprocessing,
        "bos_id": captioner.bos_id,
        "eos_id": captioner.eos_id,
        "layers": shape.layers,
        "heads": shape.heads,
        "head_size": shape.head_size,
        "max_new_tokens": captioner.max_new_tokens,
        "text_prefixes": captioner.text_prefixes,
    }
