"""What can be exported: the graphs of a Stable Diffusion pipeline, a BLIP captioner and a relation classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import Axis
from mi2rage_export import wrappers
from mi2rage_export.graphs import Graph, Input, Sizes, below, in_sequence, normal, outputs_from, padding_mask

if TYPE_CHECKING:
    from mi2rage_training.classifier_model import LoadedClassifier
    from mi2rage_training.pytorch_captioner import TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["captioner_graphs", "classifier_graphs", "generator_graphs"]


def generator_graphs(generator: TorchGenerator) -> tuple[Graph, ...]:
    """`text_encoder`, `unet` and `vae_decoder` of a Stable Diffusion pipeline, in optimum's names.

    Raises:
        ModelFolderError: the pipeline needs inputs that the runtime does not give.
    """
    pipeline = generator.pipeline
    _refuse_unsupported(generator)
    width = int(pipeline.text_encoder.config.hidden_size)
    length = int(pipeline.tokenizer.model_max_length)
    return (
        _text_encoder_graph(pipeline.text_encoder, length, width),
        _unet_graph(generator, length, width),
        _vae_graph(generator),
    )


def _refuse_unsupported(generator: TorchGenerator) -> None:
    pipeline, name = generator.pipeline, generator.name
    unet = pipeline.unet.config
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        raise ModelFolderError(f"{name}: its text encoder takes an attention mask; expected a CLIP text encoder")
    for option in ("time_cond_proj_dim", "addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        # The addition "text" is pooled from the prompt's states inside the UNet: it needs no further input.
        if unet.get(option) is not None and (option, unet[option]) != ("addition_embed_type", "text"):
            raise ModelFolderError(
                f"{name}: its UNet has {option}={unet[option]!r}, an input the runtime does not give; "
                "expected a Stable Diffusion 1 or 2 UNet; give another generator"
            )
    if unet.in_channels != unet.out_channels:
        raise ModelFolderError(
            f"{name}: its UNet takes {unet.in_channels} channels and gives {unet.out_channels}; expected a "
            "text-to-image UNet (in-painting and the like are not supported); give another generator"
        )


def _text_encoder_graph(text_encoder: Any, length: int, width: int) -> Graph:
    def reference(input_ids: Tensor) -> tuple[Tensor, ...]:
        output = text_encoder(input_ids)
        return output[0], output[1]

    vocabulary = int(text_encoder.config.vocab_size)
    return Graph(
        name="generator/text_encoder",
        module=wrappers.TextEncoder(text_encoder),
        inputs=(Input("input_ids", "int64", ("batch", length), below(vocabulary)),),
        outputs=outputs_from(last_hidden_state=("batch", length, width), pooler_output=("batch", width)),
        reference=reference,
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 2}, {"batch": 8}),
    )


def _latent_sizes(generator: TorchGenerator) -> tuple[Sizes, ...]:
    """Latent heights and widths: the smallest half-size, the usual, and one larger and not square."""
    unit = 2 ** (len(generator.pipeline.unet.config.block_out_channels) - 1)
    scale = generator.pipeline.vae_scale_factor
    height, width = generator.settings.height // scale, generator.settings.width // scale
    half_height, half_width = (max(unit, size // 2 // unit * unit) for size in (height, width))
    return (
        {"batch": 1, "height": half_height, "width": half_width},
        {"batch": 2, "height": height, "width": width},
        {"batch": 4, "height": height, "width": width + unit},
    )


def _unet_graph(generator: TorchGenerator, length: int, width: int) -> Graph:
    unet = generator.pipeline.unet
    channels = int(unet.config.in_channels)
    unit = 2 ** (len(unet.config.block_out_channels) - 1)
    steps = generator.pipeline.scheduler.config.num_train_timesteps

    def reference(sample: Tensor, timestep: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        return (unet(sample, timestep, states).sample,)

    shape = ("batch", channels, "height", "width")
    return Graph(
        name="generator/unet",
        module=wrappers.UNet(unet),
        inputs=(
            Input("sample", "float32", shape, normal),
            Input("timestep", "float32", (), below(steps)),
            Input("encoder_hidden_states", "float32", ("batch", length, width), normal),
        ),
        outputs=outputs_from(out_sample=shape),
        reference=reference,
        traced={"batch": 2, "height": 3 * unit, "width": 4 * unit},
        checked=_latent_sizes(generator),
    )


def _vae_graph(generator: TorchGenerator) -> Graph:
    vae = generator.pipeline.vae

    def reference(latents: Tensor) -> tuple[Tensor, ...]:
        return (vae.decode(latents).sample,)

    return Graph(
        name="generator/vae_decoder",
        module=wrappers.VaeDecoder(vae),
        inputs=(
            Input("latent_sample", "float32", ("batch", int(vae.config.latent_channels), "height", "width"), normal),
        ),
        outputs=outputs_from(sample=("batch", int(vae.config.out_channels), "image_height", "image_width")),
        reference=reference,
        traced={"batch": 2, "height": 6, "width": 8},
        checked=_latent_sizes(generator),
    )


def captioner_graphs(captioner: TorchCaptioner) -> tuple[Graph, ...]:
    """`vision` and `decoder` of a BLIP captioner."""
    config = captioner.module.config
    return _vision_graph(captioner, config), _decoder_graph(captioner, config)


def _cross_shape(config: Any) -> tuple[Axis, ...]:
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    heads = int(text.num_attention_heads)
    return (int(text.num_hidden_layers), "batch", heads, patches, int(text.hidden_size) // heads)


def _vision_graph(captioner: TorchCaptioner, config: Any) -> Graph:
    model = captioner.module
    size = int(config.vision_config.image_size)

    def reference(pixel_values: Tensor) -> tuple[Tensor, ...]:
        states = model.vision_model(pixel_values)[0]
        start = torch.full((len(states), 1), captioner.bos_id, device=states.device)
        output = model.text_decoder(start, encoder_hidden_states=states, use_cache=True)
        layers = output.past_key_values.cross_attention_cache.layers
        return torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])

    cross = _cross_shape(config)
    return Graph(
        name="captioner/vision",
        module=wrappers.BlipVision(model),
        inputs=(Input("pixel_values", "float32", ("batch", 3, size, size), normal),),
        outputs=outputs_from(cross_keys=cross, cross_values=cross),
        reference=reference,
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 2}, {"batch": 8}),
    )


def _decoder_graph(captioner: TorchCaptioner, config: Any) -> Graph:
    text = config.text_config
    cross = _cross_shape(config)
    layers, batch, heads, _, head_size = cross
    limit = int(text.max_position_embeddings)
    past: tuple[Axis, ...] = (layers, batch, heads, "past", head_size)
    present: tuple[Axis, ...] = (layers, batch, heads, "present", head_size)
    return Graph(
        name="captioner/decoder",
        module=wrappers.BlipDecoder(captioner.module),
        inputs=(
            Input("input_ids", "int64", ("batch", "sequence"), below(int(text.vocab_size))),
            Input("past_keys", "float32", past, normal),
            Input("past_values", "float32", past, normal),
            Input("cross_keys", "float32", cross, normal),
            Input("cross_values", "float32", cross, normal),
        ),
        outputs=outputs_from(
            logits=("batch", "sequence", int(text.vocab_size)), present_keys=present, present_values=present
        ),
        reference=_decoder_reference(captioner),
        traced={"batch": 2, "sequence": 3, "past": 4},
        checked=(
            {"batch": 1, "sequence": 1, "past": 0},
            {"batch": 3, "sequence": min(5, limit), "past": 0},
            {"batch": 2, "sequence": 1, "past": min(7, limit - 1)},
            {"batch": 4, "sequence": 3, "past": max(0, limit - 3)},
        ),
    )


def _decoder_reference(captioner: TorchCaptioner) -> Callable[..., tuple[Tensor, ...]]:
    """transformers' own decoder, its cache filled with the given keys and values."""
    model = captioner.module

    def reference(
        input_ids: Tensor, past_keys: Tensor, past_values: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        own, cross = DynamicCache(), DynamicCache()
        for index in range(len(cross_keys)):
            if past_keys.shape[3]:
                own.update(past_keys[index], past_values[index], index)
            cross.update(cross_keys[index], cross_values[index], index)
        cache = EncoderDecoderCache(own, cross)
        width = model.config.vision_config.hidden_size
        unused = torch.zeros(len(input_ids), cross_keys.shape[3], width, device=input_ids.device)
        output = model.text_decoder(input_ids, encoder_hidden_states=unused, past_key_values=cache, use_cache=True)
        layers = output.past_key_values.self_attention_cache.layers
        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        return output.logits, torch.stack(keys), torch.stack(values)

    return reference


def classifier_graphs(classifier: LoadedClassifier) -> tuple[Graph, ...]:
    """The relation classifier's one graph."""
    module, spec = classifier.module, classifier.preprocessing
    vocabulary = int(classifier.config.text_encoder["vocab_size"])
    limit = classifier.max_length
    index = ("batch",)
    return (
        Graph(
            name="classifier/classifier",
            module=module,
            inputs=(
                Input("input_ids", "int64", ("batch", "sequence"), below(vocabulary)),
                Input("attention_mask", "int64", ("batch", "sequence"), padding_mask),
                Input("head_index", "int64", index, in_sequence),
                Input("tail_index", "int64", index, in_sequence),
                Input("pixel_values", "float32", ("batch", 3, spec.height, spec.width), normal),
                Input("image_mask", "float32", index, below(2)),
            ),
            outputs=outputs_from(logits=("batch", len(classifier.labels))),
            reference=lambda *tensors: (module(*tensors),),
            traced={"batch": 2, "sequence": min(11, limit)},
            checked=(
                {"batch": 1, "sequence": min(8, limit)},
                {"batch": 3, "sequence": min(32, limit)},
                {"batch": 8, "sequence": limit},
            ),
        ),
    )
