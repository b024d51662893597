"""The products of a graph with constant weights, and their int8 forms in standard ONNX operators."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.spec import Precision
from mi2rage_export.to_onnx import EMBED_UP_TO_BYTES, save_model

__all__ = ["Layer", "add_outputs", "layers_of", "quantized_product", "replace", "store"]

Array = NDArray[Any]

FULL_RANGE = 127
REDUCED_RANGE = 63
"""7 bits: without VNNI, the CPU's sums of two products of 8 bits saturate at 16."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product of an activation with constant weights.

    Attributes:
        name: of the layer in PyTorch where the graph still says it, else the node's.
        node: MatMul, Gemm or Conv (`onnx_ir.Node`).
        stored: the initializer (`onnx_ir.Value`) that holds the weights.
        transposed: the node reads it through a Transpose (tied embeddings).
    """

    name: str
    node: Any
    stored: Any
    transposed: bool

    @property
    def input_name(self) -> str:
        """The activation's name."""
        return str(self.node.inputs[0].name)

    @property
    def attributes(self) -> dict[str, Any]:
        return {name: attribute.value for name, attribute in self.node.attributes.items()}

    @property
    def channels(self) -> int:
        """The weights' axis of output channels."""
        if self.node.op_type == "MatMul":
            return 1
        return 0 if self.node.op_type == "Conv" or self.attributes.get("transB", 0) else 1

    def weights(self) -> Array:
        """float32, as the node reads them."""
        array: Array = self.stored.const_value.numpy()
        return np.ascontiguousarray(array.T) if self.transposed else array


def layers_of(model: Any, precision: Precision) -> list[Layer]:
    """The layers of an `onnx_ir.Model` that the precision quantises, in the graph's order."""
    kinds = ("MatMul", "Gemm") if precision == "int8-dynamic" else ("MatMul", "Gemm", "Conv")
    layers: list[Layer] = []
    taken: set[str] = set()
    for node in model.graph:
        if node.op_type not in kinds or node.domain or (layer := _layer(node)) is None:
            continue
        if precision == "int8-qdq" and _is_selected(node.inputs[0]):
            continue
        if layer.name in taken:
            layer = dataclasses.replace(layer, name=f"{layer.name} ({node.name})")
        taken.add(layer.name)
        layers.append(layer)
    return layers


def _is_selected(value: Any) -> bool:
    """One position taken out of a sequence: next to no work, and TensorRT-RTX 1.7 fails on Q/DQ behind some of them."""
    return value.producer() is not None and value.producer().op_type == "Gather"


def _layer(node: Any) -> Layer | None:
    weights = node.inputs[1]
    producer = weights.producer()
    transposed = producer is not None and producer.op_type == "Transpose"
    stored = producer.inputs[0] if transposed else weights
    constant = stored.const_value
    ranks = (2,) if node.op_type != "Conv" else (3, 4, 5)
    if not stored.is_initializer() or constant.dtype.name != "FLOAT" or len(constant.shape) not in ranks:
        return None
    if transposed and list(producer.attributes["perm"].value) != [1, 0]:
        return None
    if node.op_type == "Gemm" and node.attributes.get("transA") is not None and node.attributes["transA"].value:
        return None
    return Layer(_name(node, stored), node, stored, transposed)


def _name(node: Any, stored: Any) -> str:
    """The exporter folds transposed weights into nameless constants; the bias that is added next still has its name."""
    if stored.name.endswith(".weight"):
        return str(stored.name.removesuffix(".weight"))
    for user in node.outputs[0].consumers():
        for value in user.inputs if user.op_type == "Add" else ():
            # Equal biases, all zero, are one constant in the file: its name says nothing.
            if value is not None and value.is_initializer() and value.name.endswith(".bias") and len(value.uses()) == 1:
                return str(value.name.removesuffix(".bias"))
    return str(node.name)


class _Nodes:
    """New nodes and constants in front of a layer's node, all named after it."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.graph = layer, layer.node.graph

    def constant(self, name: str, array: Array, *, shared: bool = False) -> Any:
        """`shared`: made of the weights alone, so that layers with the same weights have one."""
        import onnx_ir as ir

        layout = f"_{'transposed_' if self.layer.transposed else ''}by_{self.layer.channels}"
        full = f"{self.layer.stored.name}_{name}{layout}" if shared else f"{self.layer.node.name}_{name}"
        if shared and full in self.graph.initializers:
            return self.graph.initializers[full]
        tensor = ir.tensor(array, name=full)
        value = ir.Value(
            name=full, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array))
        )
        self.graph.register_initializer(value)
        return value

    def on_input(self, kind: str) -> Any:
        """The node that quantises the layer's activation for a layer before it; None if there is none."""
        users = self.layer.node.inputs[0].consumers()
        return next((node for node in users if node.op_type == kind and node.name.endswith("_input_int8")), None)

    def add(self, kind: str, name: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        import onnx_ir as ir

        full = f"{self.layer.node.name}_{name}"
        node = ir.node(kind, inputs, attributes or None, num_outputs=outputs, name=full)
        for index, value in enumerate(node.outputs):
            value.name = full if outputs == 1 else f"{full}_{index}"
        self.graph.insert_before(self.layer.node, node)
        return node.outputs[0] if outputs == 1 else node.outputs


def _int8(weights: Array, axis: int, largest: int) -> tuple[Array, Array]:
    """int8 weights and their float32 scales by channel."""
    others = tuple(index for index in range(weights.ndim) if index != axis)
    scales = np.abs(weights).max(others).astype(np.float32) / np.float32(largest)
    scales[scales == 0] = 1.0
    along = scales.reshape([-1 if index == axis else 1 for index in range(weights.ndim)])
    return np.clip(np.rint(weights / along), -largest, largest).astype(np.int8), scales


def quantized_product(layer: Layer, precision: Precision, largest_input: float | None = None) -> Any:
    """Compute the layer's output from int8 weights, beside the layer's own node; gives the new output.

    Args:
        layer: of a model from `layers_of`.
        precision: `int8-weights`, `int8-dynamic` or `int8-qdq`.
        largest_input: the largest absolute value of the activation, for `int8-qdq`.
    """
    nodes = _Nodes(layer)
    if precision == "int8-dynamic":
        return _integer_product(layer, nodes)
    activation = layer.node.inputs[0]
    if precision == "int8-qdq":
        assert largest_input is not None
        activation = _quantised_input(nodes, largest_input)
    whole, scales = _int8(layer.weights(), layer.channels, FULL_RANGE)
    stored, zeros = nodes.constant("int8", whole, shared=True), np.zeros(len(scales), np.int8)
    steps = nodes.constant("scales", scales, shared=True), nodes.constant("zeros", zeros, shared=True)
    weights = nodes.add("DequantizeLinear", "weights", stored, *steps, axis=layer.channels)
    return nodes.add(layer.node.op_type, "product", activation, weights, *layer.node.inputs[2:], **layer.attributes)


def _quantised_input(nodes: _Nodes, largest: float) -> Any:
    if quantiser := nodes.on_input("QuantizeLinear"):
        return quantiser.outputs[0].consumers()[0].outputs[0]
    scale = nodes.constant("input_scale", np.array(max(largest, 1e-6) / FULL_RANGE, np.float32))
    zero = nodes.constant("input_zero", np.array(0, np.int8))  # TensorRT wants activations symmetric
    whole = nodes.add("QuantizeLinear", "input_int8", nodes.layer.node.inputs[0], scale, zero)
    return nodes.add("DequantizeLinear", "input", whole, scale, zero)


def _integer_product(layer: Layer, nodes: _Nodes) -> Any:
    """The pattern that ONNX Runtime fuses into one kernel: uint8 input, int8 weights, scaled afterwards."""
    whole, scales = _int8(layer.weights(), layer.channels, REDUCED_RANGE)
    if layer.channels == 0:
        whole = np.ascontiguousarray(whole.T)
    kind = "DynamicQuantizeLinear"
    quantiser = nodes.on_input(kind)
    activation, scale, zero = (
        quantiser.outputs if quantiser else nodes.add(kind, "input_int8", layer.node.inputs[0], outputs=3)
    )
    stored, zeros = nodes.constant("int8", whole, shared=True), np.zeros(len(scales), np.int8)
    product = nodes.add(
        "MatMulInteger", "integer", activation, stored, zero, nodes.constant("zeros", zeros, shared=True)
    )
    product = nodes.add("Cast", "float", product, to=1)
    steps = nodes.constant("scales", scales * np.float32(layer.attributes.get("alpha", 1.0)))
    product = nodes.add("Mul", "product", product, nodes.add("Mul", "scale", scale, steps))
    if len(layer.node.inputs) < 3 or layer.node.inputs[2] is None:
        return product
    bias = layer.node.inputs[2]
    if (beta := layer.attributes.get("beta", 1.0)) != 1.0:
        bias = nodes.add("Mul", "bias", bias, nodes.constant("beta", np.array(beta, np.float32)))
    return nodes.add("Add", "sum", product, bias)


def replace(layer: Layer, output: Any) -> None:
    """Put a new output in the layer's place; its node goes, and its weights where nobody else reads them."""
    node, graph, name = layer.node, layer.node.graph, layer.node.outputs[0].name
    old, read = node.outputs[0], node.inputs[1]
    output.dtype, output.shape = old.dtype, old.shape
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    old.name, output.name = f"{name}_fp32", name
    if layer.transposed and not read.uses():
        graph.remove(read.producer(), safe=True)
    if not layer.stored.uses() and not layer.stored.is_graph_output():
        graph.initializers.pop(layer.stored.name)


def add_outputs(model: Any, layer: Layer, twin: Any) -> None:
    """Give out how far the twin's output is from the layer's own: sums of squares `<name>/apart` and `<name>/size`."""
    import onnx_ir as ir

    graph, own = model.graph, layer.node.outputs[0]
    nodes = [ir.node("Sub", [twin, own])]
    nodes += [ir.node("ReduceSumSquare", [value], {"keepdims": 0}) for value in (nodes[0].outputs[0], own)]
    for node in nodes:
        graph.append(node)
    for node, kind in zip(nodes[1:], ("apart", "size"), strict=True):
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{layer.name}/{kind}", ir.DataType.FLOAT, ir.Shape(())
        graph.outputs.append(value)


def store(model: Any, path: Path) -> None:
    """Write a changed model; what it still reads from its source's weight file comes along."""
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= EMBED_UP_TO_BYTES:
        ir.external_data.load_to_model(model)
    save_model(model, path)
