"""The record beside a plan, and the check of both before the plan is loaded.

A plan belongs to one version of one library, to the GPUs it was built for, and to one graph. Loaded elsewhere it fails
late, in the library's words, or runs with other weights than the bundle's; so it is refused here, early.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.bundle import Manifest, sha256_of
from mi2rage_engines.errors import BundleError
from mi2rage_engines.profiles import ShapeProfile, misfit
from mi2rage_engines.spec import AxisRange, GraphSpec, Precision
from mi2rage_engines.trt_api import Device, TrtApi
from mi2rage_engines.trt_attest import Attestation
from mi2rage_engines.trt_build import BuildOptions
from mi2rage_engines.validation import first_problem

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "PlanRecord",
    "PlanRequest",
    "Present",
    "check_plan",
    "find_plan",
    "graph_sha256",
    "graph_sha256_from_manifest",
    "read_record",
    "record_path",
    "request_for",
]

PLAN_SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanRequest(_Record):
    """Everything that decides what a plan is; the key of the plan cache.

    Attributes:
        graph_sha256: of the ONNX file and its external data, see `graph_sha256`.
        backend, version, cuda: the library, its exact version, and the CUDA major version it was built against.
        capabilities: compute capabilities that the plan runs on.
        device: the GPU's name where kernels were chosen by timing them on it, else None.
        platform: operating system and processor, e.g. `Linux-x86_64`.
        profiles: the ranges of the axes, one mapping a profile.
        precision, is_mixed: the graph's, and whether it keeps parts in fp32.
        optimization_level, workspace_bytes, tf32: as in `BuildOptions`.
    """

    graph_sha256: str
    backend: str
    version: str
    cuda: str | None
    capabilities: tuple[str, ...]
    device: str | None
    platform: str
    profiles: tuple[dict[str, AxisRange], ...]
    precision: Precision
    is_mixed: bool
    optimization_level: int | None
    workspace_bytes: int | None
    tf32: bool

    @property
    def key(self) -> str:
        """Hex SHA-256 of the request as canonical JSON, with the records' schema version."""
        document = {"schema_version": PLAN_SCHEMA_VERSION, **self.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def differences(self, other: PlanRequest) -> tuple[str, ...]:
        """What of `other` is different, in words: `version is 1.6, not 1.7`."""
        return tuple(
            f"{field} is {_shown(getattr(other, field))}, not {_shown(getattr(self, field))}"
            for field in type(self).model_fields
            if getattr(self, field) != getattr(other, field)
        )


class PlanRecord(_Record):
    """`<plan>.json`, beside the plan.

    Attributes:
        graph: component and graph, e.g. `generator/unet`.
        request: what was built.
        plan_sha256, plan_bytes: of the plan's content.
        attestation: what its layers compute in.
        build_seconds: what the build took, on the machine that did it.
        tool_versions: of mi2rage-rt and Python.
    """

    schema_version: int
    graph: str
    request: PlanRequest
    plan_sha256: str
    plan_bytes: int
    attestation: Attestation
    build_seconds: float
    tool_versions: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Present:
    """What is here, to hold a plan against; None is not looked at.

    Attributes:
        backend, version: of the library that is to load the plan.
        capability: of the GPU that is to run it.
        graph_sha256: of the bundle's graph.
    """

    backend: str
    version: str
    capability: str | None = None
    graph_sha256: str | None = None


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_shown, value))
    if isinstance(value, dict):
        return str(ShapeProfile(value))
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _combined(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _belongs(name: str, graph: str) -> bool:
    # Only the graphs beside a `model.onnx` share weights: those of the UNet, with its denoising steps.
    return name.startswith(graph) or name == "model.onnx_data"


def graph_sha256(path: Path) -> str:
    """Hex SHA-256 over an ONNX file and its external data.

    Those are what begins with its name, and the weights that graphs of one folder share, `model.onnx_data`. Names
    suffice: a folder's graphs either share that file (a UNet's `model.onnx`, its denoising steps) or have their own.
    """
    return _combined({file.name: sha256_of(file) for file in path.parent.iterdir() if _belongs(file.name, path.name)})


def graph_sha256_from_manifest(manifest: Manifest, file: str) -> str:
    """The same from a bundle's recorded hashes, which `open_manifest` has checked; weights are not read again."""
    folder, _, graph = file.rpartition("/")
    records = {name.rpartition("/"): record.sha256 for name, record in manifest.files.items()}
    return _combined(
        {name: sha256 for (place, _, name), sha256 in records.items() if place == folder and _belongs(name, graph)}
    )


def request_for(
    api: TrtApi, device: Device | None, graph: GraphSpec, sha256: str, options: BuildOptions
) -> PlanRequest:
    """What `build_plan` with these arguments would build; `sha256` is the graph's, from `graph_sha256`."""
    return PlanRequest(
        graph_sha256=sha256,
        backend=str(api.backend),
        version=api.version,
        cuda=api.cuda,
        capabilities=options.capabilities,
        # Ahead-of-time builds time nothing: the GPU that happens to be here does not matter.
        device=None if api.builds_ahead or device is None else device.name,
        platform=f"{platform.system()}-{platform.machine()}",
        profiles=tuple(dict(profile.axes) for profile in options.profiles),
        precision=graph.precision,
        is_mixed=bool(graph.kept_fp32),
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        tf32=options.tf32,
    )


def record_path(plan: Path) -> Path:
    """Where a plan's record lies: `unet.plan` -> `unet.json`."""
    return plan.with_suffix(".json")


def read_record(plan: Path) -> PlanRecord:
    """Read a plan's record.

    Raises:
        BundleError: there is none, it is damaged, or of another schema version.
    """
    path = record_path(plan)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{plan}: has no readable record {path.name} beside it; expected one made by 'mi2rage-rt build'; "
            "build the bundle again with --force"
        ) from error
    try:
        version = json.loads(text).get("schema_version")
        if version == PLAN_SCHEMA_VERSION:
            return PlanRecord.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; the record is damaged; {_rebuild(plan, None)}") from error
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{path}: is no JSON object; the record is damaged; {_rebuild(plan, None)}") from error
    raise BundleError(
        f"{path}: plan schema version {version}; this release reads {PLAN_SCHEMA_VERSION}; {_rebuild(plan, None)}"
    )


def _rebuild(plan: Path, record: PlanRecord | None) -> str:
    """The command that builds the plan anew, for `BUNDLE/plans/<target>/<name>.plan`."""
    bundle = plan.parents[2] if len(plan.parents) > 2 and plan.parents[1].name == "plans" else None
    words = ["mi2rage-rt", "build", str(bundle) if bundle else "BUNDLE"]
    if record is not None:
        words += ["--graph", record.graph, "--target", "+".join(record.request.capabilities) or "this"]
        words += ["--backend", record.request.backend]
        words += [word for axes in record.request.profiles if axes for word in ("--profile", str(ShapeProfile(axes)))]
    return f"build it again: {shlex.join([*words, '--force'])}"


def check_plan(
    plan: Path,
    record: PlanRecord,
    present: Present,
    *,
    inputs: GraphSpec | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Refuse a plan that does not belong here, before it is loaded.

    Args:
        plan: the file.
        record: from `read_record`.
        present: the library, the GPU and the graph that are here.
        inputs: the graph, needed where shapes are given.
        shapes: input shapes that a run will have; one of the plan's profiles must hold them.

    Raises:
        BundleError: the message says which part differs and gives the command that builds the plan anew.
    """
    for subject, came, expected in _mismatches(plan, record, present):
        raise BundleError(f"{plan}: {subject} is {came}; expected {expected}; {_rebuild(plan, record)}")
    if inputs is not None and shapes is not None:
        reason = misfit([ShapeProfile(axes) for axes in record.request.profiles], inputs.inputs, shapes)
        if reason is not None:
            held = " or ".join(str(ShapeProfile(axes)) for axes in record.request.profiles)
            raise BundleError(
                f"{plan}: {reason}; expected what it was built for, {held or 'fixed shapes'}; give such shapes, or "
                f"widen --profile and {_rebuild(plan, record)}"
            )


def find_plan(bundle: Path, name: str, present: Present) -> tuple[Path | None, str]:
    """The plan of a graph (`generator/unet`) among a bundle's that belongs here, or None and why none does.

    Its bytes are not read: `check_plan` does that when it is loaded.
    """
    reasons = []
    for plan in sorted(bundle.glob(f"plans/*/{glob.escape(name.replace('/', '-'))}.plan")):
        try:
            misfits = _misfits(read_record(plan), present)
        except BundleError as error:
            reasons.append(str(error))
            continue
        if not misfits:
            return plan, ""
        subject, came, expected = misfits[0]
        reasons.append(f"{plan.parent.name}: {subject} is {came}; expected {expected}")
    return None, "; ".join(reasons) or "the bundle has no plan of it"


def _mismatches(plan: Path, record: PlanRecord, present: Present) -> list[tuple[str, str, str]]:
    """(what, what came, what was expected); the plan's own bytes are read only if all else fits."""
    found = _misfits(record, present)
    if found:
        return found
    size = plan.stat().st_size if plan.is_file() else None
    if size is None:
        return [("the plan", "missing", f"a file of {record.plan_bytes} bytes")]
    if size != record.plan_bytes:
        return [("its size", f"{size} bytes", f"{record.plan_bytes}, as recorded")]
    if sha256_of(plan) != record.plan_sha256:
        return [("its content", "changed (its SHA-256 differs)", "the one recorded")]
    return []


def _misfits(record: PlanRecord, present: Present) -> list[tuple[str, str, str]]:
    request = record.request
    found: list[tuple[str, str, str]] = []
    if present.backend != request.backend:
        found.append(("the library here", present.backend, f"{request.backend}, which built it"))
    elif present.version != request.version:
        found.append((f"{request.backend} here", present.version, f"{request.version}, the one that built it"))
    if present.capability is not None and present.capability not in request.capabilities:
        found.append(("the GPU here", present.capability, f"{'+'.join(request.capabilities)}, what it was built for"))
    if present.graph_sha256 is not None and present.graph_sha256 != request.graph_sha256:
        found.append(
            (
                f"the graph {record.graph}",
                f"another one now (SHA-256 {present.graph_sha256[:12]})",
                f"the graph and weights that it was built from ({request.graph_sha256[:12]})",
            )
        )
    return found
