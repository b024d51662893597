"""Images in and out of files, and from images to the `pixel_values` that a vision encoder takes."""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import ImageOps, UnidentifiedImageError

from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.protocols import Image

__all__ = [
    "MAX_PIXELS",
    "decode_image",
    "encode_image",
    "fitted",
    "load_image",
    "pixel_values",
    "preprocessing_from_folder",
]

MAX_PIXELS = 64_000_000
"""Images of more pixels are refused: a few kilobytes of PNG can unpack to gigabytes."""

_WORTH_THREADS_PX = 500_000
"""Pixels to resize, in all, below which starting threads takes longer than they save."""

_LONG_SIDES = 32
"""Of an image that is resized by its shorter edge, at most so many edges are made of the longer side."""

_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations that turn an image by a quarter."""

_RESAMPLE = {
    "nearest": PilImage.Resampling.NEAREST,
    "bilinear": PilImage.Resampling.BILINEAR,
    "bicubic": PilImage.Resampling.BICUBIC,
    "lanczos": PilImage.Resampling.LANCZOS,
}
_RESAMPLE_NAMES: dict[int, Literal["nearest", "bilinear", "bicubic", "lanczos"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _draft(picture: PilImage.Image, at_least: tuple[int, int]) -> None:
    """Have a JPEG decoded at an eighth, a quarter or half of its size where that leaves `at_least` (height, width)."""
    height, width = at_least
    on_its_side = picture.format == "JPEG" and picture.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    picture.draft(None, (height, width) if on_its_side else (width, height))


def _rgb_from_pil(picture: PilImage.Image, name: str, at_least: tuple[int, int] | None) -> Image:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels; expected at most {MAX_PIXELS} in all; scale the image down first"
        )
    if at_least is not None:
        _draft(picture, at_least)
    ImageOps.exif_transpose(picture, in_place=True)
    # `convert` copies even what is RGB already.
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"), dtype=np.uint8)


def _decode(source: Path | io.BytesIO, name: str, at_least: tuple[int, int] | None = None) -> Image:
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes earlier than our limit, which is the one that counts.
            warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)
            with PilImage.open(source) as picture:
                return _rgb_from_pil(picture, name, at_least)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; expected an image (JPEG, PNG, ...); check the path") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image; expected a JPEG, PNG or other format that Pillow reads") from error
    except PilImage.DecompressionBombError as error:
        raise DataError(f"{name}: {error}; expected at most {MAX_PIXELS} pixels; scale the image down first") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(
            f"{name}: cannot be decoded ({error}); expected a whole image file; fetch it again or leave it out"
        ) from error


def load_image(path: Path | str, at_least: tuple[int, int] | None = None) -> Image:
    """Read an image file, turned upright as its EXIF orientation says.

    Args:
        path: a file of any format that Pillow reads; grey, palette and transparent images become RGB.
        at_least: height and width that are enough, in px: a large JPEG is then decoded at an eighth, a quarter or half
            of its size, which is faster and gives other pixels than resizing the whole image does.

    Returns:
        uint8 `(H, W, 3)`, 0 to 255.

    Raises:
        DataError: the file is missing, no image, truncated, or has more than `MAX_PIXELS` pixels.
    """
    return _decode(Path(path), str(path), at_least)


def decode_image(content: bytes, name: str = "image") -> Image:
    """The image in encoded bytes, uint8 `(H, W, 3)`; `name` stands in messages. Raises as `load_image`."""
    return _decode(io.BytesIO(content), name)


def encode_image(image: Image, format: Literal["png", "jpeg"] = "png", quality: int = 90) -> bytes:
    """Encode an image, uint8 `(H, W, 3)`; the same image gives the same bytes.

    Args:
        image: the pixels.
        format: `png` keeps every pixel, `jpeg` does not.
        quality: 1 to 95, for JPEG.
    """
    buffer = io.BytesIO()
    picture = PilImage.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    if format == "png":
        picture.save(buffer, format="PNG", compress_level=6)
    else:
        picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _resized(image: Image, spec: ImagePreprocessing) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if spec.resize == "exact":
        size = (spec.width, spec.height)
    else:
        edge = spec.shortest_edge or min(spec.height, spec.width)
        # The longer side is cut off to a whole number, as transformers' get_resize_output_image_size does.
        size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    if size == (width, height):
        return image
    size, box = _middle(size, (width, height), spec)
    return np.asarray(PilImage.fromarray(np.ascontiguousarray(image)).resize(size, _RESAMPLE[spec.resample], box))


def _middle(
    size: tuple[int, int], whole: tuple[int, int], spec: ImagePreprocessing
) -> tuple[tuple[int, int], tuple[float, float, float, float] | None]:
    """What to make of an image that would become `size` (width, height), and the part of the `whole` it is made of.

    None for the part is all. Of a very long image only the middle is made, since the rest is cut off: a strip of
    1 x 10,000 px would become 1.5 GB.
    """
    most = _LONG_SIDES * max(spec.shortest_edge or 0, spec.height, spec.width)
    if spec.resize == "exact" or max(size) <= most:
        return size, None
    # As much less on either side, so that the centre is the same pixel.
    less = tuple(-(-max(0, length - most) // 2) for length in size)
    left, top = (few * now / then for few, now, then in zip(less, whole, size, strict=True))
    width, height = size[0] - 2 * less[0], size[1] - 2 * less[1]
    return (width, height), (left, top, whole[0] - left, whole[1] - top)


def _centre(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    above, left = height - image.shape[0], width - image.shape[1]
    if above > 0 or left > 0:  # smaller than the cut: transformers pads with black, the odd pixel before
        before = (-(-max(above, 0) // 2), -(-max(left, 0) // 2))
        after = (max(above, 0) - before[0], max(left, 0) - before[1])
        image = np.pad(image, ((before[0], after[0]), (before[1], after[1]), (0, 0)))
    top, start = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, start : start + width]


def _cut(image: Image, spec: ImagePreprocessing) -> Image:
    """The image resized and cut, uint8 (spec.height, spec.width, 3)."""
    resized = _resized(image, spec)
    return _centre(resized, spec.height, spec.width) if spec.resize == "shortest_edge" else resized


def fitted(image: Image, spec: ImagePreprocessing) -> Image:
    """A small image of which `pixel_values` makes just what it makes of the given one.

    Resizing in the thread that decodes is off the critical path, and what waits there is small. An image whose shorter
    side is `shortest_edge` already is not resized again; where the cut is smaller than that, as much is kept around it.

    Args:
        image: uint8 `(H, W, 3)`.
        spec: of the model that the image is for.

    Returns:
        uint8 `(H, W, 3)`.
    """
    edge = spec.shortest_edge
    if spec.resize == "exact" or edge is None or edge == min(spec.height, spec.width):
        return np.ascontiguousarray(_cut(image, spec))

    def kept(length: int, cut: int) -> int:
        most = max(edge, cut)
        return min(length, most + (most - cut) % 2)  # an even number more than the cut has the same centre

    resized = _resized(image, spec)
    height, width = resized.shape[:2]
    return np.ascontiguousarray(_centre(resized, kept(height, spec.height), kept(width, spec.width)))


@functools.lru_cache(maxsize=8)
def _normalised_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """What the levels 0 to 255 become, float32 (3, 256): transformers' arithmetic to the last bit, done once."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    levels = (scaled - np.array(mean, dtype=np.float32)[:, None]) / np.array(std, dtype=np.float32)[:, None]
    return np.asarray(levels, dtype=np.float32)


def pixel_values(images: Sequence[Image], spec: ImagePreprocessing) -> NDArray[np.float32]:
    """What a vision encoder takes, as CLIP's and BLIP's image processors (their Pillow backend) make it.

    Args:
        images: uint8 `(H, W, 3)` each, of any sizes.
        spec: size, filter and normalisation.

    Returns:
        float32 `(B, 3, height, width)`, normalised per channel.
    """
    batch = np.empty((len(images), 3, spec.height, spec.width), dtype=np.float32)
    levels = _normalised_levels(spec.mean, spec.std)

    def fill(place: int) -> None:
        cut = _cut(images[place], spec)
        for channel in range(3):
            # `clip` writes into the batch directly; levels are never out of range.
            np.take(levels[channel], cut[..., channel], out=batch[place, channel], mode="clip")

    workers = min(usable_cores(), len(images))
    if workers > 1 and sum(image.shape[0] * image.shape[1] for image in images) > _WORTH_THREADS_PX:
        with ThreadPoolExecutor(workers) as pool:  # Pillow and NumPy let go of the GIL meanwhile
            list(pool.map(fill, range(len(images))))
    else:
        for place in range(len(images)):
            fill(place)
    return batch


def _pair(size: Any, name: str, folder: Path) -> tuple[int, int]:
    """(height, width) from hub files' variants: 224, {"height": .., "width": ..}, [h, w]."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ModelFolderError(f"{folder}: preprocessor '{name}' is {size!r}; expected a number or height and width")


def _read_config(folder: Path) -> dict[str, Any]:
    names = ("preprocessor_config.json", "processor_config.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ModelFolderError(f"{folder}: has no preprocessor_config.json; expected a CLIP or BLIP model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: cannot be read ({error}); expected a JSON file; fetch it again") from error
    config = config.get("image_processor", config) if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path}: holds no JSON object; expected an image processor's settings")
    return config


def preprocessing_from_folder(folder: Path | str) -> ImagePreprocessing:
    """Read a model folder's `preprocessor_config.json` (or `processor_config.json`), CLIP's or BLIP's.

    CLIP resizes the shorter edge and cuts the centre out, BLIP resizes to an exact size; `size` and `crop_size`
    may be numbers or dicts, as in hub files of different ages.

    Raises:
        ModelFolderError: the file is missing, damaged, or asks for something else.
    """
    folder = Path(folder)
    config = _read_config(folder)
    size = config.get("size", 224)
    crops = bool(config.get("do_center_crop", False))
    edge = size.get("shortest_edge") if isinstance(size, dict) else size if crops and isinstance(size, int) else None
    if edge is not None:
        height, width = _pair(config.get("crop_size", edge) if crops else None, "crop_size", folder)
    else:
        height, width = _pair(size, "size", folder)
    resample = config.get("resample", 3)
    if resample not in _RESAMPLE_NAMES:
        raise ModelFolderError(f"{folder}: resample {resample!r}; expected one of {_RESAMPLE_NAMES}")
    normalised = config.get("do_normalize", True)
    return ImagePreprocessing(
        height=height,
        width=width,
        resize="shortest_edge" if edge is not None else "exact",
        shortest_edge=edge,
        resample=_RESAMPLE_NAMES[resample],
        mean=config.get("image_mean", _CLIP_MEAN) if normalised else (0.0, 0.0, 0.0),
        std=config.get("image_std", _CLIP_STD) if normalised else (1.0, 1.0, 1.0),
    )
