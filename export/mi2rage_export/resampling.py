"""Image preprocessing inside a graph: uint8 images of any size in, Pillow's resizing as matrix products.

ONNX Resize with antialias is refused by TensorRT's parser, and without it is far off; two matrix products with
rounding in between are exact but for the last bit, and any backend runs them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import AxisRange, ImagePreprocessing
from mi2rage_export.graphs import Graph, Input, below

__all__ = ["IMAGE_PX", "PART", "WithPreprocessing", "with_preprocessing"]

IMAGE_PX = AxisRange(min=1, opt=480, max=1024)
"""Image sides that engines are built for; the runtime shrinks larger images before the graph."""


PART = "preprocessing"
"""Among the parts that the manifest says are kept in fp32: the products that resize."""


def _levels(values: Tensor) -> Tensor:
    """Rounded to whole levels as Pillow does it (halves up, ONNX Round would take them to the even) and clipped."""
    return torch.floor(values + 0.5).clamp(0.0, 255.0)


class WithPreprocessing(nn.Module):
    """A vision graph that begins with the image.

    image uint8 (B, H, W, 3), rows float32 (height, H), columns float32 (width, W), both from
    `mi2rage_rt.resampling.resampling_matrices` -> what `module` answers to pixel_values float32 (B, 3, height, width).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, spec: ImagePreprocessing) -> None:
        super().__init__()
        self.module = module
        # Not views of vectors: a view's data cannot be lowered to another precision and traced.
        self.register_buffer("mean", torch.tensor([[[value]] for value in spec.mean]))
        self.register_buffer("std", torch.tensor([[[value]] for value in spec.std]))

    def forward(self, image: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        # Cast first: TensorRT permutes no uint8. Levels are fp32 whatever the module was lowered to.
        pixels = image.float().permute(0, 3, 1, 2)
        levels = _levels(rows.float() @ _levels(pixels @ columns.float().transpose(0, 1)))
        values = (levels * (1 / 255) - self.mean.float()) / self.std.float()
        answer: tuple[Tensor, ...] = self.module(values.to(self.mean.dtype))
        return answer


def with_preprocessing(graph: Graph, spec: ImagePreprocessing, image_px: AxisRange = IMAGE_PX) -> Graph:
    """The same graph with `image`, `rows` and `columns` for inputs in place of `pixel_values`.

    Args:
        graph: one whose only input is `pixel_values`, e.g. a captioner's `vision`.
        spec: how its model's images are prepared.
        image_px: sides of the images that engines are built for.

    Raises:
        InputError: the graph has other inputs.
    """
    names = [item.name for item in graph.inputs]
    if names != ["pixel_values"]:
        raise InputError(
            f"{graph.name}: its inputs are {', '.join(names)}; expected pixel_values alone; preprocessing can go into "
            "a captioner's vision graph only"
        )

    def reference(image: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        narrow = _levels(torch.einsum("bhwc,vw->bchv", image.double(), columns.double()))
        levels = _levels(torch.einsum("uh,bchv->bcuv", rows.double(), narrow))
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
        return graph.reference(((levels / 255 - mean) / std).float())

    # Zeros and ones throughout: their sums are whole numbers, which no backend's order of adding can round apart.
    binary = below(2)
    sides = ((16, 24), (25, 17), (31, 33))
    cases = zip(graph.checked, sides, strict=False)
    return dataclasses.replace(
        graph,
        module=WithPreprocessing(graph.module, spec),
        inputs=(
            Input("image", "uint8", ("batch", "image_height", "image_width", 3), binary),
            Input("rows", "float32", (spec.height, "image_height"), binary),
            Input("columns", "float32", (spec.width, "image_width"), binary),
        ),
        reference=reference,
        traced={**graph.traced, "image_height": 11, "image_width": 13},
        checked=tuple({**case, "image_height": height, "image_width": width} for case, (height, width) in cases),
        axes={**graph.axes, "image_height": image_px, "image_width": image_px},
        in_fp32=(*graph.in_fp32, PART),
    )
