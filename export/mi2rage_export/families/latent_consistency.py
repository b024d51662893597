"""Latent consistency models: Stable Diffusion 1 whose UNet is told the guidance scale, and is not guided again."""

from __future__ import annotations

from mi2rage_export.families.diffusion_files import write_pipeline
from mi2rage_export.families.family import Family
from mi2rage_export.families.stable_diffusion import one_encoder_graphs

__all__ = ["FAMILY"]

FAMILY = Family(
    name="latent-consistency",
    role="generator",
    fits=lambda model: type(model.pipeline).__name__ == "LatentConsistencyModelPipeline",
    graphs=one_encoder_graphs,
    write=write_pipeline,
)
