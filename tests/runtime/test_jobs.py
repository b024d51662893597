"""Whole lists: files are decoded ahead, and the answers stay those of one by one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from mi2rage_engines.errors import DataError
from mi2rage_rt import jobs
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.classifier import RuntimeClassifier
from mi2rage_rt.images import load_image
from mi2rage_rt.jobs import Skipped, caption_files, predict_samples
from mi2rage_rt.samples import Sample, Span

COUNT = 150


@pytest.fixture(scope="module")
def classifier(bundle_folder: Path) -> RuntimeClassifier:
    return Bundle.open(bundle_folder, threads=1).classifier()


@pytest.fixture(scope="module")
def captioner(bundle_folder: Path) -> RuntimeCaptioner:
    return Bundle.open(bundle_folder, threads=1).captioner()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEGs of one shade each, every third twice as wide as the others."""
    for number in range(10):
        shade = np.full((120, 240 if number % 3 == 0 else 120, 3), 25 * number, np.uint8)
        PilImage.fromarray(shade).save(tmp_path / f"{number}.jpg", quality=95)
    return tmp_path


def rows() -> list[Sample]:
    words = ("a", "tim", "rome")
    return [
        Sample(str(row), words, Span(1, 2), Span(2, 3), image=None if row % 7 == 0 else f"{row // 3 % 10}.jpg")
        for row in range(COUNT)
    ]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int] | None]]:
    """The files that are decoded, and the size that is enough."""
    files: list[tuple[str, tuple[int, int] | None]] = []

    def load(path: Path, at_least: tuple[int, int] | None = None) -> np.ndarray:
        files.append((path.name, at_least))
        return load_image(path, at_least)

    monkeypatch.setattr(jobs, "load_image", load)
    return files


def test_predictions_equal_those_one_by_one(
    classifier: RuntimeClassifier, photos: Path, opened: list[tuple[str, tuple[int, int] | None]]
) -> None:
    samples = rows()
    images = [None if sample.image is None else load_image(photos / sample.image) for sample in samples]
    expected = [classifier.predict([sample], [image])[0] for sample, image in zip(samples, images, strict=True)]
    found = predict_samples(classifier, samples, photos)
    assert [row["id"] for row in found] == [sample.id for sample in samples]
    assert [row["relation"] for row in found] == [prediction.relation for prediction in expected]
    np.testing.assert_allclose([row["probability"] for row in found], [p.probability for p in expected], atol=1e-5)
    assert len(opened) < COUNT // 2  # three samples in a row share an image
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_captions_equal_those_one_by_one(captioner: RuntimeCaptioner, photos: Path) -> None:
    paths = [photos / f"{row % 10}.jpg" for row in range(90)]
    found = caption_files(captioner, paths)
    assert [row["image"] for row in found] == [str(path) for path in paths]
    assert [row["caption"] for row in found] == captioner.caption([load_image(path) for path in paths])
    assert len({row["caption"] for row in found}) > 1


def test_a_bad_image_costs_its_own_row(classifier: RuntimeClassifier, photos: Path) -> None:
    (photos / "4.jpg").write_bytes(b"no image")
    samples = rows()
    bad = [sample.id for sample in samples if sample.image == "4.jpg"]
    skipped: list[Skipped] = []
    found = predict_samples(classifier, samples, photos, skip_bad=True, skipped=skipped)
    assert [row.id for row in skipped] == bad and all("4.jpg: not an image" in row.reason for row in skipped)
    assert [row["id"] for row in found] == [sample.id for sample in samples if sample.id not in bad]
    with pytest.raises(DataError, match=rf"sample {bad[0]}: .*4\.jpg: not an image"):
        predict_samples(classifier, samples, photos)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_large_jpegs_are_decoded_smaller_when_asked(
    classifier: RuntimeClassifier,
    captioner: RuntimeCaptioner,
    photos: Path,
    opened: list[tuple[str, tuple[int, int] | None]],
) -> None:
    predict_samples(classifier, rows()[:3], photos)
    caption_files(captioner, [photos / "1.jpg"])
    assert {at_least for _, at_least in opened} == {None}
    opened.clear()
    # One shade an image: there is nothing for another way of decoding to change.
    assert predict_samples(classifier, rows()[:9], photos, fast_jpeg=True) == predict_samples(
        classifier, rows()[:9], photos
    )
    caption_files(captioner, [photos / "1.jpg"], fast_jpeg=True)
    assert (12, 12) in {at_least for _, at_least in opened}  # twice the 6 px that both models take
