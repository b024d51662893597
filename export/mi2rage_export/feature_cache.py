"""Feature caching across denoising steps: where a UNet is cut, and its graphs on either side.

DeepCache (Ma, Fang, Wang: *DeepCache: Accelerating Diffusion Models for Free*, CVPR 2024): from one step to the next
the deep layers' answer changes little. A step that runs the whole UNet keeps the feature that the outer layers of the
up path take from them; the steps after it run the outer layers alone, fed with that feature. Outside of the cut are the
first layer of the outermost down block and the last two of the outermost up block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mi2rage_engines.errors import Mi2rageError, ModelFolderError
from mi2rage_engines.spec import Axis, GraphSpec
from mi2rage_export.families.diffusion_graphs import UNet
from mi2rage_export.graphs import NORMAL, Graph, Input, outputs_from

if TYPE_CHECKING:
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["FEATURE", "cut_away", "refuse_uncuttable", "replaced_feature", "shallow", "with_feature", "without_feature"]

FEATURE = "feature"
"""What the deep layers give: (batch, channels, height, width), as large as the latents."""

_LAYERS_OUTSIDE = 2
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


class _UNetWithFeature(UNet):
    """`UNet` that gives the feature too."""

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        first: Tensor | None = None,
        second: Tensor | None = None,
        third: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        with _kept_feature(self.unet) as kept:
            output = super().forward(sample, timestep, encoder_hidden_states, first, second, third)
        return output, kept[-1]


def refuse_uncuttable(generator: TorchGenerator) -> None:
    """Refuse a generator whose UNet is built otherwise than those that are cut here.

    Raises:
        ModelFolderError: its outermost up block is of another kind.
    """
    kind = type(generator.pipeline.unet.up_blocks[-1]).__name__
    if kind not in _UP_BLOCKS:
        raise ModelFolderError(
            f"{generator.name}: the outermost up block of its UNet is a {kind}; expected one of "
            f"{', '.join(_UP_BLOCKS)} to keep the feature before it; leave --feature-cache out"
        )


def _last_deep_layer(unet: Any) -> nn.Module:
    """What gives the feature: the layer before the last two of the outermost up block."""
    outermost = unet.up_blocks[-1]
    inside = len(outermost.resnets) - _LAYERS_OUTSIDE
    layer: nn.Module
    if inside > 0:
        layer = (getattr(outermost, "attentions", None) or outermost.resnets)[inside - 1]
    else:
        layer = unet.up_blocks[-2] if len(unet.up_blocks) > 1 else unet.mid_block
    return layer


def _shape(unet: Any) -> tuple[Axis, ...]:
    # The layer behind takes the feature and, beside it, what the first down layer gave.
    behind, beside = unet.up_blocks[-1].resnets[-_LAYERS_OUTSIDE], unet.down_blocks[0].resnets[0]
    return ("batch", int(behind.in_channels - beside.out_channels), "height", "width")


@contextlib.contextmanager
def _kept_feature(unet: Any) -> Iterator[list[Tensor]]:
    """Within the block, the features of the UNet's calls."""
    kept: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = _last_deep_layer(unet).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced_feature(unet: Any, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the UNet's outer layers see `replace(feature)` in place of what the deep layers give."""

    def exchanged(layer: nn.Module, inputs: Any, output: Any) -> Any:
        return (replace(output[0]),) if isinstance(output, tuple) else replace(output)

    handle = _last_deep_layer(unet).register_forward_hook(exchanged)
    try:
        yield
    finally:
        handle.remove()


def with_feature(unet: Graph) -> Graph:
    """The UNet's graph with the feature as a second output; its reference is the unpatched module, listened to."""
    module: Any = unet.module

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        with _kept_feature(module.unet) as kept:
            (sample,) = unet.reference(*inputs)
        return sample, kept[-1]

    return dataclasses.replace(
        unet,
        module=_UNetWithFeature(module.unet, module.further),
        outputs=(*unet.outputs, *outputs_from(**{FEATURE: _shape(module.unet)})),
        reference=reference,
    )


def shallow(unet: Graph) -> Graph:
    """The UNet's outer layers, which take the feature as their last input; not to be traced, see `cut_away`.

    Its reference is the unpatched module, all of it, with the deep layers' answer replaced.
    """
    module: Any = unet.module

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        with replaced_feature(module.unet, lambda _: inputs[-1]):
            return unet.reference(*inputs[:-1])

    return dataclasses.replace(
        unet, inputs=(*unet.inputs, Input(FEATURE, "float32", _shape(module.unet), NORMAL)), reference=reference
    )


def without_feature(model: Any, spec: GraphSpec) -> GraphSpec:
    """Take the output `feature` from an `onnx_ir.Model`, in place."""
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name != FEATURE]
    return spec.model_copy(update={"outputs": tuple(item for item in spec.outputs if item.name != FEATURE)})


def cut_away(model: Any, spec: GraphSpec) -> GraphSpec:
    """Make the output `feature` of an `onnx_ir.Model` an input, in place, and drop what nothing needs any more.

    So the outer layers are the same bit by bit, whatever the precision, and share the weights that lie beside the file.

    Raises:
        Mi2rageError: the graph is not made of such a UNet.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    (given,) = (value for value in model.graph.outputs if value.name == FEATURE)
    inner = given
    if not given.uses() and given.producer().op_type == "Cast":  # at the border of a graph in bf16
        inner = given.producer().inputs[0]
    taken = ir.val(FEATURE, given.dtype, given.shape)
    feature = next(item for item in spec.outputs if item.name == FEATURE)
    spec = without_feature(model, spec)
    given.name = f"{FEATURE}_of_the_deep_layers"
    source = taken
    if inner.dtype != given.dtype:
        cast = ir.node("Cast", [taken], {"to": int(inner.dtype)}, name=f"{FEATURE}_lowered")
        model.graph.insert_before(model.graph[0], cast)
        (source,) = cast.outputs
        source.name, source.dtype, source.shape = f"{FEATURE}_lowered", inner.dtype, inner.shape
    ir.convenience.replace_all_uses_with(inner, source)
    model.graph.inputs.append(taken)
    before = len(model.graph)
    RemoveUnusedNodesPass()(model)
    if not taken.uses() or len(model.graph) >= before:
        raise Mi2rageError(
            f"{spec.file}: nothing lies behind its {FEATURE}; expected layers that can be cut away; report it with the "
            "model's name, and leave --feature-cache out"
        )
    return spec.model_copy(update={"inputs": (*spec.inputs, feature)})
