"""What all generators of the Stable Diffusion family share: wrappers, UNet and VAE graphs, what cannot be exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import Axis, AxisRange
from mi2rage_export.graphs import NORMAL, Graph, Input, Sizes, below, outputs_from

if TYPE_CHECKING:
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["down_sampling", "refuse_unsupported", "text_encoder_graph", "unet_graph", "vae_graph"]

_DECODED_PIXELS = 512 * 512
"""Pixels that are decoded in one call while checking."""

_CHECKED_CELLS = 2 * 128 * 128
"""Latent cells of one call while checking: attention over an SDXL image takes 1 GB a row in fp32."""


class TextEncoder(nn.Module):
    """A text encoder of CLIP's: input_ids int64 (B, T) -> the named outputs.

    `hidden_states.i` is what goes into layer i (B, T, width); the other names are the model's own.
    """

    def __init__(self, text_encoder: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.names = names

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return picked_outputs(self.text_encoder, self.names, input_ids)


def picked_outputs(text_encoder: Callable[..., Any], names: tuple[str, ...], input_ids: Tensor) -> tuple[Tensor, ...]:
    """The outputs of transformers' text encoder by optimum's names."""
    layers = any("." in name for name in names)
    output = text_encoder(input_ids=input_ids, output_hidden_states=layers)
    picked = []
    for name in names:
        field, _, layer = name.partition(".")
        value = getattr(output, field)
        picked.append(value[int(layer)] if layer else value)
    return tuple(picked)


class UNet(nn.Module):
    """`UNet2DConditionModel`: sample (B, C, h, w), timestep (), encoder_hidden_states (B, T, width) -> (B, C, h, w).

    `further` are the names of up to three inputs more, in order: the exporter knows no inputs by keyword.
    """

    def __init__(self, unet: nn.Module, further: tuple[str, ...]) -> None:
        super().__init__()
        self.unet = unet
        self.further = further

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        first: Tensor | None = None,
        second: Tensor | None = None,
        third: Tensor | None = None,
    ) -> Tensor:
        given = dict(zip(self.further, (first, second, third), strict=False))
        guidance = given.pop("timestep_cond", None)
        output: Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=guidance,
            added_cond_kwargs=given or None,
            return_dict=False,
        )[0]
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


def down_sampling(generator: TorchGenerator) -> int:
    """How often the UNet halves the latents, as a factor: their sides must be multiples of it."""
    return int(2 ** (len(generator.pipeline.unet.config.block_out_channels) - 1))


def refuse_unsupported(generator: TorchGenerator, additions: tuple[str | None, ...]) -> None:
    """Refuse a pipeline that the runtime could not run.

    Args:
        generator: any of diffusers' pipelines that `TorchGenerator` takes.
        additions: the `addition_embed_type`s of the family's UNets.

    Raises:
        ModelFolderError: it needs inputs that the runtime does not give, or is set to a size the graphs cannot make.
    """
    pipeline, name, settings = generator.pipeline, generator.name, generator.settings
    unet, vae = pipeline.unet.config, pipeline.vae.config
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, part, None)
        if encoder is not None and getattr(encoder.config, "use_attention_mask", False):
            raise ModelFolderError(f"{name}: its {part} takes an attention mask; expected a CLIP text encoder")
    for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        allowed = additions if option == "addition_embed_type" else (None,)
        if unet.get(option) not in allowed:
            raise ModelFolderError(
                f"{name}: its UNet has {option}={unet[option]!r}, an input the runtime does not give; "
                f"expected one of {', '.join(map(repr, allowed))}; give another generator"
            )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ModelFolderError(
            f"{name}: its VAE has a mean and a deviation for each latent channel; expected one scaling factor for all; "
            "give another generator or VAE"
        )
    unit = down_sampling(generator) * int(pipeline.vae_scale_factor)
    if settings.height % unit or settings.width % unit:
        raise ModelFolderError(
            f"{name}: image size {settings.height} x {settings.width}; expected multiples of {unit} (the VAE's and the "
            "UNet's down-sampling); choose such a size"
        )


def text_encoder_graph(text_encoder: Any, name: str, length: int, shapes: dict[str, tuple[Axis, ...]]) -> Graph:
    """One text encoder.

    Args:
        text_encoder: `CLIPTextModel` or `CLIPTextModelWithProjection`.
        name: `generator/<folder>`.
        length: ids in a row.
        shapes: of the outputs, by name.
    """
    names = tuple(shapes)
    return Graph(
        name=name,
        module=TextEncoder(text_encoder, names),
        inputs=(Input("input_ids", "int64", ("batch", length), below(int(text_encoder.config.vocab_size))),),
        outputs=outputs_from(**shapes),
        reference=lambda input_ids: picked_outputs(text_encoder, names, input_ids),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 2}, {"batch": 16}),
        axes={"batch": AxisRange(min=1, opt=2, max=16)},
    )


def _latent_sizes(generator: TorchGenerator) -> tuple[Sizes, ...]:
    """Latent heights and widths: the smallest half-size, the usual, and one larger and not square.

    The larger the image the fewer of them: ONNX Runtime holds the attention of a 512 x 576 image several times over, at
    0.7 GB a time in SD 1.5, and the peak of memory is decided here.
    """
    unit, scale = down_sampling(generator), generator.pipeline.vae_scale_factor
    height, width = generator.settings.height // scale, generator.settings.width // scale
    half_height, half_width = (max(unit, size // 2 // unit * unit) for size in (height, width))

    def batch(wanted: int, cells: int) -> int:
        return max(1, min(wanted, _CHECKED_CELLS // cells))

    return (
        {"batch": batch(4, half_height * half_width), "height": half_height, "width": half_width},
        {"batch": batch(2, height * width), "height": height, "width": width},
        {"batch": 1, "height": height, "width": width + unit},
    )


def _latent_axes(generator: TorchGenerator, opt_batch: int) -> dict[str, AxisRange]:
    """Half to twice the usual size; a batch of images is twice as large in the UNet where there is guidance."""
    axes = {"batch": AxisRange(min=1, opt=opt_batch, max=16)}
    scale = generator.pipeline.vae_scale_factor
    smallest = _latent_sizes(generator)[0]
    for side in ("height", "width"):
        usual = getattr(generator.settings, side) // scale
        axes[side] = AxisRange(min=smallest[side], opt=usual, max=2 * usual)
    return axes


def unet_graph(generator: TorchGenerator, length: int, width: int, *, pooled: int | None = None) -> Graph:
    """The UNet.

    Args:
        generator: whose it is.
        length, width: of the text encoders' states.
        pooled: width of the pooled text (`text_embeds`), None where the UNet takes none.
    """
    unet = generator.pipeline.unet
    shape = ("batch", int(unet.config.in_channels), "height", "width")
    unit = down_sampling(generator)
    steps = generator.pipeline.scheduler.config.num_train_timesteps
    further = _further_inputs(unet, pooled)
    module = UNet(unet, tuple(item.name for item in further))

    def reference(sample: Tensor, timestep: Tensor, states: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        added = dict(zip(module.further, rest, strict=True))
        guidance = added.pop("timestep_cond", None)
        return (unet(sample, timestep, states, timestep_cond=guidance, added_cond_kwargs=added).sample,)

    return Graph(
        name="generator/unet",
        module=module,
        inputs=(
            Input("sample", "float32", shape, NORMAL),
            Input("timestep", "float32", (), below(steps)),
            Input("encoder_hidden_states", "float32", ("batch", length, width), NORMAL),
            *further,
        ),
        outputs=outputs_from(out_sample=shape),
        reference=reference,
        traced={"batch": 2, "height": 3 * unit, "width": 4 * unit},
        checked=_latent_sizes(generator),
        axes=_latent_axes(generator, 8),
    )


def _further_inputs(unet: Any, pooled: int | None) -> list[Input]:
    further = []
    if pooled is not None:
        further.append(Input("text_embeds", "float32", ("batch", pooled), NORMAL))
        further.append(Input("time_ids", "float32", ("batch", 6), below(1024)))
    if unet.config.time_cond_proj_dim is not None:
        further.append(Input("timestep_cond", "float32", ("batch", int(unet.config.time_cond_proj_dim)), NORMAL))
    return further


def _decoded_sizes(generator: TorchGenerator) -> tuple[Sizes, ...]:
    """The sizes of the latents, one image at a time where images are large: maps of 128 channels hold all pixels."""
    scale = int(generator.pipeline.vae_scale_factor)
    return tuple(
        dict(sizes)
        | {"batch": max(1, min(sizes["batch"], _DECODED_PIXELS // (sizes["height"] * sizes["width"] * scale**2)))}
        for sizes in _latent_sizes(generator)
    )


def vae_graph(generator: TorchGenerator) -> Graph:
    """The VAE's decoder."""
    vae = generator.pipeline.vae

    def reference(latents: Tensor) -> tuple[Tensor, ...]:
        return (vae.decode(latents).sample,)

    return Graph(
        name="generator/vae_decoder",
        module=VaeDecoder(vae),
        inputs=(
            Input("latent_sample", "float32", ("batch", int(vae.config.latent_channels), "height", "width"), NORMAL),
        ),
        outputs=outputs_from(sample=("batch", int(vae.config.out_channels), "image_height", "image_width")),
        reference=reference,
        traced={"batch": 2, "height": 6, "width": 8},
        checked=_decoded_sizes(generator),
        axes=_latent_axes(generator, 4),
    )
