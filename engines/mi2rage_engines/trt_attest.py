"""Attestation: in which precision a plan's layers really compute, against what was asked for.

What each library tells was read off it:

- TensorRT-RTX lists the engine's layers with their tensors' types in its verbose build log (profiling verbosity
  DETAILED), with or without a GPU; kernels are chosen later, when the plan is loaded, but the types are settled.
- TensorRT's engine inspector gives the layers of a loaded engine as JSON (`Format/Datatype` on 10, `Datatype` on 11).
- Where neither speaks, the strongly typed network is counted before the build: its types are what the builder must
  keep. `Attestation.source` says which was used.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mi2rage_engines.errors import EngineError, InputError
from mi2rage_engines.spec import Precision
from mi2rage_engines.trt_monitor import LogLine

__all__ = [
    "LEAST_SHARE",
    "Attestation",
    "Layer",
    "attest",
    "compute_dtype",
    "demand",
    "layers_from_json",
    "layers_from_log",
    "layers_from_network",
    "little_int8",
]

LEAST_SHARE = 0.9
"""The share of layers that must compute in the asked precision, beyond those the graph itself keeps in another."""

Source = Literal["build log", "inspector", "network"]

_COMPUTES_IN: dict[str, str] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8-qdq": "int8",
    "int8-weights": "fp32",  # the weights are int8; they are multiplied as floats
}
# Names of the builder's types (DataType members, the log's words, the inspector's sentences) and ours.
_DTYPES = (
    (re.compile(r"\bbf16\b|bfloat16", re.IGNORECASE), "bf16"),
    (re.compile(r"\bfp16\b|\bhalf\b|\bfloat16\b", re.IGNORECASE), "fp16"),
    (re.compile(r"\bfp8", re.IGNORECASE), "fp8"),
    (re.compile(r"\bfp4", re.IGNORECASE), "fp4"),
    (re.compile(r"\bint4\b", re.IGNORECASE), "int4"),
    (re.compile(r"\bint8\b", re.IGNORECASE), "int8"),
    (re.compile(r"\bfp32\b|\bfloat\b|\bfloat32\b", re.IGNORECASE), "fp32"),
)
# `correlation` is RTX's convolution, `runtime_fusion` its matrix product with what was fused to it, `_gemm_mha_v2` (a
# tactic of a `kgen` layer) its fused attention.
_HEAVY = re.compile(r"gemm|conv|correlation|matrix|einsum|_mha|fmha|attention|runtime_fusion", re.IGNORECASE)


class Attestation(BaseModel):
    """What a plan's layers compute in, by dtype (`fp32`, `fp16`, `bf16`, `int8`, ...).

    Attributes:
        source: `build log` and `inspector` describe the built engine, `network` only what the builder was bound to.
        asked: the dtype that the graph's precision asks for.
        layers: how many layers there are of each dtype, integer and boolean ones left out.
        heavy_layers: the same for matrix products and convolutions alone.
        network_heavy_layers: the same in the network before the build, i.e. what the graph says.
        share: of the heavy layers (of all layers, where none is heavy), those that compute in `asked`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    asked: str
    layers: dict[str, int]
    heavy_layers: dict[str, int]
    network_heavy_layers: dict[str, int]
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its kind and tactic in the library's words, the dtypes of its inputs and outputs in ours (or None)."""

    name: str
    kind: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]

    @property
    def is_heavy(self) -> bool:
        """Whether it multiplies matrices or convolves: where the time goes."""
        return _HEAVY.search(self.kind) is not None

    @property
    def dtype(self) -> str | None:
        """What it computes in: a heavy layer in the type of what it reads, another in that of what it writes."""
        tensors = (*self.inputs[:1], *self.outputs) if self.is_heavy else self.outputs
        return next((dtype for dtype in tensors if dtype is not None), None)


def compute_dtype(precision: Precision, name: str) -> str:
    """The dtype that matrix products of a graph of this precision compute in.

    Raises:
        InputError: the precision is one that TensorRT cannot build.
    """
    if precision not in _COMPUTES_IN:
        raise InputError(
            f"{name}: its precision is {precision}, which is for CPUs; TensorRT builds {', '.join(_COMPUTES_IN)}; "
            "export the model in one of these, or build only other graphs with --graph"
        )
    return _COMPUTES_IN[precision]


def _dtype_from(text: str) -> str | None:
    return next((dtype for pattern, dtype in _DTYPES if pattern.search(text)), None)


_LOG_DTYPE = re.compile(r"Datatype: (\w+)")
_LOG_TACTIC = re.compile(r", TacticName: ([^,]*)")


def layers_from_log(lines: Iterable[LogLine]) -> tuple[Layer, ...]:
    """The built layers, as the build log lists them; none where the library does not list them in this form."""
    # One list an engine; with several capabilities there is one for all.
    listed = [line.text for line in lines if line.text.startswith("Layers:")]
    return tuple(_logged_layer(row) for text in listed for row in text.splitlines() if ", Inputs: [" in row)


def _logged_layer(row: str) -> Layer:
    # `Name: .., LayerType: .., Inputs: [..], Constants: [..], Outputs: [..], ..`; tensors' names may hold brackets.
    head, _, tensors = row.partition(", Inputs: [")
    name, _, kind = head.partition(", LayerType: ")
    inputs, _, outputs = tensors.partition("], Outputs: [")
    tactic = _LOG_TACTIC.search(outputs)
    return Layer(
        name.removeprefix("Name: "),
        f"{kind} {tactic[1]}" if tactic else kind,
        _logged(inputs.partition("], Constants: [")[0]),
        _logged(outputs),
    )


def _logged(tensors: str) -> tuple[str | None, ...]:
    return tuple(_dtype_from(word) for word in _LOG_DTYPE.findall(tensors))


def layers_from_json(text: str) -> tuple[Layer, ...]:
    """The built layers, as the engine inspector's JSON lists them; none where it holds only names."""
    try:
        document = json.loads(text)
    except ValueError:
        return ()
    rows = document.get("Layers", []) if isinstance(document, dict) else []
    return tuple(
        Layer(str(row.get("Name", "")), _inspected_kind(row), _inspected(row, "Inputs"), _inspected(row, "Outputs"))
        for row in rows
        if isinstance(row, dict)
    )


def _inspected_kind(row: Mapping[str, Any]) -> str:
    # Fused layers are called `fusion` or `kgen`; what they are shows in the tactic's name.
    return f"{row.get('LayerType', '')} {row.get('TacticName', '')}"


def _inspected(row: Mapping[str, Any], key: str) -> tuple[str | None, ...]:
    tensors = [tensor for tensor in row.get(key) or [] if isinstance(tensor, dict)]
    return tuple(
        _dtype_from(str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or ""))
        for tensor in tensors
    )


def layers_from_network(network: Any) -> tuple[Layer, ...]:
    """The layers of a strongly typed network (`INetworkDefinition`) before it is built; constants are left out.

    What reads a dequantised tensor counts as int8: the builder fuses the pair into the layer.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    stored: dict[str, str | None] = {}  # dequantised tensors, by name, and what they were before
    found = []
    for layer in layers:
        kind = layer.type.name
        inputs = [tensor for index in range(layer.num_inputs) if (tensor := layer.get_input(index)) is not None]
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        if kind == "DEQUANTIZE":
            stored[outputs[0].name] = _dtype_from(inputs[0].dtype.name)
        elif kind == "SHUFFLE" and inputs[0].name in stored:
            stored[outputs[0].name] = stored[inputs[0].name]
        if kind not in ("CONSTANT", "SHAPE"):
            read = tuple(stored.get(tensor.name, _dtype_from(tensor.dtype.name)) for tensor in inputs)
            found.append(Layer(layer.name, kind, read, tuple(_dtype_from(tensor.dtype.name) for tensor in outputs)))
    return tuple(found)


def _counted(layers: Iterable[Layer]) -> dict[str, int]:
    return dict(sorted(Counter(layer.dtype for layer in layers if layer.dtype is not None).items()))


def attest(asked: str, source: Source, built: Sequence[Layer], network: Sequence[Layer]) -> Attestation:
    """Count the layers by dtype.

    Args:
        asked: from `compute_dtype`.
        source: where `built` was read.
        built: the engine's layers; the network's own where the library tells nothing of the engine.
        network: the network's layers.
    """
    layers = _counted(built)
    heavy = _counted(layer for layer in built if layer.is_heavy)
    counted = heavy or layers
    total = sum(counted.values())
    return Attestation(
        source=source,
        asked=asked,
        layers=layers,
        heavy_layers=heavy,
        network_heavy_layers=_counted(layer for layer in network if layer.is_heavy),
        share=counted.get(asked, 0) / total if total else 1.0,
    )


def demand(attestation: Attestation, name: str, *, is_mixed: bool, least_share: float = LEAST_SHARE) -> Attestation:
    """Refuse a plan that does not compute in the precision it was asked for; return the attestation otherwise.

    Layers are fused, so engine and network are not compared one by one: the engine may hold as many heavy layers of
    other dtypes as the network, and `1 - least_share` of its own beyond that; of int8, where the network's own share
    may be small, `1 - least_share` of the layers that the network quantises. Those in int8 themselves cannot be counted
    against each other: TensorRT-RTX makes one layer of several that read the same (queries, keys and values).

    Args:
        attestation: of the plan.
        name: what messages call the graph.
        is_mixed: whether the graph keeps parts in another precision on purpose.
        least_share: see `LEAST_SHARE`.

    Raises:
        EngineError: too few layers compute in the asked precision.
    """
    asked, network = attestation.asked, attestation.network_heavy_layers
    in_network = sum(network.values())
    others = in_network - network.get(asked, 0)
    if in_network and (others == in_network or (not is_mixed and others > (1 - least_share) * in_network)):
        raise EngineError(
            f"{name}: {asked} was asked for, but in the graph itself {_text(network)} of its {in_network} matrix "
            f"products and convolutions compute; expected at least {least_share:.0%} in {asked}; export it again"
        )
    counted = attestation.heavy_layers or attestation.layers
    total = sum(counted.values())
    if attestation.heavy_layers:
        held = network.get(asked, 0) if asked == "int8" and in_network else total
        allowed = others + (1 - least_share) * held
    else:
        # Nothing heavy to go by: pointwise layers may rightly compute in a wider type where the graph is mixed.
        allowed = float(total - 1) if is_mixed or in_network else (1 - least_share) * total
    found = counted.get(asked, 0)
    if total and (not found or total - found > allowed):
        raise EngineError(
            f"{name}: {asked} was asked for, but the built plan's layers are {_text(counted)} (read off the "
            f"{attestation.source}); expected at least {least_share:.0%} in {asked}; the builder changed the types: "
            "report it with the .log file, or build with another version of it"
        )
    return attestation


def little_int8(attestation: Attestation, name: str) -> str | None:
    """A line for who builds a graph that itself quantises less than half of its heavy layers; None for others."""
    network = attestation.network_heavy_layers
    total, found = sum(network.values()), network.get("int8", 0)
    if attestation.asked != "int8" or 2 * found >= total:
        return None
    return (
        f"{name}: only {found} of its {total} matrix products and convolutions ({found / total:.0%}) are in int8 in "
        "the graph itself; expected at least half of them; export it again with other --calibration data, or with "
        f"--precision {name}=fp16"
    )


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {dtype}" for dtype, count in counts.items()) or "none"
