"""A bundle as a page of text: what is in it, sizes, precisions, axes, and how near to PyTorch it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from mi2rage_engines.bundle import Manifest, ParityRecord
from mi2rage_engines.errors import BundleError
from mi2rage_engines.plan import PlanRecord, read_record
from mi2rage_engines.profiles import ShapeProfile
from mi2rage_engines.spec import Axis, ComponentSpec, GraphSpec, TensorSpec

__all__ = ["page_from_manifest", "size_text"]

_UNITS = ("B", "kB", "MB", "GB")
_WIDTH = 120


def size_text(count: int) -> str:
    """A number of bytes for people: `1.2 MB`."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def page_from_manifest(folder: Path, manifest: Manifest) -> str:
    """The page, lines of at most about 120 characters.

    Args:
        folder: the bundle, for its plans.
        manifest: as `open_manifest` gave it.
    """
    size = sum(record.bytes for record in manifest.files.values())
    lines = [
        f"{folder}",
        f"  schema {manifest.schema_version}, {len(manifest.files)} files, {size_text(size)}, {manifest.precision}",
        *_wrapped(
            "  made with ", ", ", [f"{name} {version}" for name, version in sorted(manifest.tool_versions.items())]
        ),
    ]
    for component in manifest.components:
        lines += ["", *_component_lines(manifest, component)]
    lines += ["", *_parity_lines(manifest.parity), "", *_plan_lines(folder)]
    return "\n".join(lines)


def _component_lines(manifest: Manifest, component: ComponentSpec) -> list[str]:
    source = manifest.source.get(component.kind, "unknown")
    licence = manifest.licences.get(component.kind, "unknown")
    lines = [f"{component.kind}: {component.name}", f"  from {source}; licence {licence}"]
    lines += [f"  {line}" for line in _facts(component)]
    for name, graph in component.graphs.items():
        lines += _graph_lines(manifest, f"{component.kind}/{name}", graph)
    return lines


def _facts(component: ComponentSpec) -> list[str]:
    if component.kind == "generator":
        schedule = component.schedules[0].scheduler
        steps = ", ".join(str(table.steps) for table in component.schedules)
        return [
            f"{component.height} x {component.width} px, {component.steps} steps, "
            f"guidance {component.guidance_scale:g}",
            f"{schedule} with {steps} steps",
        ]
    if component.kind == "captioner":
        size = component.preprocessing
        return [f"{size.height} x {size.width} px, at most {component.max_new_tokens} new tokens"]
    size = component.preprocessing
    return [f"{size.height} x {size.width} px, {len(component.labels)} labels: {', '.join(component.labels)}"]


def _graph_lines(manifest: Manifest, name: str, graph: GraphSpec) -> list[str]:
    size = sum(record.bytes for file, record in manifest.files.items() if file in (graph.file, f"{graph.file}_data"))
    kept = f", {len(graph.kept_fp32)} parts in fp32" if graph.kept_fp32 else ""
    axes = ", ".join(f"{axis} {size.min}..{size.opt}..{size.max}" for axis, size in graph.axes.items())
    return [
        f"  {name}  {size_text(size)}, {graph.precision}, opset {graph.opset}{kept}",
        *_wrapped("    in   ", "; ", _tensor_texts(graph.inputs)),
        *_wrapped("    out  ", "; ", _tensor_texts(graph.outputs)),
        *([f"    axes {axes}"] if axes else []),
        *(_wrapped("    fp32 ", ", ", graph.kept_fp32) if graph.kept_fp32 else []),
    ]


def _wrapped(head: str, joint: str, items: Sequence[str]) -> list[str]:
    """The items behind a head, in lines of the page's width where they can be; none is broken."""
    lines = [head]
    for index, item in enumerate(items):
        piece = item + joint if index + 1 < len(items) else item
        if len(lines[-1]) + len(piece.rstrip()) > _WIDTH and lines[-1].strip() and lines[-1] != head:
            lines.append(" " * len(head))
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _tensor_texts(tensors: Sequence[TensorSpec]) -> list[str]:
    """Each tensor; neighbours that differ in the number of a layer alone are one: `cross_keys_0 .. cross_keys_11`."""

    def kind(tensor: TensorSpec) -> tuple[object, ...]:
        return re.sub(r"\d+$", "", tensor.name), tensor.dtype, tensor.shape

    texts = []
    for _, group in groupby(tensors, kind):
        like = list(group)
        name = like[0].name if len(like) == 1 else f"{like[0].name} .. {like[-1].name}"
        texts.append(_tensor_text(like[0].model_copy(update={"name": name})))
    return texts


def _tensor_text(tensor: TensorSpec) -> str:
    def text(axis: Axis) -> str:
        return str(axis) or "?"

    return f"{tensor.name} {tensor.dtype}[{', '.join(map(text, tensor.shape))}]"


def _parity_lines(records: tuple[ParityRecord, ...]) -> list[str]:
    lines = ["parity against PyTorch in fp32"]
    for record in records:
        bound = "" if record.threshold is None else f"  (bound {record.threshold:g})"
        state = "" if record.passed else "  FAILED"
        lines.append(f"  {record.subject:<24} {record.measure:<19} {record.value:.4g}{bound}{state}")
    return lines if len(lines) > 1 else [*lines, "  nothing was checked"]


def _plan_lines(folder: Path) -> list[str]:
    plans = sorted((folder / "plans").rglob("*.plan")) if (folder / "plans").is_dir() else []
    if not plans:
        return ["plans: none; 'mi2rage-rt build' makes them"]
    return ["plans", *(line for plan in plans for line in _one_plan(folder, plan))]


def _one_plan(folder: Path, plan: Path) -> list[str]:
    head = f"  {plan.relative_to(folder)}  {size_text(plan.stat().st_size)}"
    try:
        record = read_record(plan)
    except BundleError:
        return [f"{head}, without a readable record"]
    profiles = [str(ShapeProfile(axes)) or "fixed shapes" for axes in record.request.profiles]
    return [
        f"{head}, {_attested_text(record)}, {record.request.backend} {record.request.version}",
        *_wrapped("    profiles ", "; ", profiles),
    ]


def _attested_text(record: PlanRecord) -> str:
    attestation = record.attestation
    return f"{attestation.share:.0%} {attestation.asked} ({attestation.source})"
