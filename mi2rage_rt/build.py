"""TensorRT plans for a bundle's graphs, placed in `BUNDLE/plans/<target>/<component>-<graph>.plan`.

Beside each plan lie its record (`.json`, see `mi2rage_engines.plan`) and the builder's log (`.log`). The three appear
together or not at all; the bundle's own files are only read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.plan import (
    PLAN_SCHEMA_VERSION,
    PlanRecord,
    PlanRequest,
    Present,
    check_plan,
    graph_sha256_from_manifest,
    read_record,
    record_path,
    request_for,
)
from mi2rage_engines.plan_cache import Content, PlanCache, default_cache_folder, write_content
from mi2rage_engines.profiles import ShapeProfile, completed, default_profile, dynamic_axes, profile_from_text
from mi2rage_engines.spec import GraphSpec
from mi2rage_engines.trt_api import Device, Target, TrtApi, find_device, open_api, target_from_text
from mi2rage_engines.trt_attest import compute_dtype, little_int8
from mi2rage_engines.trt_build import BuildOptions, build_plan
from mi2rage_engines.trt_monitor import OnProgress
from mi2rage_rt.extras import version_of
from mi2rage_rt.progress import Steps, steps

__all__ = ["DEFAULT_CACHE_LIMIT_BYTES", "BuildResult", "BuildSettings", "build_bundle", "plan_path"]

logger = logging.getLogger(__name__)

DEFAULT_CACHE_LIMIT_BYTES = 20 * 10**9
_PLAN, _RECORD, _LOG = "plan", "record.json", "build.log"


@dataclasses.dataclass(frozen=True, slots=True)
class BuildSettings:
    """What to build, for what, and how.

    Attributes:
        targets: see `target_from_text`; each has plans of its own.
        backend: `tensorrt` or `tensorrt-rtx`; by default see `open_api`.
        graphs: names such as `unet` or `generator/unet`; empty builds all.
        profiles: texts such as `batch=1:4:16,height=64`, one profile each; a graph takes the axes that it has. By
            default the graph's own ranges.
        cache: folder of the plan cache; by default `default_cache_folder()`.
        cache_limit_bytes: what the cache may hold.
        optimization_level, workspace_bytes, tf32: see `BuildOptions`.
        force: replace plans that are there already and differ.
    """

    targets: tuple[str, ...] = ("this",)
    backend: str | None = None
    graphs: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    cache: Path | None = None
    cache_limit_bytes: int = DEFAULT_CACHE_LIMIT_BYTES
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    tf32: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class BuildResult:
    """One plan: where it lies, its record, and how it came there (`built`, `cached`, or `kept` as it was)."""

    path: Path
    target: str
    record: PlanRecord
    how: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One graph for one target."""

    name: str
    graph: GraphSpec
    target: Target
    options: BuildOptions
    request: PlanRequest
    path: Path


def plan_path(bundle: Path, target: str, name: str) -> Path:
    """Where the plan of a graph (`generator/unet`) for a target (`sm89`) lies in its bundle."""
    return bundle / "plans" / target / f"{name.replace('/', '-')}.plan"


def build_bundle(bundle: Path | str, settings: BuildSettings | None = None) -> list[BuildResult]:
    """Build the plans of a bundle's graphs, or take them from the cache.

    Everything that can be refused without building is refused first. An error or Ctrl-C in the middle leaves the plans
    that were finished, whole, and nothing of the others.

    Args:
        bundle: the folder that `mi2rage-rt export` wrote.
        settings: by default every graph for the GPU that is here.

    Raises:
        BundleError: the bundle is not whole, or holds plans that differ and `force` is off.
        InputError: a target, graph, profile or precision that cannot be built.
        MissingExtraError: the backend is not installed.
        EngineError: the backend refused a graph, or built it in another precision.
        OSError: the bundle's folder cannot be written, or the disk is full.
    """
    settings = settings or BuildSettings()
    folder = Path(bundle)
    manifest = open_manifest(folder)
    api, device = open_api(settings.backend), find_device()
    jobs = _jobs(folder, manifest, settings, api, device)
    kept = {job.path: record for job in jobs if (record := _standing(job, settings.force)) is not None}
    for job in (job for job in jobs if job.path not in kept):
        _check_place(folder, job.path)
    cache = PlanCache(settings.cache or default_cache_folder(), settings.cache_limit_bytes)
    results = []
    with steps("building", len(jobs)) as bar:
        for job in jobs:
            record, how = kept.get(job.path), "kept"
            if record is None:
                record, how = _fetch(folder, job, api, cache, bar)
            else:
                bar.advance()
            results.append(BuildResult(job.path, job.target.name, record, how))
    # A graph's own share is the same for every target.
    for text in dict.fromkeys(little_int8(result.record.attestation, result.record.graph) for result in results):
        if text is not None:
            logger.warning("%s", text)
    return results


def _jobs(folder: Path, manifest: Manifest, settings: BuildSettings, api: TrtApi, device: Device | None) -> list[_Job]:
    graphs = _chosen(folder, manifest, settings.graphs)
    profiles = [profile_from_text(text) for text in settings.profiles]
    _check_axes(profiles, graphs)
    targets = {(target := target_from_text(text, api, device)).name: target for text in settings.targets}
    cache = settings.cache or default_cache_folder()
    jobs = []
    for target in targets.values():
        for name, graph in graphs.items():
            compute_dtype(graph.precision, name)
            sides = _multiples(manifest, name)
            # Profiles that are the same for this graph would only make its plan larger.
            own = {str(p): p for p in (completed(p, graph, name, multiples=sides) for p in profiles)}
            options = BuildOptions(
                profiles=tuple(own.values()) or (default_profile(graph),),
                capabilities=target.capabilities,
                optimization_level=settings.optimization_level,
                workspace_bytes=settings.workspace_bytes,
                tf32=settings.tf32,
                timing_cache=cache / "timing" / f"{api.backend}-{api.version}-{target.name}.cache",
            )
            request = request_for(api, device, graph, graph_sha256_from_manifest(manifest, graph.file), options)
            jobs.append(_Job(name, graph, target, options, request, plan_path(folder, target.name, name)))
    return jobs


def _multiples(manifest: Manifest, name: str) -> dict[str, int]:
    """What the sides of a graph's latents must be multiples of, by axis; the autoencoder takes any."""
    if manifest.generator is None or not name.startswith(("generator/unet", "generator/denoise_step")):
        return {}
    return dict.fromkeys(("height", "width"), manifest.generator.latents.multiple)


def _check_place(folder: Path, plan: Path) -> None:
    """Refuse before a long build what could not be written after it."""
    place = next(parent for parent in plan.parents if parent == folder or os.path.lexists(parent))
    if plan.is_dir() or not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{plan}: cannot be written; expected a folder that takes plans; build in a copy of {folder}")


def _chosen(folder: Path, manifest: Manifest, wanted: Sequence[str]) -> dict[str, GraphSpec]:
    """The graphs by full name (`generator/unet`) that were asked for."""
    every = manifest.graphs
    unknown = [name for name in wanted if name not in every and not any(full.endswith(f"/{name}") for full in every)]
    if unknown:
        raise BundleError(
            f"{folder}: has no graph {', '.join(unknown)}; expected some of {', '.join(every)}; name one of them"
        )
    return {
        full: graph
        for full, graph in every.items()
        if not wanted or any(full == name or full.endswith(f"/{name}") for name in wanted)
    }


def _check_axes(profiles: Sequence[ShapeProfile], graphs: Mapping[str, GraphSpec]) -> None:
    known = list(dict.fromkeys(axis for graph in graphs.values() for axis in dynamic_axes(graph)))
    for profile in profiles:
        unknown = [axis for axis in profile.axes if axis not in known]
        if unknown:
            raise InputError(
                f"profile {profile}: no graph has an axis {', '.join(unknown)}; expected some of {', '.join(known)}; "
                "name one of them"
            )


def _standing(job: _Job, force: bool) -> PlanRecord | None:
    """The record of a plan that is there already and is just what is asked for; None where it is to be built."""
    if not job.path.exists():
        return None
    request = job.request
    capability = request.capabilities[0]
    present = Present(request.backend, request.version, capability, request.graph_sha256)
    try:
        record = read_record(job.path)
        check_plan(job.path, record, present)
    except BundleError:
        if not force:
            raise
        return None
    differences = record.request.differences(request)
    if not differences:
        return record
    if force:
        return None
    raise BundleError(
        f"{job.path}: is there already and was built otherwise: asked for now, {'; '.join(differences)}; expected the "
        "same settings; give --force to replace it"
    )


def _fetch(folder: Path, job: _Job, api: TrtApi, cache: PlanCache, bar: Steps) -> tuple[PlanRecord, str]:
    """Build a plan or take it from the cache, and place it."""
    subject = f"{job.name} {job.target.name}"
    shown = 0.0

    def on_progress(phase: str, share: float) -> None:
        nonlocal shown
        bar.note(f"{subject}: {phase}")
        bar.advance(share - shown)
        shown = share

    bar.note(subject)
    build = functools.partial(_built_files, folder, job, api, on_progress)
    with cache.fetch(job.request.key, build) as fetched:
        record = _record_in(fetched.files[_RECORD]).model_copy(update={"graph": job.name})
        _place(job.path, record, fetched.files)
    bar.advance(1.0 - shown)
    return record, "cached" if fetched.was_cached else "built"


def _built_files(folder: Path, job: _Job, api: TrtApi, on_progress: OnProgress) -> dict[str, bytes | memoryview]:
    built = build_plan(api, folder / job.graph.file, job.graph, job.options, name=job.name, on_progress=on_progress)
    record = PlanRecord(
        schema_version=PLAN_SCHEMA_VERSION,
        graph=job.name,
        request=job.request,
        plan_sha256=hashlib.sha256(built.content).hexdigest(),
        plan_bytes=built.content.nbytes,
        attestation=built.attestation,
        build_seconds=round(built.seconds, 3),
        tool_versions={"python": platform.python_version(), "mi2rage-rt": version_of("mi2rage-rt") or "unknown"},
    )
    return {_PLAN: built.content, _RECORD: _json(record), _LOG: built.log.encode()}


def _json(record: PlanRecord) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _record_in(content: Content) -> PlanRecord:
    return PlanRecord.model_validate_json(content.read_bytes() if isinstance(content, Path) else bytes(content))


def _place(path: Path, record: PlanRecord, files: Mapping[str, Content]) -> None:
    """Write log, record and plan beside their places and rename them, the plan last: whoever sees it sees all three."""
    contents: dict[Path, Content] = {
        path.with_suffix(".log"): files[_LOG],
        record_path(path): _json(record),
        path: files[_PLAN],
    }
    with _new_folder(path.parent), tempfile.TemporaryDirectory(prefix=".plan.", dir=path.parent) as drafts:
        for place, content in contents.items():
            write_content(content, Path(drafts) / place.name)
        path.unlink(missing_ok=True)  # an old plan must not stand beside the new record
        placed: list[Path] = []
        try:
            for place in contents:
                (Path(drafts) / place.name).replace(place)
                placed.append(place)
        except BaseException:
            for place in placed:
                place.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; what was made and stayed empty goes again when the block fails."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
