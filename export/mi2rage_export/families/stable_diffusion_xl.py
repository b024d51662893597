"""SDXL with its turbo variant: two text encoders, whose last states but one and pooled text the UNet sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import ModelFolderError
from mi2rage_export.families.diffusion_files import write_pipeline
from mi2rage_export.families.diffusion_graphs import refuse_unsupported, text_encoder_graph, unet_graph, vae_graph
from mi2rage_export.families.family import Family

if TYPE_CHECKING:
    from mi2rage_engines.spec import Axis
    from mi2rage_export.graphs import Graph
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["FAMILY"]


def _graphs(generator: TorchGenerator) -> tuple[Graph, ...]:
    """`text_encoder`, `text_encoder_2`, `unet` and `vae_decoder`, in optimum's names.

    Raises:
        ModelFolderError: the runtime could not run the pipeline.
    """
    pipeline = generator.pipeline
    parts = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer, pipeline.tokenizer_2)
    if any(part is None for part in parts):
        raise ModelFolderError(
            f"{generator.name}: it lacks one of its two text encoders or tokenizers; expected both; give another SDXL"
        )
    refuse_unsupported(generator, additions=("text_time",))
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    length = int(pipeline.tokenizer.model_max_length)
    projection = int(pipeline.text_encoder_2.config.projection_dim)
    pooled: list[dict[str, tuple[Axis, ...]]] = [
        {"pooler_output": ("batch", int(pipeline.text_encoder.config.hidden_size))},
        {"text_embeds": ("batch", projection)},
    ]
    return (
        *(
            text_encoder_graph(encoder, f"generator/{name}", length, _outputs(encoder, length, own))
            for encoder, name, own in zip(encoders, ("text_encoder", "text_encoder_2"), pooled, strict=True)
        ),
        unet_graph(generator, length, sum(int(encoder.config.hidden_size) for encoder in encoders), pooled=projection),
        vae_graph(generator),
    )


def _outputs(encoder: Any, length: int, pooled: dict[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
    """Shapes by name. optimum's pipeline takes the first output for the pooled text, and wants all layers' states."""
    states: tuple[Axis, ...] = ("batch", length, int(encoder.config.hidden_size))
    layers = {f"hidden_states.{layer}": states for layer in range(int(encoder.config.num_hidden_layers))}
    if "text_embeds" in pooled:
        return {**pooled, "last_hidden_state": states, **layers}
    return {"last_hidden_state": states, **pooled, **layers}


def _write(folder: Path, generator: TorchGenerator) -> dict[str, Any]:
    pipeline = generator.pipeline
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    return {
        **write_pipeline(folder, generator),
        "text_outputs": tuple(f"hidden_states.{encoder.config.num_hidden_layers - 1}" for encoder in encoders),
        "zero_negative": bool(pipeline.config.force_zeros_for_empty_prompt),
    }


FAMILY = Family(
    name="stable-diffusion-xl",
    role="generator",
    fits=lambda model: type(model.pipeline).__name__ == "StableDiffusionXLPipeline",
    graphs=_graphs,
    write=_write,
)
