"""What a graph takes and gives, and what a component needs beside its graphs.

These are the pydantic models that `bundle.json` is made of; unknown keys are refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Axis",
    "AxisRange",
    "CaptionerSpec",
    "ClassifierSpec",
    "ComponentSpec",
    "GeneratorSpec",
    "GraphSpec",
    "ImagePreprocessing",
    "LatentSpec",
    "Precision",
    "ScheduleTable",
    "TensorSpec",
    "TokenizerSpec",
]

Axis = int | str
"""A fixed size, or the name of a dynamic axis (`batch`, `height`, `sequence`, ...)."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Spec):
    """One named tensor; `dtype` is NumPy's name for it (`float32`, `int64`, ...)."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]


Precision = Literal["fp32", "fp16", "bf16", "int8-weights", "int8-dynamic", "int8-qdq"]
"""What a graph computes in.

`int8-weights` keeps the weights in int8 and computes in fp32, `int8-dynamic` quantises activations as they come (for
CPUs), `int8-qdq` has quantise/dequantise pairs with calibrated scales (for TensorRT).
"""


class AxisRange(_Spec):
    """The sizes that a dynamic axis is meant for: smallest, usual, largest; TensorRT's optimization profile."""

    min: int = Field(ge=0)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> AxisRange:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max}: expected min <= opt <= max")
        return self


class GraphSpec(_Spec):
    """One ONNX file (path relative to the bundle) with its inputs and outputs, in the graph's order.

    Attributes:
        precision: what it computes in.
        kept_fp32: parts left in fp32 because a lower precision would overflow or lose too much.
        axes: the range of each dynamic axis of the inputs.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    precision: Precision = "fp32"
    kept_fp32: tuple[str, ...] = ()
    axes: dict[str, AxisRange] = {}


class TokenizerSpec(_Spec):
    """A `tokenizer.json` (path relative to the bundle) and how its ids are framed.

    Attributes:
        max_length: ids a row may hold, special ids included.
        pad_id: what shorter rows are filled up with, on the right.
    """

    file: str
    max_length: int = Field(gt=0)
    pad_id: int = Field(ge=0)


class ImagePreprocessing(_Spec):
    """From an RGB image of any size to `pixel_values`, as CLIP's and BLIP's image processors do it.

    The image is resized with Pillow's `resample` filter (`exact`: to `height` x `width`;
    `shortest_edge`: the shorter side to `shortest_edge`, then the centre `height` x `width` is cut out), scaled by
    1/255, and normalised as (x - mean) / std per channel.
    """

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    resize: Literal["exact", "shortest_edge"] = "exact"
    shortest_edge: int | None = None
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ScheduleTable(_Spec):
    """A sampler as numbers: step i of n computes, from the latents x and the noise z,

        m = unet(input_scale[i] * x, timesteps[i])
        x = sample_coefficient[i] * x + output_coefficient[i] * m + noise_coefficient[i] * z

    starting from x = init_noise_sigma * z. DDIM (Song et al. 2021), Euler (Karras et al. 2022) and LCM
    (Luo et al. 2023) steps all have this form; the coefficients are read off diffusers' own scheduler.
    """

    scheduler: str
    steps: int = Field(gt=0)
    init_noise_sigma: float
    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    sample_coefficient: tuple[float, ...]
    output_coefficient: tuple[float, ...]
    noise_coefficient: tuple[float, ...]


class LatentSpec(_Spec):
    """The latents' shape and scale: `vae_decoder` takes latents / scaling_factor + shift_factor.

    Attributes:
        channels: latent channels.
        downsampling: image pixels per latent cell, per side.
        multiple: latent height and width must be multiples of this (the UNet's own down-sampling).
    """

    channels: int
    downsampling: int
    multiple: int
    scaling_factor: float
    shift_factor: float = 0.0


GeneratorGraph = Literal[
    "text_encoder",
    "text_encoder_2",
    "unet",
    "denoise_step",
    "denoise_step_full",
    "denoise_step_shallow",
    "vae_decoder",
]


class GeneratorSpec(_Spec):
    """Text to image: graphs in the layout, and with the names, of diffusers and optimum.

    `text_encoder`, `text_encoder_2`: input_ids int64 (batch, sequence) -> the states named in `text_outputs`
    (batch, sequence, width), and others that may be left unused. `unet`: sample (batch, channels, height, width),
    timestep float32 or int64 (scalar or (1,)), encoder_hidden_states (batch, sequence, sum of widths) -> out_sample.
    Its further inputs say what else it is conditioned on: text_embeds (batch, projection), which the last text encoder
    gives, with time_ids (batch, 6) (SDXL: original size, top and left of the crop, wanted size);
    timestep_cond (batch, size), the embedded guidance scale of a model distilled with guidance (LCM), which is then not
    guided once more. `vae_decoder`: latent_sample -> sample in [-1, 1].
    `denoise_step`, used instead of `unet` where it is there: one step of a `ScheduleTable` with the guidance, latents
    float32 (batch, channels, height, width), timestep as the UNet's, coefficients float32 (4,): input scale, then those
    of sample, output and noise, guidance float32 (groups,): [1] without it, [1 - s, s] with it and a scale s, noise
    float32 like latents, and the UNet's further inputs with two axes (groups, batch) for its rows, the rows without the
    prompt in the first group -> next_latents float32 like latents.
    `denoise_step_full` and `denoise_step_shallow`, where they are there: the step for feature caching. The former also
    gives feature (groups, batch, channels, height, width), what the UNet's outermost up block takes from its deep
    layers; the latter takes it as a further input in place of those layers.

    Attributes:
        text_outputs: the output of each text encoder that the UNet sees; joined along the width.
        tokenizer_2: of `text_encoder_2`.
        zero_negative: guidance leads away from zeros instead of from the empty prompt.
    """

    kind: Literal["generator"] = "generator"
    name: str
    graphs: dict[GeneratorGraph, GraphSpec]
    tokenizer: TokenizerSpec
    tokenizer_2: TokenizerSpec | None = None
    text_outputs: tuple[str, ...] = ("last_hidden_state",)
    zero_negative: bool = False
    schedules: tuple[ScheduleTable, ...]
    latents: LatentSpec
    height: int
    width: int
    steps: int
    guidance_scale: float


class CaptionerSpec(_Spec):
    """Image to text: graphs `vision` and `decoder` (one graph for prefill, past length 0, and for every step).

    `vision`: pixel_values (batch, 3, h, w) -> cross_keys_0, ..., cross_values_0, ... float32 (batch, heads, patches,
    size), a tensor for each layer (in bundles of earlier releases cross_keys, cross_values, the layers in front);
    with the preprocessing in the graph, in place of pixel_values: image uint8 (batch, image_height, image_width, 3),
    rows float32 (h, image_height), columns float32 (w, image_width), see `mi2rage_rt.resampling`.
    `decoder`: input_ids int64 (batch, sequence), past_keys, past_values (layers, batch, heads, past, size), what
    `vision` gave -> logits of the last position (batch, 1, vocabulary), present_keys, present_values
    (layers, batch, heads, past + sequence, size). Rows of one call have equal lengths; none is padded.
    `decoder_static`, where it is there: the decoder with a cache of fixed length: position int64 (1,), ids that are
    past, stands beside the other inputs, past_keys, past_values are (layers, batch, heads, length, size), read below
    `position`, and present_keys, present_values are the same with the new ones written from there on.

    Attributes:
        bos_id: the first id of every caption (BLIP's `[DEC]`, a decoder's start); a prefix's ids follow it.
        eos_id: ends a caption.
        max_new_tokens: the default bound on what is written.
        text_prefixes: what texts about the entity pair of a given image begin with by default; may be empty.
    """

    kind: Literal["captioner"] = "captioner"
    name: str
    graphs: dict[Literal["vision", "decoder", "decoder_static"], GraphSpec]
    tokenizer: TokenizerSpec
    preprocessing: ImagePreprocessing
    bos_id: int
    eos_id: int
    layers: int
    heads: int
    head_size: int
    max_new_tokens: int
    text_prefixes: tuple[str, ...] = ()


class ClassifierSpec(_Spec):
    """Relation classifier: graph `classifier`, see `mi2rage_rt.text.EntityMarkedTokenizer` for its text inputs.

    `image`: pixel_values float32 (batch, 3, h, w) -> whatever `classifier` takes of images under the same names, each
    (batch, ...). `classifier`: input_ids, attention_mask int64 (batch, sequence); head_index, tail_index int64
    (batch,): positions of the markers before the head and the tail; those names, each (images, ...); image_index int64
    (batch,), a row's place among the images; image_mask float32 (batch,), 0 where the image is missing -> logits
    float32 (batch, labels).

    Without `image`, `classifier` takes pixel_values float32 (batch, 3, h, w) in place of its outputs and image_index,
    or, where it reads text alone, nothing of images.
    """

    kind: Literal["classifier"] = "classifier"
    name: str
    graphs: dict[Literal["image", "classifier"], GraphSpec]
    tokenizer: TokenizerSpec
    preprocessing: ImagePreprocessing
    labels: tuple[str, ...]


ComponentSpec = GeneratorSpec | CaptionerSpec | ClassifierSpec
