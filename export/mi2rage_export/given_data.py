"""Samples that an export is measured or calibrated on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mi2rage_engines.errors import DataError

if TYPE_CHECKING:
    from mi2rage_export.request import ExportRequest
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.samples import Sample

__all__ = ["GivenData", "check_files", "check_labels", "read_data"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GivenData:
    """Samples of a file with their images, uint8 `(H, W, 3)` each or None where a sample has none."""

    file: Path
    samples: tuple[Sample, ...]
    images: tuple[Image | None, ...]


def read_data(file: Path, images: Path | None = None, limit: int | None = None) -> GivenData:
    """Read samples and their images.

    Args:
        file: JSONL or MNRE rows.
        images: folder of the images; by default the file's own.
        limit: only the first so many rows.

    Raises:
        DataError: the file or an image cannot be read.
    """
    from mi2rage_rt.image_folder import find_image
    from mi2rage_rt.images import load_image
    from mi2rage_rt.samples import read_samples

    folder = images or file.parent
    samples = read_samples(file)[:limit]
    loaded: list[Image | None] = []
    for sample in samples:
        try:
            loaded.append(None if sample.image is None else load_image(find_image(folder, sample.image)))
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error
    return GivenData(file, tuple(samples), tuple(loaded))


def check_files(request: ExportRequest, roles: Collection[str]) -> None:
    """Refuse samples that could not be used, before a model is loaded; no image is read.

    Args:
        request: its `verify` and `calibration`.
        roles: of the models that are to be exported.

    Raises:
        DataError: a file cannot be read, an image is missing, or a captioner is to be calibrated without images.
    """
    from mi2rage_rt.image_folder import find_image

    for file in filter(None, (request.verify, request.calibration)):
        for sample in _samples(file, request):
            try:
                if sample.image is not None:
                    find_image(request.images or file.parent, sample.image)
            except DataError as error:
                raise DataError(f"{file}, sample {sample.id}: {error}") from error
    calibration = _samples(request.calibration, request)
    is_shown = "captioner" in roles and _is_captioner_quantised(request)
    if calibration and is_shown and all(sample.image is None for sample in calibration):
        raise DataError(
            f"{request.calibration}: no sample has an image; expected some to calibrate the captioner with; give "
            "others with --calibration, or the captioner another --precision"
        )


def check_labels(request: ExportRequest, labels: Sequence[str]) -> None:
    """Refuse labels of the samples to verify with that a classifier does not know; say where some have none.

    Raises:
        DataError: a label is not among `labels`.
    """
    samples = _samples(request.verify, request)
    for sample in samples:
        if sample.label is not None and sample.label not in labels:
            raise DataError(
                f"{request.verify}, sample {sample.id}: its label is {sample.label!r}, which the classifier does not "
                f"know; expected one of {', '.join(labels)}; give samples of its own relations"
            )
    without = sum(sample.label is None for sample in samples)
    if without:
        logger.warning(
            "%s: %d of %d samples have no label; F1 is measured only where all have one",
            request.verify,
            without,
            len(samples),
        )


def _samples(file: Path | None, request: ExportRequest) -> list[Sample]:
    from mi2rage_rt.samples import read_samples

    return read_samples(file)[: request.limit] if file is not None else []


def _is_captioner_quantised(request: ExportRequest) -> bool:
    wanted = (request.precision_of(f"captioner/{name}") for name in ("vision", "decoder"))
    return any(precision.startswith("int8") for precision in wanted)
