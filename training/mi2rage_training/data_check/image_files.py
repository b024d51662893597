"""The image files that the rows name: there, readable, and each only once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mi2rage_engines.errors import DataError
from mi2rage_rt.image_folder import find_image
from mi2rage_rt.images import decode_image
from mi2rage_rt.progress import track
from mi2rage_training.data_check.findings import Finding, Severity, places
from mi2rage_training.data_check.rows import Row

__all__ = ["ImageFacts", "ImageFile", "image_facts", "image_findings"]


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """One decoded image file: SHA-256 of its bytes, and its sizes."""

    sha256: str
    size_bytes: int
    width_px: int
    height_px: int


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFacts:
    """The images of a data set by name: what is known of each, or what is wrong with it."""

    files: dict[str, ImageFile]
    missing: dict[str, str]
    undecodable: dict[str, str]


def image_facts(rows: Sequence[Row], folder: Path) -> ImageFacts:
    """Read and decode every image that a row names.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the folder of the images; check --images")
    facts = ImageFacts({}, {}, {})
    for name in track(sorted({row.image for row in rows if row.image is not None}), "images"):
        try:
            path = find_image(folder, name)
        except DataError as error:
            facts.missing[name] = str(error)
            continue
        try:
            content = path.read_bytes()
            height, width = decode_image(content, name).shape[:2]
        except (DataError, OSError) as error:
            facts.undecodable[name] = str(error)
            continue
        facts.files[name] = ImageFile(hashlib.sha256(content).hexdigest(), len(content), width, height)
    return facts


def image_findings(splits: Mapping[str, Sequence[Row]], facts: ImageFacts) -> list[Finding]:
    """Images that are missing, that cannot be decoded, and equal files under two names."""
    rows = [row for split in splits.values() for row in split]
    findings = []
    for faults, kind, what, advice in (
        (facts.missing, "missing_images", "images are not in the folder", "fetch them, or leave their rows out"),
        (facts.undecodable, "undecodable_images", "images cannot be decoded", "fetch them again"),
    ):
        if faults:
            hit = [row for row in rows if row.image in faults]
            evidence = f"{len(faults)} images, {len(hit)} rows"
            examples = places(f"{row.place}: {row.image}" for row in hit)
            findings.append(Finding(Severity.ERROR, kind, what, evidence, advice, examples))
    names: dict[str, list[str]] = defaultdict(list)
    for name, file in facts.files.items():
        names[file.sha256].append(name)
    twice = [group for group in names.values() if len(group) > 1]
    if twice:
        evidence = f"{sum(map(len, twice))} names of {len(twice)} files"
        advice = "keep such images in one split and one fold"
        what = "the same image file has several names"
        examples = places(" = ".join(group[:3]) for group in twice)
        findings.append(Finding(Severity.NOTE, "duplicate_images", what, evidence, advice, examples))
    return findings
