"""Stable Diffusion 1 and 2 with their turbo variants: one text encoder, UNet, VAE decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mi2rage_export.families.diffusion_files import write_pipeline
from mi2rage_export.families.diffusion_graphs import refuse_unsupported, text_encoder_graph, unet_graph, vae_graph
from mi2rage_export.families.family import Family

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["FAMILY", "one_encoder_graphs"]


def one_encoder_graphs(generator: TorchGenerator) -> tuple[Graph, ...]:
    """`text_encoder`, `unet` and `vae_decoder` of a pipeline, in optimum's names.

    Raises:
        ModelFolderError: the runtime could not run the pipeline.
    """
    # The addition "text" is pooled from the prompt's states inside the UNet: it needs no further input.
    refuse_unsupported(generator, additions=(None, "text"))
    pipeline = generator.pipeline
    width, length = int(pipeline.text_encoder.config.hidden_size), int(pipeline.tokenizer.model_max_length)
    outputs = {"last_hidden_state": ("batch", length, width), "pooler_output": ("batch", width)}
    return (
        text_encoder_graph(pipeline.text_encoder, "generator/text_encoder", length, outputs),
        unet_graph(generator, length, width),
        vae_graph(generator),
    )


FAMILY = Family(
    name="stable-diffusion",
    role="generator",
    fits=lambda model: type(model.pipeline).__name__ == "StableDiffusionPipeline",
    graphs=one_encoder_graphs,
    write=write_pipeline,
)
