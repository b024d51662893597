"""bf16 graphs where nothing computes in bf16."""

from __future__ import annotations

from pathlib import Path

__all__ = ["widen_bfloat16"]


def widen_bfloat16(source: Path, target: Path) -> None:
    """Write a bf16 ONNX file as fp32, the weights still rounded to bf16.

    ONNX Runtime has no bf16 kernels on CPUs: this is how the graph's structure and its weights can be checked there.
    The rounding of intermediate values is not in it.
    """
    import onnx_ir as ir

    model = ir.load(source)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype") and attribute.value == 16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype("float32")))
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
    ir.save(model, target, external_data=f"{target.name}_data")  # of any size
