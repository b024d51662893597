"""A generator's graphs for whole denoising steps: the plain one, and the two for feature caching.

`denoise_step_full` gives the feature of the UNet's deep layers beside the next latents, `denoise_step_shallow` takes it
in place of those layers; see `feature_cache`. All are made of the UNet's finished file, see `denoise_step`.
"""

from __future__ import annotations

from pathlib import Path

from mi2rage_engines.spec import GraphSpec
from mi2rage_export import feature_cache
from mi2rage_export.denoise_step import NAME, denoise_step_graph, write_denoise_step
from mi2rage_export.graphs import Graph

__all__ = ["FULL", "SHALLOW", "denoise_step_graphs", "write_denoise_steps"]

FULL, SHALLOW = f"{NAME}_full", f"{NAME}_shallow"


def denoise_step_graphs(unet: Graph, *, with_feature_cache: bool) -> tuple[Graph, ...]:
    """What the steps are held to.

    Args:
        unet: as its family gives it, in fp32.
        with_feature_cache: whether there are all three.
    """
    plain = denoise_step_graph(unet)
    if not with_feature_cache:
        return (plain,)
    full, shallow = feature_cache.with_feature(unet), feature_cache.shallow(unet)
    return plain, denoise_step_graph(full, FULL), denoise_step_graph(shallow, SHALLOW)


def write_denoise_steps(folder: Path, unet: GraphSpec) -> dict[str, GraphSpec]:
    """Write the plain step beside the UNet, and where the UNet gives the feature the other two.

    The UNet's own file loses that output: nobody but the steps asks for it.

    Args:
        folder: the bundle.
        unet: of the finished file.

    Returns:
        The steps and the UNet by name.
    """
    path, place = folder / unet.file, Path(unet.file).parent
    files = {name: (place / f"{name}.onnx").as_posix() for name in (NAME, FULL, SHALLOW)}
    if all(spec.name != feature_cache.FEATURE for spec in unet.outputs):
        return {"unet": unet, NAME: write_denoise_step(path, files[NAME], unet)}
    steps = {
        FULL: write_denoise_step(path, files[FULL], unet),
        SHALLOW: write_denoise_step(path, files[SHALLOW], unet, feature_cache.cut_away),
    }
    unet = _rewritten_without_feature(path, unet)
    return {"unet": unet, NAME: write_denoise_step(path, files[NAME], unet), **steps}


def _rewritten_without_feature(path: Path, unet: GraphSpec) -> GraphSpec:
    import onnx_ir as ir

    model = ir.load(path)
    unet = feature_cache.without_feature(model, unet)
    draft = path.with_name(f"draft-{path.name}")
    ir.save(model, draft)
    draft.replace(path)
    return unet
