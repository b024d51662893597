"""Samples that an export is measured or calibrated on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from mi2rage_engines.errors import DataError

if TYPE_CHECKING:
    from mi2rage_export.request import ExportRequest
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.samples import Sample

__all__ = ["GivenData", "check_files", "check_labels", "first_equal_images", "read_data"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GivenData:
    """Samples of a file with their images, uint8 `(H, W, 3)` each or None where a sample has none.

    Those of `read_data` are decoded anew whenever one is asked for, and not kept: all at once would fill the memory.
    """

    file: Path
    samples: tuple[Sample, ...]
    images: Sequence[Image | None]


class _ImagesOnDisk(Sequence["Image | None"]):
    """Images of samples, each decoded when it is asked for; a slice is such a sequence too.

    Args:
        ids: of the samples, for messages.
        files: of their images.
    """

    def __init__(self, ids: Sequence[str], files: Sequence[Path | None]) -> None:
        self._ids, self._files = ids, files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, place: int) -> Image | None: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Image | None]: ...

    def __getitem__(self, place: int | slice) -> Image | Sequence[Image | None] | None:
        """Decode one image.

        Raises:
            DataError: it cannot be decoded; the message names the sample.
        """
        if isinstance(place, slice):
            return _ImagesOnDisk(self._ids[place], self._files[place])
        from mi2rage_rt.images import load_image

        file = self._files[place]
        try:
            return None if file is None else load_image(file)
        except DataError as error:
            raise DataError(f"sample {self._ids[place]}: {error}") from error


def first_equal_images(images: Sequence[Image | None]) -> list[int | None]:
    """What `mi2rage_rt.classifier_batches.distinct_images` gives, with one image in memory at a time."""
    places: dict[bytes, int] = {}
    firsts: list[int | None] = []
    for place, image in enumerate(images):
        if image is None:
            firsts.append(None)
            continue
        digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()
        firsts.append(places.setdefault(digest, place))
    return firsts


def read_data(file: Path, images: Path | None = None, limit: int | None = None) -> GivenData:
    """Read samples and find their images, which are decoded later, one by one as they are needed.

    Args:
        file: JSONL or MNRE rows.
        images: folder of the images; by default the file's own.
        limit: only the first so many rows.

    Raises:
        DataError: the file cannot be read, or an image is missing.
    """
    from mi2rage_rt.image_folder import find_image
    from mi2rage_rt.samples import read_samples

    folder = images or file.parent
    samples = read_samples(file)[:limit]
    files: list[Path | None] = []
    for sample in samples:
        try:
            files.append(None if sample.image is None else find_image(folder, sample.image))
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error
    return GivenData(file, tuple(samples), _ImagesOnDisk([sample.id for sample in samples], files))


def check_files(request: ExportRequest, roles: Collection[str]) -> None:
    """Refuse samples that could not be used, before a model is loaded; no image is read.

    Args:
        request: its `verify` and `calibration`.
        roles: of the models that are to be exported.

    Raises:
        DataError: a file cannot be read, an image is missing, or a captioner's or classifier's view of images is to be
            calibrated without any.
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
    if not calibration or any(sample.image is not None for sample in calibration):
        return
    seen_by = {
        "captioner": _is_captioner_quantised(request),
        "classifier": request.precision_of("classifier/image") == "int8-qdq",
    }
    for role in ("captioner", "classifier"):
        if role in roles and seen_by[role]:
            raise DataError(
                f"{request.calibration}: no sample has an image; expected some to calibrate the {role} with; give "
                f"others with --calibration, or the {role} another --precision"
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
