"""How images are made, and the graphs that it takes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import GeneratorSpec, GraphSpec
from mi2rage_rt.denoising import FEATURE

__all__ = ["DENOISERS", "SHALLOW", "GenerateOptions", "graphs_to_load", "without_feature_cache"]

_STEP_INPUTS = ("latents", "timestep", "coefficients", "guidance", "noise")
DENOISERS = {
    "denoise_step_full": (_STEP_INPUTS, ("next_latents", FEATURE)),
    "denoise_step": (_STEP_INPUTS, ("next_latents",)),
    "unet": (("sample", "timestep"), ("out_sample",)),
}
"""What runs a step, the first that is there: its inputs beside the conditions, and the outputs that it must have."""

SHALLOW = "denoise_step_shallow"


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What may differ from the bundle's own defaults; None takes them.

    Attributes:
        steps: denoising steps; the bundle has a schedule for some numbers.
        guidance_scale: of classifier-free guidance; 1 or less leaves it out. A model distilled with guidance is told
            it instead.
        height, width: in pixels.
        batch_size: images made together at most; `auto` measures which number makes most images a second.
        guidance_interval: shares of the steps between which guidance is on, see `guided_steps`.
        memory_bytes: the batch is kept so small that no more is in use in all, of the process on the CPU or of the
            GPU; an estimate from batches of one and two images.
        feature_cache: every so many steps one runs the whole UNet and the others its outer layers alone, see
            `full_steps`; 1 is off. Other images, and sooner made; above 1 only where the bundle was exported for it
            and the generator opened with it.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int | Literal["auto"] = 8
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    memory_bytes: int | None = None
    feature_cache: int = 1


def graphs_to_load(spec: GeneratorSpec, options: GenerateOptions | None = None) -> dict[str, GraphSpec]:
    """The graphs that a `RuntimeGenerator` uses.

    `denoise_step` stands in for the `unet` that it holds, and the two for feature caching, where the options ask for
    it, for `denoise_step`.

    Raises:
        InputError: the options ask for feature caching, and there are no graphs for it.
    """
    interval = 1 if options is None else options.feature_cache
    if interval > 1 and SHALLOW not in spec.graphs:
        raise without_feature_cache(spec, interval)
    allowed = [name for name in DENOISERS if interval > 1 or name != "denoise_step_full"]
    used = {next((name for name in allowed if name in spec.graphs), "unet"), *([SHALLOW] if interval > 1 else [])}
    steps = {*DENOISERS, SHALLOW}
    return {str(name): graph for name, graph in spec.graphs.items() if name in used or name not in steps}


def without_feature_cache(spec: GeneratorSpec, interval: int) -> InputError:
    """What is said where caching is asked for and its graphs were not exported, or not loaded."""
    if SHALLOW in spec.graphs:
        return InputError(
            f"feature cache {interval}: {spec.name} was opened without the graphs for it; expected its options to ask "
            "for it then; open it with GenerateOptions(feature_cache=...) above 1, or leave feature_cache out here"
        )
    return InputError(
        f"feature cache {interval}: {spec.name} has no graphs for it; expected a bundle that was exported with "
        "--feature-cache; export it again so, or leave feature caching out"
    )
