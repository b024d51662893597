from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt import images
from mi2rage_rt.images import (
    decode_image,
    encode_image,
    fitted,
    load_image,
    pixel_values,
    preprocessing_from_folder,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_keeps_every_pixel_and_bytes_repeat() -> None:
    image = noise(9, 7)
    content = encode_image(image)
    np.testing.assert_array_equal(decode_image(content), image)
    assert content == encode_image(image)
    jpeg = decode_image(encode_image(np.full((16, 16, 3), 120, np.uint8), "jpeg", quality=95))
    assert np.abs(jpeg.astype(int) - 120).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(noise(5, 8)).convert(mode).save(tmp_path / f"i.{suffix}")
    loaded = load_image(tmp_path / f"i.{suffix}")
    assert loaded.shape == (5, 8, 3) and loaded.dtype == np.uint8


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(noise(5, 8)).save(tmp_path / "i.png", exif=exif)
    assert load_image(tmp_path / "i.png").shape == (8, 5, 3)


def test_unusable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_image(noise(64, 64), "jpeg")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes(encode_image(noise(64, 64))[:500])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    for name, words in {
        "cut.jpg": "cannot be decoded",
        "cut.png": "cannot be decoded",
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "none.jpg": "no such file",
        "folder.jpg": "cannot be decoded",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match=r"i: 11 x 10 pixels"):
        decode_image(encode_image(noise(10, 11)), "i")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {}),
        ("clip", {"size": {"shortest_edge": 40}, "crop_size": {"height": 47, "width": 32}}),
        ("clip", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3}),
        ("blip", {"size": {"height": 96, "width": 96}}),
        ("blip", {"size": {"height": 30, "width": 50}, "resample": 2, "do_normalize": False}),
    ],
)
def test_pixel_values_equal_those_of_transformers(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = (CLIPImageProcessorPil if kind == "clip" else BlipImageProcessorPil)(**settings)
    processor.save_pretrained(tmp_path)
    spec = preprocessing_from_folder(tmp_path)
    given = [noise(100, 100), noise(37, 91), noise(150, 64), noise(40, 40), noise(spec.height, spec.width)]
    expected = np.concatenate([processor(images=image, return_tensors="np")["pixel_values"] for image in given])
    values = pixel_values(given, spec)
    assert values.dtype == np.float32 and values.flags.c_contiguous
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "spec",
    [
        ImagePreprocessing(height=30, width=50, mean=HALF, std=HALF),
        ImagePreprocessing(height=32, width=32, resize="shortest_edge", shortest_edge=32, mean=HALF, std=HALF),
        ImagePreprocessing(height=47, width=32, resize="shortest_edge", shortest_edge=32, mean=HALF, std=HALF),
        ImagePreprocessing(height=32, width=32, resize="shortest_edge", shortest_edge=40, mean=HALF, std=HALF),
        ImagePreprocessing(height=28, width=33, resize="shortest_edge", shortest_edge=41, mean=HALF, std=HALF),
        ImagePreprocessing(height=50, width=33, resize="shortest_edge", shortest_edge=40, mean=HALF, std=HALF),
        ImagePreprocessing(height=50, width=60, resize="shortest_edge", shortest_edge=40, mean=HALF, std=HALF),
    ],
    ids=["exact", "square", "tall", "cut", "odd", "taller", "padded"],
)
def test_fitted_images_give_the_same_pixel_values(spec: ImagePreprocessing) -> None:
    sizes = [(100, 100), (37, 91), (150, 64), (20, 24), (40, 41), (41, 40), (1, 90), (spec.height, spec.width)]
    sizes += [(40 + n, 113 - n) for n in range(73)]
    given = [noise(height, width) for height, width in sizes]
    small = [fitted(image, spec) for image in given]
    np.testing.assert_array_equal(pixel_values(small, spec), pixel_values(given, spec))
    edge = spec.shortest_edge
    if edge in (None, min(spec.height, spec.width)):
        assert {image.shape for image in small} == {(spec.height, spec.width, 3)}
    else:  # what was cut out would be resized again, what is as short as it should be is not
        assert {min(image.shape[:2]) for image in small} == {edge}
        assert max(max(image.shape[:2]) for image in small) <= max(edge, spec.height, spec.width) + 1


@pytest.mark.parametrize("shape", [(1, 9000), (9000, 1), (3, 400), (401, 5)])
def test_of_a_very_long_image_the_middle_alone_is_resized(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """The same pixels, and no gigabytes on the way; Pillow may turn rows and columns round, and round otherwise."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    spec = ImagePreprocessing(
        height=8, width=9, resize="shortest_edge", shortest_edge=10, resample="bicubic", mean=(0,) * 3, std=(1,) * 3
    )
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more: (made.append(size), resize(self, size, *more))[1]
    )
    values, small = pixel_values([image], spec), fitted(image, spec)
    assert all(min(size) == 10 and max(size) <= 320 for size in made) and len(made) == 2
    monkeypatch.setattr("mi2rage_rt.images._LONG_SIDES", 10**6)
    whole = pixel_values([image], spec)
    np.testing.assert_allclose(values, whole, atol=20 / 255)
    assert np.abs(values - whole).mean() < 1 / 255
    assert max(made[-1]) > 320
    np.testing.assert_array_equal(pixel_values([small], spec), values)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ImagePreprocessing(height=32, width=32, mean=HALF, std=HALF)
    given = [noise(50 + row, 70, row) for row in range(9)]
    alone = pixel_values(given, spec)
    monkeypatch.setattr(images, "_WORTH_THREADS_PX", 1)
    monkeypatch.setattr(images, "usable_cores", lambda: 3)
    np.testing.assert_array_equal(pixel_values(given, spec), alone)


def _photo(height: int, width: int) -> np.ndarray:
    """Something like a photograph: fine noise on large shapes."""
    coarse = Image.fromarray(noise(height // 40, width // 40)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + np.random.default_rng(1).normal(0, 8, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("at_least", "scale"), [((480, 640), 1), ((200, 320), 2), ((120, 160), 4), ((61, 60), 4), ((5, 5), 8)]
)
def test_a_large_jpeg_is_decoded_smaller(
    tmp_path: Path, at_least: tuple[int, int], scale: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(_photo(480, 640)).save(tmp_path / "i.jpg", quality=90, exif=exif)
    turned = orientation == 6
    small = load_image(tmp_path / "i.jpg", at_least[::-1] if turned else at_least)
    assert small.shape == ((640 // scale, 480 // scale, 3) if turned else (480 // scale, 640 // scale, 3))
    assert load_image(tmp_path / "i.jpg").shape == ((640, 480, 3) if turned else (480, 640, 3))


def test_what_is_not_a_jpeg_is_decoded_whole(tmp_path: Path) -> None:
    Image.fromarray(noise(64, 48)).save(tmp_path / "i.png")
    assert load_image(tmp_path / "i.png", (8, 8)).shape == (64, 48, 3)


def test_decoded_smaller_pixels_differ_by_little(tmp_path: Path) -> None:
    """In levels of 255, after resizing to 48 px: 0.4 on average and 4 at most where half the size or more was left over
    for resizing; 1.0 and 9 where the decoder did nearly all of it."""
    Image.fromarray(_photo(480, 640)).save(tmp_path / "i.jpg", quality=90)
    spec = ImagePreprocessing(height=48, width=48, resize="shortest_edge", shortest_edge=48, mean=HALF, std=HALF)
    whole = fitted(load_image(tmp_path / "i.jpg"), spec).astype(int)
    for at_least, mean, largest in (((96, 96), 0.4, 4), ((48, 48), 1.0, 9)):
        apart = np.abs(fitted(load_image(tmp_path / "i.jpg", at_least), spec) - whole)
        print(at_least, apart.mean(), apart.max())
        assert apart.mean() <= mean and apart.max() <= largest


def test_no_images_give_an_empty_batch(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8}')
    assert pixel_values([], preprocessing_from_folder(tmp_path)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}, ("shortest_edge", 224, 224, 224)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 200}, "do_center_crop": True},
         ("shortest_edge", 256, 224, 200)),
        ({"size": {"height": 384, "width": 380}}, ("exact", None, 384, 380)),
        ({"size": 48}, ("exact", None, 48, 48)),
        ({"size": [32, 40]}, ("exact", None, 32, 40)),
        ({"image_processor": {"size": {"height": 20, "width": 20}}}, ("exact", None, 20, 20)),
    ],
)  # fmt: skip
def test_hub_files_of_every_age(tmp_path: Path, config: dict[str, Any], expected: tuple[Any, ...]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    spec = preprocessing_from_folder(tmp_path)
    assert (spec.resize, spec.shortest_edge, spec.height, spec.width) == expected


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"size": "big"}', '{"resample": 9}', '{"size": {"shortest_edge": 9}}']
)
def test_bad_preprocessor_files(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelFolderError, match=r"no preprocessor_config\.json"):
        preprocessing_from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelFolderError):
        preprocessing_from_folder(tmp_path)
