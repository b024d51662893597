"""The classifier: fitting, the folder, and its logits with and without images."""

import json
from pathlib import Path

import numpy as np
import pytest

from mi2rage_engines.errors import DataError, InputError, ModelFolderError
from mi2rage_rt.images import encode_image
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.fit import Fit, FitConfig, fit_classifier, labels_of, logits_of_pairs, score_pairs
from mi2rage_training.pairs import Pair
from tests.training.fakes import samples

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]


def pairs(count: int) -> list[Pair]:
    """The label stands in the image's colour and nowhere in the text."""
    images = [np.full((24, 24, 3), colour, np.uint8) for colour in COLOURS]
    return [Pair(sample, encode_image(images[i % 3])) for i, sample in enumerate(samples(count))]


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit_classifier(pairs(48), FitConfig(epochs=12, batch_size=8, seed=1), validation=pairs(12))


def test_it_learns_what_only_the_image_says(fitted: Fit) -> None:
    assert fitted.losses[-1] < 0.3 < fitted.losses[0]
    assert score_pairs(fitted.classifier, pairs(30)).f1 == 1.0
    assert len(fitted.validation_f1) == 12
    assert fitted.validation_f1[fitted.best_epoch - 1] == max(fitted.validation_f1)


def test_hidden_images_leave_the_answer_open(fitted: Fit) -> None:
    both, text = logits_of_pairs(fitted.classifier, pairs(12), hide_images=(False, True))
    assert not np.allclose(both, text)
    bare = [Pair(pair.sample) for pair in pairs(12)]
    np.testing.assert_allclose(logits_of_pairs(fitted.classifier, bare)[0], text, atol=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    config = FitConfig(epochs=1, batch_size=8, seed=3)
    one, two = (fit_classifier(pairs(9), config).classifier.module.state_dict() for _ in range(2))
    assert all((one[name] == two[name]).all() for name in one)


def test_a_saved_classifier_answers_the_same(fitted: Fit, tmp_path: Path) -> None:
    fitted.classifier.save(tmp_path)
    loaded = load_classifier(tmp_path)
    rows = pairs(7)
    images = [pair.load() for pair in rows]
    images[3] = None
    expected = fitted.classifier.logits([pair.sample for pair in rows], images)
    np.testing.assert_allclose(loaded.logits([pair.sample for pair in rows], images), expected, atol=1e-6)
    assert loaded.labels == ("None", "/per/org/member_of", "/per/per/peer")


def test_damaged_folders_are_named(fitted: Fit, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_classifier(tmp_path / "nowhere")
    fitted.classifier.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelFolderError, match="cannot be loaded"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="missing"):
        load_classifier(tmp_path)
    config = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(config | {"surprise": 1}))
    with pytest.raises(ModelFolderError, match="surprise"):
        load_classifier(tmp_path)


def test_unknown_and_missing_labels_are_named(fitted: Fit) -> None:
    import dataclasses

    sample = samples(1)[0]
    with pytest.raises(DataError, match="expected one of"):
        fitted.classifier.label_ids([dataclasses.replace(sample, label="/per/per/enemy")])
    with pytest.raises(DataError, match="has no label"):
        labels_of([Pair(dataclasses.replace(sample, label=None))])
    with pytest.raises(DataError, match="at least two"):
        labels_of([Pair(sample)])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="epochs"):
        FitConfig(epochs=0)
    with pytest.raises(DataError, match="no pairs"):
        fit_classifier([], FitConfig())
    with pytest.raises(ModelFolderError, match="positions"):
        fit_classifier(pairs(6), FitConfig(max_length=4096))
