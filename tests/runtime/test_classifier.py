from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mi2rage_engines.errors import BundleError, DataError
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.classifier import RuntimeClassifier, softmax
from mi2rage_rt.protocols import RelationClassifier
from mi2rage_rt.samples import Sample, Span

WHITE = np.full((9, 7, 3), 255, np.uint8)


@pytest.fixture
def classifier(bundle_folder: Path) -> RuntimeClassifier:
    return Bundle.open(bundle_folder, threads=1).classifier()


def sample(text: str, head: int) -> Sample:
    return Sample("s", tuple(text.split()), Span(head, head + 1), Span(0, 1))


def test_logits_come_back_in_order(classifier: RuntimeClassifier) -> None:
    assert isinstance(classifier, RelationClassifier)
    samples = [sample("the red dog of tim", 4), sample("rome apple", 1), sample("the dog of the sea tim", 5)]
    expected = np.array([[0, 2, 0], [2, 0, 4], [0, 2, 4]], dtype=np.float32)
    for size in (1, 2, 32):
        classifier.batch_size = size
        np.testing.assert_allclose(classifier.logits(samples, [None, WHITE, WHITE]), expected, atol=1e-6)
    assert classifier.logits([], []).shape == (0, 3)


def test_a_missing_image_is_masked(classifier: RuntimeClassifier) -> None:
    grey = np.full((6, 6, 3), 10, np.uint8)
    with_image, without = classifier.logits([sample("a tim", 1)] * 2, [grey, None])
    assert with_image[2] < -3 and without[2] == 0


def test_predictions(classifier: RuntimeClassifier) -> None:
    prediction = classifier.predict([sample("a tim", 1)], [None])[0]
    assert prediction.relation == "/per/org/leads"
    assert prediction.probability == pytest.approx(np.e**2 / (np.e**2 + 2), abs=1e-6)
    assert softmax(np.array([[1000.0, 1000.0]], dtype=np.float32)).tolist() == [[0.5, 0.5]]


def test_unusable_arguments(classifier: RuntimeClassifier) -> None:
    with pytest.raises(DataError, match="1 samples but 0 images"):
        classifier.logits([sample("a tim", 1)], [])
    classifier.labels = ("one",)
    with pytest.raises(BundleError, match="gives 3 logits, but the bundle names 1"):
        classifier.logits([sample("a tim", 1)], [None])


def test_components_that_are_not_there(bundle_folder: Path, tmp_path: Path) -> None:
    from tests.runtime.tiny_bundle import build_bundle

    with Bundle.open(build_bundle(tmp_path, parts=("classifier",))) as bundle:
        assert bundle.components == ("classifier",)
        for name in ("generator", "captioner"):
            with pytest.raises(BundleError, match=f"has no {name}; it has classifier"):
                getattr(bundle, name)()
