from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from mi2rage_engines.engine import NOTHING, Array, DeviceArray, Engine
from mi2rage_engines.errors import BundleError, DataError, EngineError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.classifier import RuntimeClassifier, softmax
from mi2rage_rt.protocols import Image, RelationClassifier
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.text import EntityMarkedTokenizer
from tests.runtime.tiny_bundle import FLOAT, INT, LABELS, WORDS, build_bundle, graph

WHITE = np.full((9, 7, 3), 255, np.uint8)
GREY = np.full((6, 6, 3), 10, np.uint8)


def split_graphs(folder: Path) -> dict[str, Path]:
    """The tiny bundle's classifier in two graphs: `image_mean` of the pixels, and all the rest."""
    node, batch = helper.make_node, ["batch"]
    graph(
        folder / "image.onnx",
        [node("ReduceMean", ["pixel_values", "axes"], ["image_mean"], keepdims=0)],
        {"pixel_values": (FLOAT, ["batch", 3, 6, 6])},
        {"image_mean": (FLOAT, batch)},
        {"axes": np.array([1, 2, 3])},
    )
    table = np.zeros((len(WORDS) + 4, len(LABELS)), dtype=np.float32)
    table[WORDS.index("tim"), 1] = table[WORDS.index("apple"), 0] = 2.0
    graph(
        folder / "classifier.onnx",
        [
            node("Add", ["head_index", "one"], ["behind"]),
            node("Unsqueeze", ["behind", "one_axis"], ["place"]),
            node("GatherElements", ["input_ids", "place"], ["word"], axis=1),
            node("Squeeze", ["word", "one_axis"], ["id"]),
            node("Gather", ["table", "id"], ["text"]),
            node("Gather", ["image_mean", "image_index"], ["mean"]),
            node("Mul", ["mean", "image_mask"], ["seen"]),
            node("Unsqueeze", ["seen", "one_axis"], ["column"]),
            node("Mul", ["column", "last"], ["picture"]),
            node("Add", ["text", "picture"], ["logits"]),
        ],
        {
            "input_ids": (INT, ["batch", "sequence"]),
            "attention_mask": (INT, ["batch", "sequence"]),
            "head_index": (INT, batch),
            "tail_index": (INT, batch),
            "image_index": (INT, batch),
            "image_mask": (FLOAT, batch),
            "image_mean": (FLOAT, ["images"]),
        },
        {"logits": (FLOAT, ["batch", len(LABELS)])},
        {
            "table": table,
            "one": np.array(1),
            "one_axis": np.array([1]),
            "last": np.array([0, 0, 4], dtype=np.float32),
        },
    )
    return {name: folder / f"{name}.onnx" for name in ("image", "classifier")}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return split_graphs(tmp_path_factory.mktemp("split"))


@pytest.fixture
def whole(bundle_folder: Path) -> RuntimeClassifier:
    """Of a bundle from before images were encoded apart."""
    return Bundle.open(bundle_folder, threads=1).classifier()


@pytest.fixture(params=["whole", "split"])
def classifier(
    request: pytest.FixtureRequest, whole: RuntimeClassifier, split: dict[str, Path], bundle_folder: Path
) -> RuntimeClassifier:
    if request.param == "whole":
        return whole
    return apart(whole, {name: OrtEngine(path, threads=1) for name, path in split.items()}, bundle_folder)


def apart(whole: RuntimeClassifier, engines: Mapping[str, Engine], folder: Path) -> RuntimeClassifier:
    tokenizer = EntityMarkedTokenizer.from_spec(whole.spec.tokenizer, folder)
    return RuntimeClassifier(whole.spec, engines, tokenizer)


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
    with_image, without = classifier.logits([sample("a tim", 1)] * 2, [GREY, None])
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
    with Bundle.open(build_bundle(tmp_path, parts=("classifier",))) as bundle:
        assert bundle.components == ("classifier",)
        for name in ("generator", "captioner"):
            with pytest.raises(BundleError, match=f"has no {name}; it has classifier"):
                getattr(bundle, name)()


class Counting(OrtEngine):
    """An engine that notes the shapes it was called with."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, threads=1)
        self.calls: list[dict[str, tuple[int, ...]]] = []

    def call(
        self, inputs: Mapping[str, Array | DeviceArray], into: Mapping[str, DeviceArray] = NOTHING
    ) -> dict[str, DeviceArray]:
        self.calls.append({name: tuple(array.shape) for name, array in inputs.items()})
        return super().call(inputs, into)


@pytest.fixture
def counting(whole: RuntimeClassifier, split: dict[str, Path], bundle_folder: Path) -> Any:
    engines = {name: Counting(path) for name, path in split.items()}
    return apart(whole, engines, bundle_folder), engines["image"].calls, engines["classifier"].calls


def test_a_shared_image_is_encoded_once(counting: Any) -> None:
    classifier, encoded, run = counting
    images: list[Image | None] = [GREY, WHITE, GREY, None, GREY.copy(), WHITE, WHITE.copy()]
    samples = [sample("a tim", 1), sample("rome apple", 1)] * 4
    found = classifier.logits(samples[:7], images)
    assert [call["pixel_values"] for call in encoded] == [(2, 3, 6, 6)]
    assert [call["image_mean"] for call in run] == [(2,)]
    one_by_one = [classifier.logits([item], [image])[0] for item, image in zip(samples, images, strict=False)]
    np.testing.assert_allclose(found, one_by_one, rtol=0, atol=1e-6)


def test_images_and_sentences_have_batches_of_their_own(counting: Any) -> None:
    classifier, encoded, run = counting
    classifier.batch_size = 2
    shades: list[Image | None] = [np.full((6, 6, 3), shade, np.uint8) for shade in (0, 50, 100)]
    found = classifier.logits([sample("a tim", 1)] * 7, [*shades, shades[0], shades[0], shades[2], None])
    assert [call["pixel_values"][0] for call in encoded] == [2, 1]
    assert sum(call["input_ids"][0] for call in run) == 7 and max(call["input_ids"][0] for call in run) == 2
    expected = [4 * (shade / 127.5 - 1) for shade in (0, 50, 100, 0, 0, 100)]
    np.testing.assert_allclose(found[:, 2], [*expected, 0], rtol=0, atol=1e-5)


def test_without_an_image_none_is_encoded(counting: Any) -> None:
    classifier, encoded, run = counting
    found = classifier.logits([sample("a tim", 1)] * 3, [None] * 3)
    assert encoded == [] and len(run) == 1
    np.testing.assert_array_equal(found, [[0, 2, 0]] * 3)


def test_a_long_sentence_does_not_widen_the_others(counting: Any) -> None:
    classifier, _, run = counting
    long = sample(" ".join(["a"] * 14 + ["tim"]), 14)
    classifier.logits([long, *[sample("a tim", 1)] * 20], [None] * 21)
    assert [call["input_ids"] for call in run] == [(20, 8), (1, 21)]


def test_a_classifier_of_text_alone(whole: RuntimeClassifier, bundle_folder: Path, tmp_path: Path) -> None:
    node = helper.make_node
    graph(
        tmp_path / "text.onnx",
        [node("Gather", ["input_ids", "first"], ["id"], axis=1), node("Gather", ["table", "id"], ["logits"])],
        {"input_ids": (INT, ["batch", "sequence"]), "attention_mask": (INT, ["batch", "sequence"])},
        {"logits": (FLOAT, ["batch", len(LABELS)])},
        {"first": np.array(0), "table": np.eye(len(WORDS), len(LABELS), k=-2, dtype=np.float32)},
    )
    classifier = apart(whole, {"classifier": OrtEngine(tmp_path / "text.onnx", threads=1)}, bundle_folder)
    np.testing.assert_array_equal(classifier.logits([sample("a tim", 1)] * 2, [WHITE, None]), [[1, 0, 0]] * 2)


def test_graphs_that_do_not_go_together(whole: RuntimeClassifier, split: dict[str, Path], bundle_folder: Path) -> None:
    old = OrtEngine(bundle_folder / whole.spec.graphs["classifier"].file, threads=1)
    with pytest.raises(EngineError, match="has no input image_index, image_mean"):
        apart(whole, {"image": OrtEngine(split["image"], threads=1), "classifier": old}, bundle_folder)
