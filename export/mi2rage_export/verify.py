"""A bundle against the answers that PyTorch gave: after an export, or again on the machine that is to run it.

`python -m mi2rage_export.verify` is the process of its own in which an export is checked; it loads no PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.bundle import Manifest, ParityRecord, open_manifest
from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import (
    BundleError,
    EngineError,
    InputError,
    Mi2rageError,
    OutsideProfileError,
)
from mi2rage_engines.open_engine import EngineOpener
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import GraphSpec, Precision
from mi2rage_export import parity
from mi2rage_export.given_checks import check_given, precision_of
from mi2rage_export.given_data import GivenData, read_data
from mi2rage_export.reference import read_references
from mi2rage_rt.bundle import Bundle

if TYPE_CHECKING:
    from mi2rage_export.reference import CaptionerReference, References

__all__ = ["Checks", "check_bundle", "check_in_process"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Checks:
    """What a check found.

    Attributes:
        records: the figures.
        ran_on: by graph what really ran it: ONNX Runtime's provider, or `tensorrt plan sm89`.
        left_out: by graph or component what was not checked, as it lies outside of its plan's profiles.
    """

    records: list[ParityRecord]
    ran_on: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


def check_bundle(
    folder: Path,
    *,
    components: Sequence[str] = (),
    backend: str = "auto",
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    data: GivenData | None = None,
) -> Checks:
    """Check the graphs and components of a bundle against the reference cases it holds.

    Args:
        folder: the bundle.
        components: which; by default all.
        backend: what runs the graphs, as for `Bundle.open`; with a plan for it, the plan is checked.
        providers: ONNX Runtime's, in place of a backend; the first must start.
        threads: CPU threads of one operator.
        data: the samples that it was exported with (`export --verify`), to measure the task's own figures again.

    Raises:
        BundleError: the bundle is not whole, lacks a component, or holds no reference cases.
        DataError: `data` is not what the bundle was exported with.
        InputError: the backend or a provider cannot be had here, or both came.
        EngineError: a graph cannot be loaded or run, or not on what was asked for; or nothing could be checked.
    """
    manifest = open_manifest(folder)
    with tempfile.TemporaryDirectory(prefix="mi2rage-verify-") as scratch:
        opener = EngineOpener(
            folder, manifest, backend, providers=providers, threads=threads, frugal=True, is_strict=True
        )
        checks = Checks([])
        bundle = Bundle(folder, manifest, _noting(opener, manifest, folder, Path(scratch), checks.ran_on))
        if unknown := sorted(set(components) - set(bundle.components)):
            raise BundleError(
                f"{folder}: has no component {', '.join(unknown)}; expected some of {', '.join(bundle.components)}; "
                "name one of these, or export the bundle with it"
            )
        references = read_references(folder)
        chosen = tuple(name for name in bundle.components if not components or name in components)
        for name, spec in manifest.graphs.items():
            if name.partition("/")[0] in chosen:
                found = _check_graph(bundle, name, spec, references)
                checks.records.extend(found)
                of = len(references.graphs[name].cases)
                if without := of - (found[0].cases if found else 0):
                    checks.left_out[name] = f"{without} of {of} cases are outside of the plan's profiles"
        for role in chosen:
            with _leaving_out(role, checks):
                checks.records.extend(_check_component(bundle, role, references))
        if data is not None:
            with _leaving_out("data", checks):
                checks.records.extend(check_given(bundle, chosen, references.data, data))
        if chosen and not checks.records:
            raise EngineError(
                f"{folder}: every reference case is outside of the plans' profiles; expected some inside; build the "
                "plans again with a wider --profile, or give --backend ort-cuda"
            )
        return checks


@contextlib.contextmanager
def _leaving_out(name: str, checks: Checks) -> Iterator[None]:
    """Note what a plan was not built for, and go on."""
    try:
        yield
    except OutsideProfileError as error:
        checks.left_out[name] = str(error)


def _check_graph(bundle: Bundle, name: str, spec: GraphSpec, references: References) -> list[ParityRecord]:
    engine = bundle.open_engine(bundle.folder / spec.file)  # in a function of its own: its memory is needed right after
    return parity.check_graph(engine, name, spec, references.graphs[name], bundle.folder)


def _noting(
    opener: EngineOpener, manifest: Manifest, folder: Path, scratch: Path, ran_on: dict[str, str]
) -> Callable[[Path], Engine]:
    """What loads a graph, and notes where it runs.

    ONNX Runtime has no bf16 on CPUs: there such a graph is run in fp32, with its weights.
    """
    names = {folder / graph.file: name for name, graph in manifest.graphs.items()}

    def open_engine(file: Path) -> Engine:
        name = names[file]
        choice = opener.choice(name)
        engine: Engine
        if manifest.graphs[name].precision == "bf16" and choice.providers[:1] == ("CPUExecutionProvider",):
            from mi2rage_export.bf16 import widen_bfloat16

            copy = scratch / "-".join(file.relative_to(folder).parts)
            if not copy.exists():
                widen_bfloat16(file, copy)
            engine = opener.on_onnxruntime(copy, choice)
        else:
            engine = opener(file)
        if choice.plan is not None:
            ran_on[name] = f"{choice.backend} plan {choice.plan.parent.name}"
        else:
            ran_on[name] = engine.providers[0] if isinstance(engine, OrtEngine) else str(choice.backend)
        return engine

    return open_engine


def _check_component(bundle: Bundle, role: str, references: References) -> list[ParityRecord]:
    precision = precision_of(bundle, role)
    reference = getattr(references, role)
    if role == "generator":
        return parity.check_generator(bundle.generator(), reference, bundle.folder, precision)
    if role == "captioner":
        return _check_captions(bundle, reference, precision)
    return parity.check_classifier(bundle.classifier(), reference, bundle.folder, precision)


def _check_captions(bundle: Bundle, reference: CaptionerReference, precision: Precision) -> list[ParityRecord]:
    from mi2rage_rt.captioner import CaptionOptions

    records = parity.check_captioner(bundle.captioner(), reference, precision)
    if "captioner/decoder_static" in bundle.manifest.graphs:
        static = bundle.captioner(CaptionOptions(static_cache=True))
        records += parity.check_captioner(static, reference, precision, "captioner/decoder_static")
    return records


def check_in_process(
    folder: Path,
    *,
    components: Sequence[str] = (),
    backend: str = "auto",
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    data: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> Checks:
    """`check_bundle` in a process of its own, which shares nothing with the one that exported.

    Args:
        folder, components, backend, providers, threads: see `check_bundle`.
        data, images, limit: see `read_data`.

    Raises:
        InputError, EngineError: what `check_bundle` raises, with the same message.
    """
    job = {
        "folder": str(folder),
        "components": list(components),
        "backend": backend,
        "providers": list(providers) if providers else None,
        "threads": threads,
        "data": str(data) if data else None,
        "images": str(images) if images else None,
        "limit": limit,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"no message, exit code {done.returncode}"
        raise EngineError(
            f"{folder}: the process that checks it ended ({reason}); expected its figures; is there enough memory?"
        ) from error
    for line in done.stderr.splitlines():
        logger.warning("%s", line)
    if "error" in answer:
        raise (InputError if answer["exit_code"] == InputError.exit_code else EngineError)(answer["error"])
    records = [ParityRecord.model_validate(record) for record in answer["records"]]
    return Checks(records, answer["ran_on"], answer["left_out"])


def _main() -> None:
    """Read a job from stdin, print the records or the error as JSON."""
    job = json.load(sys.stdin)
    try:
        data = None
        if job["data"] is not None:
            data = read_data(Path(job["data"]), Path(job["images"]) if job["images"] else None, job["limit"])
        checks = check_bundle(
            Path(job["folder"]),
            components=job["components"],
            backend=job["backend"],
            providers=job["providers"],
            threads=job["threads"],
            data=data,
        )
        answer: dict[str, Any] = {
            "records": [record.model_dump() for record in checks.records],
            "ran_on": checks.ran_on,
            "left_out": checks.left_out,
        }
    except Mi2rageError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
