"""Images from requests: few formats, and limits that hold before a pixel is decoded."""

from __future__ import annotations

import asyncio
import functools
import io
from typing import Any

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps, UnidentifiedImageError

from mi2rage_engines.errors import DataError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.batching import MicroBatcher
from mi2rage_rt.images import fitted
from mi2rage_rt.protocols import Image
from mi2rage_rt.serve.limits import Limits

__all__ = ["FORMATS", "UploadGate", "image_from_upload"]

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is decoded; every other decoder of Pillow stays out of reach."""


def image_from_upload(content: bytes, limits: Limits, processing: ImagePreprocessing | None) -> Image:
    """Decode an untrusted image file, turned upright.

    Args:
        content: the file.
        limits: of pixels and aspect, compared with what the file's header says.
        processing: makes the image as small as its model sees it, see `fitted`; None keeps it as it is.

    Returns:
        uint8 `(H, W, 3)`, the same as `decode_image` gives, fitted.

    Raises:
        DataError: the bytes are no image of these formats, damaged, or over a limit.
    """
    try:
        with PilImage.open(io.BytesIO(content), formats=FORMATS) as picture:
            _check_size(picture.size, limits)
            ImageOps.exif_transpose(picture, in_place=True)
            pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"), dtype=np.uint8)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"image: not an image; expected a {', '.join(FORMATS)} file; send one of these") from error
    except PilImage.DecompressionBombError as error:
        raise DataError(f"image: too large; expected at most {limits.max_pixels} pixels; scale it down") from error
    except Exception as error:  # whatever a decoder raises, the file is at fault
        raise DataError(
            f"image: cannot be decoded ({type(error).__name__}); expected a whole file; send it again"
        ) from error
    return pixels if processing is None else fitted(pixels, processing)


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise DataError(
            f"image: {width} x {height} pixels; expected at most {limits.max_pixels} in all; scale it down first"
        )
    if max(size) > limits.max_aspect * min(size):
        raise DataError(
            f"image: {width} x {height} pixels; expected a longer side of at most {limits.max_aspect} times the "
            "shorter one; cut it first"
        )


class UploadGate:
    """Decodes a model's images beside the event loop; those that are being decoded count as waiting.

    Args:
        batcher: the model's.
        limits, processing: see `image_from_upload`.
    """

    def __init__(self, batcher: MicroBatcher[Any, Any], limits: Limits, processing: ImagePreprocessing | None) -> None:
        self._batcher = batcher
        self._decode = functools.partial(image_from_upload, limits=limits, processing=processing)
        self._coming = 0

    async def decoded(self, content: bytes) -> Image:
        """The image, see `image_from_upload`.

        Raises:
            QueueFullError: at once, where too many wait.
            ClosedError: the model is closed.
            DataError: the image is unusable.
        """
        self._batcher.check_room(self._coming)
        self._coming += 1
        try:
            return await asyncio.to_thread(self._decode, content)
        finally:
            self._coming -= 1
