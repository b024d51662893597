"""The bundle: one folder with `bundle.json`, graphs, tokenizers; it opens only if it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.errors import BundleError
from mi2rage_engines.spec import CaptionerSpec, ClassifierSpec, ComponentSpec, GeneratorSpec, GraphSpec
from mi2rage_engines.validation import first_problem

__all__ = ["MANIFEST_NAME", "SCHEMA_VERSION", "FileRecord", "Manifest", "ParityRecord", "open_manifest", "record_files"]

SCHEMA_VERSION = 2
MANIFEST_NAME = "bundle.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of the bundle: its size in bytes and the hex SHA-256 of its content."""

    sha256: str
    bytes: int


class ParityRecord(_Record):
    """One check of an export against the PyTorch module it came from.

    Attributes:
        subject: e.g. `generator/unet` or `classifier`.
        measure: what was compared, e.g. `max_abs_scaled`, `caption_agreement`, `image_psnr_db`.
        value, threshold: the figure and its bound; no bound where the figure is for information.
        passed: whether the bound holds.
        cases: how many inputs were compared.
    """

    subject: str
    measure: str
    value: float
    threshold: float | None
    passed: bool
    cases: int


class Manifest(_Record):
    """`bundle.json`. Every component is optional; every file but the manifest itself is recorded.

    Attributes:
        source: where each component's model came from, by component.
        licences: of those models as their model cards state them, by component; `unknown` where they state none.
        tool_versions: of what exported them.
        parity: what the export was checked for, against PyTorch in fp32.
        files: by POSIX path relative to the bundle. `plans/`, where engines are put, is not among them.
    """

    schema_version: int
    generator: GeneratorSpec | None = None
    captioner: CaptionerSpec | None = None
    classifier: ClassifierSpec | None = None
    source: dict[str, str]
    licences: dict[str, str] = {}
    tool_versions: dict[str, str]
    parity: tuple[ParityRecord, ...]
    files: dict[str, FileRecord]

    @property
    def components(self) -> tuple[ComponentSpec, ...]:
        """The components that are there, in the order generator, captioner, classifier."""
        found = (self.generator, self.captioner, self.classifier)
        return tuple(component for component in found if component is not None)

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """Every graph by component and name, e.g. `generator/unet`."""
        return {
            f"{component.kind}/{name}": graph
            for component in self.components
            for name, graph in component.graphs.items()
        }

    @property
    def checks(self) -> tuple[ParityRecord, ...]:
        """The parity records that have a bound to hold."""
        return tuple(record for record in self.parity if record.threshold is not None)

    @property
    def precision(self) -> str:
        """The graphs' precisions, e.g. `fp16`, or `fp16, fp32` where they differ."""
        return ", ".join(sorted({graph.precision for graph in self.graphs.values()}))


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Sizes and hashes of every file below `folder` but the manifest, by POSIX path relative to it, sorted."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew fp32 alone, said so once for the whole bundle, and kept no licences."""
    return {key: value for key, value in document.items() if key != "precision"} | {"schema_version": 2}


_UPGRADES = {1: _from_version_1}
"""From each older version to the next one."""


def _upgraded(folder: Path, document: Any) -> Any:
    """The manifest's document in today's schema; what is no manifest at all is left to the validation."""
    # Before the whole is validated: another version's keys are not damage.
    if not isinstance(document, dict):
        return document
    version = document.get("schema_version", SCHEMA_VERSION)
    while isinstance(version, int) and version in _UPGRADES:
        document = _UPGRADES[version](document)
        version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{folder}: bundle schema version {version}; this release reads 1 to {SCHEMA_VERSION}; export it again "
            "with this release, or open it with the one that wrote it"
        )
    return document


def _named_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Each component's files: (what it is, POSIX path)."""
    for name, graph in manifest.graphs.items():
        yield name, graph.file
    for component in manifest.components:
        yield f"{component.kind}'s tokenizer", component.tokenizer.file


def _parse(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a bundle made by 'mi2rage-rt export'")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{folder}: has no readable {MANIFEST_NAME}; expected a bundle made by 'mi2rage-rt export'"
        ) from error
    try:
        document = _upgraded(folder, json.loads(text))
        return Manifest.model_validate(document)
    except json.JSONDecodeError as error:
        raise BundleError(
            f"{path}: not valid JSON ({error}); the manifest is damaged; copy the bundle again, or export again"
        ) from error
    except ValidationError as error:
        raise BundleError(
            f"{path}: {first_problem(error)}; the manifest is damaged; copy the bundle again, or export again"
        ) from error


def open_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check every file it names.

    Args:
        folder: the bundle.

    Raises:
        BundleError: the folder or its manifest is missing or damaged, the schema version is another one, or a file
            is missing, changed, or of another size; the message names it.
    """
    manifest = _parse(folder)
    for subject, file in _named_files(manifest):
        if file not in manifest.files:
            raise BundleError(
                f"{folder}: the file {file} of the {subject} is not among the manifest's recorded files; export again"
            )
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{folder}: the file {name} is missing; copy the bundle whole, or export again")
        size = path.stat().st_size
        if size != record.bytes:
            raise BundleError(
                f"{folder}: {name} has {size} bytes, expected {record.bytes}; copy the bundle again, or export again"
            )
        if sha256_of(path) != record.sha256:
            raise BundleError(
                f"{folder}: {name} was changed (its SHA-256 differs from the manifest's); copy or export again"
            )
    return manifest
