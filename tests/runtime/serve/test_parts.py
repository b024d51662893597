"""What needs no server: rows from texts and tensors, the binary form, uploads, tokens."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.images import decode_image, fitted
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.rows import checked_parameters, relation_row_from_text
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.serve.uploads import image_from_upload

LIMITS = Limits()


@pytest.mark.parametrize(
    ("text", "head", "tail", "words", "mentions"),
    [
        ("Tim leads Apple", (0, 3), (10, 15), ["Tim", "leads", "Apple"], ("Tim", "Apple")),
        ("(Tim)'s Apple, ", (1, 4), (8, 13), ["(", "Tim", ")'s", "Apple", ","], ("Tim", "Apple")),
        ("Tim Cook of New York", (0, 8), (11, 20), ["Tim", "Cook", "of", "New", "York"], ("Tim Cook", "New York")),
        ("New York City", (0, 8), (4, 13), ["New", "York", "City"], ("New York", "York City")),
        ("\tab\u00a0cd", (1, 2), (2, 3), ["a", "b", "cd"], ("a", "b")),
    ],
)
def test_words_end_at_white_space_and_at_mentions(
    text: str, head: tuple[int, int], tail: tuple[int, int], words: list[str], mentions: tuple[str, str]
) -> None:
    sample = relation_row_from_text(text, head, tail, None, LIMITS).sample
    assert list(sample.tokens) == words
    assert (sample.mention(sample.head), sample.mention(sample.tail)) == mentions


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 99), (1, 2, 3), ()])
def test_mentions_that_do_not_fit(span: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="head"):
        relation_row_from_text("Tim leads", span, (0, 3), None, LIMITS)


def test_parameters_are_checked() -> None:
    assert checked_parameters("generator", {"steps": "4", "guidance_scale": "7.5", "height": 8}) == {
        "steps": 4, "guidance_scale": 7.5, "height": 8,
    }  # fmt: skip
    for given in ({"steps": 4.5}, {"steps": True}, {"steps": "x"}, {"guidance_scale": "nan"}, {"pickle": 1}):
        with pytest.raises(InputError, match=next(iter(given))):
            checked_parameters("generator", given)


def test_the_binary_form_is_tritons() -> None:
    pytest.importorskip("fastapi")
    utils = pytest.importorskip("tritonclient.utils")
    from mi2rage_rt.serve import wire

    elements = [b"", b"a", b"\xff" * 300]
    array = np.array(elements, dtype=np.object_)
    raw = utils.serialize_byte_tensor(array).item()
    assert wire.bytes_elements("x", raw) == elements
    assert wire.Output(MODELS["generator"].outputs[0], (3, 1), elements).raw() == raw
    for cut in range(1, 4 + 1):
        with pytest.raises(DataError, match="element"):
            wire.bytes_elements("x", raw[:-cut])
    assert wire.numbers("seed", "UINT64", np.array([2**64 - 1], np.uint64).tobytes()) == [2**64 - 1]
    with pytest.raises(DataError, match="7 bytes"):
        wire.numbers("seed", "UINT64", b"1234567")


@pytest.mark.parametrize("shape", [[], [0, 1], [33, 1], [2, 2], [2, 1, 1], [-1, 1], [2**70]])
def test_shapes_that_do_not_fit(shape: list[int]) -> None:
    pytest.importorskip("fastapi")
    from mi2rage_rt.serve import wire

    with pytest.raises(DataError, match="of shape"):
        wire.rows_by_name("captioner", [("image", "BYTES", shape, [b"x"])], LIMITS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_uploads_decode_as_files_do(format: str, mode: str) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)).convert(mode)
    if format == "JPEG" and mode in ("RGBA", "P"):
        pytest.skip("JPEG has no such mode")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, format, exif=exif)
    content, spec = buffer.getvalue(), ImagePreprocessing(height=6, width=6, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert np.array_equal(image_from_upload(content, LIMITS, None), decode_image(content))
    assert np.array_equal(image_from_upload(content, LIMITS, spec), fitted(decode_image(content), spec))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_not_decoded(format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format)
    with pytest.raises(DataError, match="JPEG, PNG, WEBP"):
        image_from_upload(buffer.getvalue(), LIMITS, None)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(DataError, match="at most 24000000"):
        image_from_upload(bomb.getvalue(), LIMITS, None)


def test_damaged_files_are_refused() -> None:
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, format)
        whole = bytearray(buffer.getvalue())
        for length in (0, 1, 8, 30, len(whole) // 2):
            with pytest.raises(DataError, match="image: "):
                image_from_upload(bytes(whole[:length]), LIMITS, None)
        for _ in range(150):
            spoilt = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                spoilt[place] = rng.integers(256)
            with contextlib.suppress(DataError):
                assert image_from_upload(bytes(spoilt), LIMITS, None).ndim == 3


def test_tokens(tmp_path: Path) -> None:
    from mi2rage_rt.serve.auth import token_from_file

    file = tmp_path / "token"
    file.write_text("  " + "s" * 16 + "\n")
    token = token_from_file(file)
    assert token.fits("Bearer " + "s" * 16) and token.fits(b"bearer " + b"s" * 16)
    for given in (None, "", "Bearer", "Bearer " + "s" * 15, "Bearer " + "s" * 17, "s" * 16, "Bearer é", b"\xff"):
        assert not token.fits(given)
    for secret in ("short", "with space" * 2, "é" * 20):
        file.write_text(secret)
        with pytest.raises(InputError, match="at least 16"):
            token_from_file(file)
