"""The step as one graph against the loop in NumPy around the UNet it was made of.

Tolerance a step, of latents of about 3: 1e-5, as the groups are weighted in another order; 1e-2 around a UNet in fp16,
whose answer ONNX Runtime on a CPU does not round to fp16 (half a unit: 1e-3) before it is cast to fp32 and guided.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec
from mi2rage_export.denoise_step import denoise_step_graph, write_denoise_step
from mi2rage_export.families import family_of
from mi2rage_export.graphs import random_inputs
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator, graphs_to_load
from mi2rage_rt.schedule import Schedule
from mi2rage_rt.text import PlainTokenizer
from tests.runtime.tiny_bundle import schedule

LATENTS = ("batch", 4, "height", "width")
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
FURTHER = {"text_embeds": ("batch", 5), "time_ids": ("batch", 6), "timestep_cond": ("batch", 7)}
AXES = {
    "batch": AxisRange(min=1, opt=8, max=16),
    "height": AxisRange(min=2, opt=4, max=8),
    "width": AxisRange(min=2, opt=4, max=8),
}


def hand_made(path: Path, *, dtype: str = "float32", timestep: tuple[str, tuple[int, ...]] = ("float32", ())) -> Any:
    """A UNet of every input there is: a convolution of the sample, moved by a mean of each condition's row."""
    kind = DTYPES[dtype]
    conditions = {"encoder_hidden_states": ("batch", "sequence", 3), **FURTHER}
    inputs = {"sample": (kind, LATENTS), "timestep": (DTYPES[timestep[0]], timestep[1])}
    inputs |= {name: (kind, shape) for name, shape in conditions.items()}
    node = helper.make_node
    nodes = [
        node("Conv", ["sample", "weight"], ["mixed"], pads=[1, 1, 1, 1]),
        node("Cast", ["timestep"], ["time_any"], to=kind),
        node("Reshape", ["time_any", "scalar"], ["time"]),
        node("Div", ["time", "thousand"], ["moved_0"]),
    ]
    for number, (name, shape) in enumerate(conditions.items()):
        rest = f"axes_{len(shape)}"
        nodes += [
            node("ReduceMean", [name, rest], [f"mean_{number}"], keepdims=0),
            node("Reshape", [f"mean_{number}", "column"], [f"column_{number}"]),
            node("Add", [f"moved_{number}" if number else "moved_0", f"column_{number}"], [f"moved_{number + 1}"]),
        ]
    nodes.append(node("Add", ["mixed", f"moved_{len(conditions)}"], ["out_sample"]))
    weight = np.random.default_rng(0).standard_normal((4, 4, 3, 3)) / 6
    constants = {
        "weight": weight.astype(dtype),
        "thousand": np.array(1000, dtype),
        "scalar": np.array([1]),
        "column": np.array([-1, 1, 1, 1]),
        "axes_2": np.array([1]),
        "axes_3": np.array([1, 2]),
    }
    graph = helper.make_graph(
        nodes,
        "unet",
        [helper.make_tensor_value_info(name, *tensor) for name, tensor in inputs.items()],
        [helper.make_tensor_value_info("out_sample", kind, LATENTS)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[helper.make_tensor_value_info("mixed", kind, LATENTS)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    names = {number: name for name, number in DTYPES.items()}
    return GraphSpec(
        file="generator/unet/model.onnx",
        inputs=tuple(TensorSpec(name=n, dtype=names[k], shape=shape) for n, (k, shape) in inputs.items()),
        outputs=(TensorSpec(name="out_sample", dtype=dtype, shape=LATENTS),),
        opset=20,
        axes=AXES,
    )


def both(folder: Path, spec: GraphSpec) -> tuple[OrtEngine, OrtEngine, GraphSpec]:
    """Engines of the UNet and of the step made of it, and what the manifest says of the step."""
    step = write_denoise_step(folder / "model.onnx", "generator/unet/denoise_step.onnx", spec)
    onnx.checker.check_model(onnx.load(folder / "denoise_step.onnx"), full_check=True)
    return OrtEngine(folder / "model.onnx", threads=1), OrtEngine(folder / "denoise_step.onnx", threads=1), step


def largest_difference(unet: OrtEngine, step: OrtEngine, spec: GraphSpec, rows: int, scale: float | None) -> float:
    """Of each step of a sampler that scales, and adds noise, from the loop's own latents before it."""
    table = schedule(3, noise=0.5).model_copy(update={"input_scale": (0.3, 0.6, 1.0)})
    sampler, groups = Schedule(table), 1 if scale is None else 2
    rng = np.random.default_rng(rows)
    latents = rng.standard_normal((rows, *spec.inputs[0].shape[1:2], 4, 6)).astype(np.float32)
    sizes = {"sequence": 5}
    conditions = {
        tensor.name: rng.standard_normal(
            (groups * rows, *(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1:]))
        ).astype(np.float32)
        for tensor in spec.inputs[2:]
    }
    guidance = np.array([1.0] if scale is None else [1 - scale, scale], np.float32)
    apart = 0.0
    for number in range(sampler.steps):
        noise = rng.standard_normal(latents.shape).astype(np.float32)
        time = np.array(table.timesteps[number], spec.inputs[1].dtype).reshape(spec.inputs[1].shape)
        sample = np.concatenate([sampler.scaled(latents, number)] * groups)
        output = unet.run({"sample": sample, "timestep": time, **conditions})["out_sample"].astype(np.float32)
        if scale is not None:
            without, towards = np.split(output, 2)
            output = without + np.float32(scale) * (towards - without)
        given = {"latents": latents, "timestep": time, "coefficients": sampler.coefficients(number), "noise": noise}
        grouped = {name: array.reshape(groups, rows, *array.shape[1:]) for name, array in conditions.items()}
        found = step.run({**given, "guidance": guidance, **grouped})["next_latents"]
        latents = sampler.advance(latents, output, number, noise)
        assert (found.dtype, found.shape) == (np.float32, latents.shape)
        apart = max(apart, float(np.abs(found - latents).max()))
    assert np.abs(latents).max() > 0.5
    return apart


@pytest.mark.parametrize("timestep", [("float32", ()), ("int64", (1,))])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_a_step_equals_the_loop(tmp_path: Path, dtype: str, tolerance: float, timestep: Any) -> None:
    spec = hand_made(tmp_path / "model.onnx", dtype=dtype, timestep=timestep)
    unet, step, _ = both(tmp_path, spec)
    for rows, scale in ((1, None), (3, None), (1, 7.5), (3, 2.0)):
        assert largest_difference(unet, step, spec, rows, scale) < tolerance


def test_the_exported_unet(exported_bundle: Path, manifest: Any, tmp_path: Path) -> None:
    spec = manifest.generator.graphs["unet"]
    (tmp_path / "model.onnx").write_bytes((exported_bundle / spec.file).read_bytes())
    unet, step, _ = both(tmp_path, spec)
    for rows, scale in ((2, None), (1, 7.5), (2, 3.0)):
        assert largest_difference(unet, step, spec, rows, scale) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(batch_size=2),
        GenerateOptions(guidance_scale=1.0, height=40, width=16),
        GenerateOptions(guidance_interval=(0.0, 0.5), guidance_scale=7.5),
    ],
)
def test_images_of_the_step_equal_those_of_the_loop(exported_bundle: Path, manifest: Any, options: Any) -> None:
    spec = manifest.generator
    names = graphs_to_load(spec)
    assert set(names) == {"text_encoder", "denoise_step", "vae_decoder"}
    engines = {name: OrtEngine(exported_bundle / graph.file, threads=1) for name, graph in spec.graphs.items()}
    tokenizer = PlainTokenizer(spec.tokenizer, exported_bundle)
    prompts, seeds = ["a dog", "a red car", "a dog"], [1, 2, 3]
    found = RuntimeGenerator(spec, {name: engines[name] for name in names}, tokenizer).generate(prompts, seeds, options)
    del engines["denoise_step"]
    expected = RuntimeGenerator(spec, engines, tokenizer).generate(prompts, seeds, options)
    assert np.abs(found.astype(int) - expected).max() <= 1  # level of 255
    assert expected.std() > 10


def test_what_the_manifest_says_is_what_the_file_has(tmp_path: Path) -> None:
    spec = hand_made(tmp_path / "model.onnx", dtype="float16").model_copy(update={"precision": "fp16"})
    _, engine, step = both(tmp_path, spec)
    assert (step.inputs, step.outputs) == (engine.inputs, engine.outputs)
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in step.inputs}
    assert shapes["encoder_hidden_states"] == ("float16", ("groups", "batch", "sequence", 3))
    assert shapes["latents"] == shapes["noise"] == ("float32", LATENTS)
    assert (step.file, step.precision, step.opset) == ("generator/unet/denoise_step.onnx", "fp16", 20)
    # 8 rows are 4 images in two groups.
    assert step.axes["batch"] == AxisRange(min=1, opt=4, max=8)
    assert step.axes["groups"] == AxisRange(min=1, opt=2, max=2)
    assert step.axes["height"] == AXES["height"]


def test_weights_beside_the_file_are_shared(tmp_path: Path) -> None:
    spec = hand_made(tmp_path / "model.onnx")
    onnx_ir.save(onnx_ir.load(tmp_path / "model.onnx"), tmp_path / "model.onnx", external_data="model.onnx_data")
    content = (tmp_path / "model.onnx_data").read_bytes()
    unet, step, _ = both(tmp_path, spec)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data", "denoise_step.onnx"}
    assert (tmp_path / "model.onnx_data").read_bytes() == content
    stored = {
        item.name: item
        for item in onnx.load(tmp_path / "denoise_step.onnx", load_external_data=False).graph.initializer
    }
    assert stored["weight"].external_data[0].value == "model.onnx_data"
    assert largest_difference(unet, step, spec, 2, 3.0) < 1e-5


def test_its_reference_is_the_unpatched_module_with_the_formula_around_it(generator: Any) -> None:
    unet = family_of("generator", generator).graphs(generator)[1]
    graph = denoise_step_graph(unet)
    assert [dict(sizes) for sizes in graph.checked] == [
        {**unet.checked[0], "batch": unet.checked[0]["batch"] // 2, "groups": 2},
        {**unet.checked[1], "groups": 1},
    ]
    given = random_inputs(graph, {"batch": 2, "groups": 2, "height": 4, "width": 4}, seed=1)
    latents, time, coefficients, guidance, noise, states = (torch.from_numpy(array) for array in given.values())
    with torch.inference_mode():
        (found,) = graph.reference(latents, time, coefficients, guidance, noise, states)
        first, second = (unet.reference(latents * coefficients[0], time, rows)[0] for rows in states)
    guided = guidance[0] * first + guidance[1] * second
    expected = coefficients[1] * latents + coefficients[2] * guided + coefficients[3] * noise
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
