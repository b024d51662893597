"""Pillow's resizing as matrices, in PyTorch and as an ONNX graph, against Pillow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import AxisRange, ImagePreprocessing
from mi2rage_export.graphs import NORMAL, Graph, Input, outputs_from, random_inputs
from mi2rage_export.resampling import WithPreprocessing, with_preprocessing
from mi2rage_export.to_onnx import export_graph
from mi2rage_rt.images import pixel_values
from mi2rage_rt.resampling import image_batches, resampling_matrices, resampling_matrix

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
SPECS: tuple[dict[str, Any], ...] = (
    {"height": 24, "width": 24},
    {"height": 30, "width": 50},
    {"height": 40, "width": 36, "resize": "shortest_edge", "shortest_edge": 44},
    {"height": 47, "width": 32, "resize": "shortest_edge", "shortest_edge": 40},  # black borders
)
SIZES = ((100, 100), (37, 91), (150, 64), (40, 40), (120, 200), (24, 24), (7, 5), (1, 1))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocessing(filter: str = "bicubic", spec: int = 0) -> ImagePreprocessing:
    return ImagePreprocessing(mean=MEAN, std=STD, resample=filter, **SPECS[spec])


def levels(values: np.ndarray) -> np.ndarray:
    """Back from pixel values to 0..255."""
    return (values * np.array(STD).reshape(3, 1, 1) + np.array(MEAN).reshape(3, 1, 1)) * 255


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("before", "after"), [(100, 24), (24, 100), (37, 91), (40, 41), (5, 1), (1, 5), (9, 9)])
def test_one_side_is_resized_exactly_as_pillow_does(filter, before, after):
    """In whole numbers, as Pillow counts: not one level apart."""
    image = noise(3, before)
    expected = np.asarray(Image.fromarray(image).resize((after, 3), Image.Resampling[filter.upper()]))
    matrix = resampling_matrix(before, after, filter)
    assert matrix.dtype == np.float32 and matrix.shape == (after, before)
    sums = np.einsum("hwc,vw->hvc", image.astype(np.float64), matrix.astype(np.float64))
    np.testing.assert_array_equal(np.clip(np.floor(sums + 0.5), 0, 255), expected)


@pytest.mark.parametrize("spec", range(len(SPECS)))
@pytest.mark.parametrize("filter", FILTERS)
def test_pixel_values_are_those_of_the_pillow_path(filter, spec):
    """Within one level; on average 0.002 of one, bilinear (whose sums often end in a half, to a hair) 0.05."""
    given = preprocessing(filter, spec)
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    module = WithPreprocessing(nn.Identity(), given)
    expected = levels(pixel_values(images, given))
    for places, inputs in image_batches(images, given, {}):
        found = module(*(torch.tensor(inputs[name]) for name in ("image", "rows", "columns"))).numpy()
        apart = np.abs(levels(found) - expected[places])
        assert apart.max() < 1.01
        assert apart.mean() < (0.05 if filter == "bilinear" else 0.002)


def test_batches_by_size_leave_the_rest_to_pillow():
    given = preprocessing()
    images = [noise(30, 40), noise(60, 40), noise(30, 40, 1), noise(90, 80), noise(3, 40)]
    axes = {"image_height": AxisRange(min=4, opt=50, max=80)}
    batches = list(image_batches(images, given, axes))
    # 60 x 40 loses 36 rows and 16 columns: Pillow would begin with the rows. 90 and 3 are out of range.
    assert [(places, inputs["image"].shape[:3]) for places, inputs in batches] == [
        ([0, 2], (2, 30, 40)),
        ([1, 3, 4], (3, 24, 24)),
    ]
    pillow = batches[1][1]
    np.testing.assert_array_equal(pillow["rows"], np.eye(24))
    expected = np.asarray(Image.fromarray(images[1]).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pillow["image"][0], expected)
    assert list(image_batches([], given, axes)) == []


class Halves(nn.Module):
    """Stands for a vision tower: pixel_values (B, 3, 24, 24) -> the means of each image's upper and lower half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.reshape(pixel_values.shape[0], 3, 2, -1).mean(-1) * self.scale


@pytest.fixture(scope="module")
def graph() -> Graph:
    module = Halves()
    plain = Graph(
        name="captioner/vision",
        module=module,
        inputs=(Input("pixel_values", "float32", ("batch", 3, 24, 24), NORMAL),),
        outputs=outputs_from(halves=("batch", 3, 2)),
        reference=lambda values: (module(values),),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 2}, {"batch": 8}),
        axes={"batch": AxisRange(min=1, opt=2, max=8)},
    )
    return with_preprocessing(plain, preprocessing())


@pytest.fixture(scope="module")
def file(graph, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "vision.onnx"
    spec = export_graph(graph, path, "vision.onnx")
    assert [(tensor.name, tensor.dtype) for tensor in spec.inputs] == [
        ("image", "uint8"),
        ("rows", "float32"),
        ("columns", "float32"),
    ]
    assert spec.axes["image_height"].max == spec.axes["image_width"].max == 1024
    return path


def test_the_graph_answers_as_its_reference(graph, file):
    """Sums of zeros and ones are whole: nothing is rounded apart, and 1e-5 is left for the module itself."""
    engine = OrtEngine(file, threads=1)
    for sizes in graph.checked:
        arrays = random_inputs(graph, sizes, seed=0)
        (expected,) = graph.reference(*(torch.from_numpy(array) for array in arrays.values()))
        assert expected.std() > 0.1  # neither all black nor all white
        np.testing.assert_allclose(engine.run(arrays)["halves"], expected.detach().numpy(), rtol=0, atol=1e-5)


def test_the_graph_takes_images_of_any_size(file):
    """Against the Pillow path; a hundredth of a level on average, in units of the normalised pixels."""
    engine, given = OrtEngine(file, threads=1), preprocessing()
    images = [noise(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    expected = Halves()(torch.from_numpy(pixel_values(images, given))).detach().numpy()
    for places, inputs in image_batches(images, given, {}):
        np.testing.assert_allclose(engine.run(inputs)["halves"], expected[places], rtol=0, atol=0.01 / 255 / 0.25 * 2)


def test_tensorrt_builds_the_graph(graph, file):
    """For SM89, without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(file)), parser.get_error(0).desc()
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for item in graph.inputs:
        ranges = [graph.axes[axis] if isinstance(axis, str) else AxisRange(min=axis, opt=axis, max=axis)
                  for axis in item.shape]  # fmt: skip
        profile.set_shape(item.name, *([getattr(axis, end) for axis in ranges] for end in ("min", "opt", "max")))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_levels_stay_fp32_where_the_module_is_lowered():
    given = preprocessing()
    inputs = {"image": noise(50, 60)[None], **resampling_matrices(50, 60, given)}
    tensors = [torch.tensor(inputs[name]) for name in ("image", "rows", "columns")]
    whole = WithPreprocessing(nn.Identity(), given)(*tensors)
    half = WithPreprocessing(nn.Identity(), given).half()(*tensors)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=4e-3)  # fp16 at 1 to 4


def test_only_vision_graphs_are_wrapped(graph):
    with pytest.raises(InputError, match="its inputs are image, rows, columns; expected pixel_values alone"):
        with_preprocessing(graph, preprocessing())
    plain = dataclasses.replace(graph, inputs=(Input("input_ids", "int64", ("batch", 2), NORMAL),))
    with pytest.raises(InputError, match="its inputs are input_ids"):
        with_preprocessing(plain, preprocessing())
