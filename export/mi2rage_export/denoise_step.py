"""One denoising step as one graph: the UNet with guidance and the sampler's affine map around it.

It is made of the UNet's finished file, whatever its precision, and shares its weights where they lie beside the file.
What it computes is `ScheduleTable`'s formula, all of it but the UNet in float32:

    rows = coefficients[0] * latents, once for each group
    m = sum over the groups of guidance[group] * unet(rows, timestep, conditions)[group]
    next_latents = coefficients[1] * latents + coefficients[2] * m + coefficients[3] * noise

With feature caching there are three of it, see `denoise_steps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_engines.spec import AxisRange, GraphSpec, TensorSpec
from mi2rage_export.graphs import NORMAL, Graph, Input, Sizes, below

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NAME", "denoise_step_graph", "write_denoise_step"]

NAME = "denoise_step"

_GROUPS_CHECKED = (2, 1)
"""The UNet's sizes, from the smallest on, are checked once more in the step, with so many groups; no more of them."""


def denoise_step_graph(unet: Graph, name: str = NAME) -> Graph:
    """What a step is held to: the UNet's own reference with the formula around it.

    Args:
        unet: in fp32; its module is not to be traced again. What it takes beside sample and time, and what it gives
            beside the sample, has one row for each of the sample's.
        name: of the step.
    """

    def reference(
        latents: Tensor, time: Tensor, coefficients: Tensor, guidance: Tensor, noise: Tensor, *conditions: Tensor
    ) -> tuple[Tensor, ...]:
        rows = (latents * coefficients[0]).repeat(len(guidance), 1, 1, 1)
        output, *others = unet.reference(rows, time, *(item.flatten(0, 1) for item in conditions))
        guided = (output.view(len(guidance), *latents.shape) * guidance.view(-1, 1, 1, 1, 1)).sum(0)
        next_latents = coefficients[1] * latents + coefficients[2] * guided + coefficients[3] * noise
        return (next_latents, *(item.view(len(guidance), len(latents), *item.shape[1:]) for item in others))

    draws = {item.name: item.draw for item in unet.inputs} | dict.fromkeys(("latents", "coefficients", "noise"), NORMAL)
    # None is negative: the difference of answers that are all but equal would be nothing but rounding.
    draws["guidance"] = below(4)
    specs = _inputs_of([item.spec for item in unet.inputs])
    return dataclasses.replace(
        unet,
        name=f"generator/{name}",
        inputs=tuple(Input(spec.name, spec.dtype, spec.shape, draws[spec.name]) for spec in specs),
        outputs=tuple(_outputs_of(unet.outputs)),
        reference=reference,
        checked=tuple(map(_checked_sizes, unet.checked, _GROUPS_CHECKED)),
        axes=_axes(unet.axes),
    )


def _inputs_of(unet: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The step's inputs from the UNet's. Conditions have two axes for its rows, so that no third size must fit them."""
    latents = unet[0].shape
    return [
        TensorSpec(name="latents", dtype="float32", shape=latents),
        unet[1],
        TensorSpec(name="coefficients", dtype="float32", shape=(4,)),
        TensorSpec(name="guidance", dtype="float32", shape=("groups",)),
        TensorSpec(name="noise", dtype="float32", shape=latents),
        *_in_groups(unet[2:]),
    ]


def _outputs_of(unet: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The step's outputs from the UNet's, of which the first is its sample."""
    return [TensorSpec(name="next_latents", dtype="float32", shape=unet[0].shape), *_in_groups(unet[1:])]


def _in_groups(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [spec.model_copy(update={"shape": ("groups", *spec.shape)}) for spec in specs]


def _axes(unet: Mapping[str, AxisRange]) -> dict[str, AxisRange]:
    """The UNet's ranges; where there is guidance, its rows are those of two groups."""
    rows = unet["batch"]
    most = max(1, rows.max // 2)
    batch = AxisRange(min=1, opt=min(most, max(1, rows.opt // 2)), max=most)
    return {**unet, "batch": batch, "groups": AxisRange(min=1, opt=2, max=2)}


def _checked_sizes(unet: Sizes, groups: int) -> Sizes:
    return {**unet, "batch": max(1, unet["batch"] // groups), "groups": groups}


def write_denoise_step(
    path: Path, file: str, unet: GraphSpec, prepare: Callable[[Any, GraphSpec], GraphSpec] | None = None
) -> GraphSpec:
    """Write a step's graph beside the UNet's.

    Args:
        path: the UNet's finished `.onnx` file.
        file: the step's path as the manifest has it, relative to the bundle, in the same folder.
        unet: of that file.
        prepare: changes the UNet's `onnx_ir.Model` first, in place, and returns what it takes and gives then.
    """
    import onnx_ir as ir

    model = ir.load(path)
    if prepare is not None:
        unet = prepare(model, unet)
    _surround(model, unet)
    # Without a name for external data those that are outside stay where they are: no second copy of the weights.
    ir.save(model, path.with_name(Path(file).name))
    inputs, outputs = tuple(_inputs_of(unet.inputs)), tuple(_outputs_of(unet.outputs))
    return unet.model_copy(update={"file": file, "inputs": inputs, "outputs": outputs, "axes": _axes(unet.axes)})


class _Nodes:
    """New nodes and constants of a graph, in the order they are computed; all named after the step."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes: list[Any] = []

    def constant(self, name: str, numbers: list[int]) -> Any:
        import onnx_ir as ir

        tensor = ir.tensor(np.array(numbers, np.int64), name=f"{NAME}/{name}")
        value = ir.val(tensor.name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def add(self, kind: str, inputs: Sequence[Any], outputs: Sequence[str], **attributes: int) -> list[Any]:
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, num_outputs=len(outputs), name=f"{NAME}/{outputs[0]}")
        for value, name in zip(made.outputs, outputs, strict=True):
            value.name = f"{NAME}/{name}"
        self.nodes.append(made)
        return list(made.outputs)

    def one(self, kind: str, inputs: Sequence[Any], output: str, **attributes: int) -> Any:
        return self.add(kind, inputs, [output], **attributes)[0]


def _surround(model: Any, unet: GraphSpec) -> None:
    """Put the formula in front of and behind the UNet of an `onnx_ir.Model`, in place."""
    import onnx_ir as ir

    graph = model.graph
    _rename_batch(graph)
    rows, timestep, *conditions = graph.inputs
    answer, *others = graph.outputs
    given = {spec.name: _value(spec) for spec in _inputs_of(unet.inputs)} | {timestep.name: timestep}
    before, behind = _Nodes(graph), _Nodes(graph)
    coefficients = before.add(
        "Split",
        [given["coefficients"], before.constant("ones", [1, 1, 1, 1])],
        ["input_scale", "sample_coefficient", "output_coefficient", "noise_coefficient"],
        axis=0,
    )
    _enter(before, given, rows, conditions, coefficients[0])
    result = _leave(behind, given, answer, coefficients[1:])
    result.name, result.shape = "next_latents", ir.Shape(unet.inputs[0].shape)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.inputs[:] = list(given.values())
    graph.outputs[:] = [result, *_in_two_axes(behind, given["guidance"], others, unet.outputs[1:])]
    graph.insert_before(graph[0], before.nodes)
    graph.extend(behind.nodes)


def _rename_batch(graph: Any) -> None:
    """Call the axis of the UNet's rows other than that of the latents: ONNX Runtime reuses buffers by axes' names."""
    import onnx_ir as ir

    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                axes = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
                value.shape = ir.Shape(
                    [axis.replace("batch", "rows") if isinstance(axis, str) else axis for axis in axes]
                )


def _value(spec: TensorSpec) -> Any:
    import onnx_ir as ir

    return ir.val(spec.name, ir.DataType.from_numpy(np.dtype(spec.dtype)), spec.shape)


def _enter(nodes: _Nodes, given: Mapping[str, Any], rows: Any, conditions: Sequence[Any], scale: Any) -> None:
    """Latents, scaled, once for each group; conditions with their two axes of rows made one."""
    import onnx_ir as ir

    sample = nodes.one("Mul", [given["latents"], scale], "scaled")
    if rows.dtype != ir.DataType.FLOAT:
        sample = nodes.one("Cast", [sample], "lowered", to=int(rows.dtype))
    groups = nodes.one("Shape", [given["guidance"]], "groups")
    repeats = nodes.one("Concat", [groups, nodes.constant("once", [1, 1, 1])], "repeats", axis=0)
    ir.convenience.replace_all_uses_with(rows, nodes.one("Tile", [sample, repeats], "sample"))
    minus_one = nodes.constant("minus_one", [-1])
    for inner in conditions:
        rest = nodes.one("Shape", [given[inner.name]], f"{inner.name}_rest", start=2)
        shape = nodes.one("Concat", [minus_one, rest], f"{inner.name}_shape", axis=0)
        flat = nodes.one("Reshape", [given[inner.name], shape], f"{inner.name}_rows")
        ir.convenience.replace_all_uses_with(inner, flat)


def _in_two_axes(nodes: _Nodes, guidance: Any, values: Sequence[Any], specs: Sequence[TensorSpec]) -> list[Any]:
    """What else the UNet gives, its rows with their two axes again."""
    import onnx_ir as ir

    results = []
    for value, spec, step in zip(values, specs, _in_groups(specs), strict=True):
        value.name = f"{spec.name}_rows"
        groups = nodes.one("Shape", [guidance], f"{spec.name}_groups")
        rest = nodes.one("Shape", [value], f"{spec.name}_rest", start=1)
        shape = nodes.one(
            "Concat", [groups, nodes.constant(f"{spec.name}_batch", [-1]), rest], f"{spec.name}_grouped", axis=0
        )
        result = nodes.one("Reshape", [value, shape], spec.name)
        result.name, result.shape, result.type = step.name, ir.Shape(step.shape), ir.TensorType(value.dtype)
        results.append(result)
    return results


def _leave(nodes: _Nodes, given: Mapping[str, Any], answer: Any, coefficients: Sequence[Any]) -> Any:
    """Guidance and the sampler's map.

    Guidance is a product and a sum, no MatMul, which TensorRT might compute in TF32 and on some devices refuses.
    """
    import onnx_ir as ir

    output = answer
    if answer.dtype != ir.DataType.FLOAT:
        output = nodes.one("Cast", [answer], "raised", to=int(ir.DataType.FLOAT))
    one = nodes.constant("one", [1])
    groups = nodes.one("Shape", [given["guidance"]], "groups_again")
    by_group = nodes.one("Concat", [groups, nodes.constant("all_else", [-1])], "by_group", axis=0)
    split = nodes.one("Reshape", [output, by_group], "split")
    column = nodes.one("Unsqueeze", [given["guidance"], one], "column")
    weighted = nodes.one("Mul", [split, column], "weighted")
    flat = nodes.one("ReduceSum", [weighted, nodes.constant("zero", [0])], "guided_flat", keepdims=0)
    whole = nodes.one("Shape", [given["latents"]], "whole")
    guided = nodes.one("Reshape", [flat, whole], "guided")
    terms = [
        nodes.one("Mul", [value, coefficient], f"{name}_term")
        for name, value, coefficient in zip(
            ("sample", "output", "noise"), (given["latents"], guided, given["noise"]), coefficients, strict=True
        )
    ]
    return nodes.one("Add", [nodes.one("Add", terms[:2], "without_noise"), terms[2]], "next")
