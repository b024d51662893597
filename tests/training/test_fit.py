"""The classifier: fitting, the folder, and its logits with and without images."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mi2rage_engines.errors import DataError, InputError, ModelFolderError
from mi2rage_training import fit_data
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.encoders import image_encoder_from
from mi2rage_training.fit import Fit, FitConfig, View, fit_classifier, labels_of, logits_of_pairs, score_pairs
from mi2rage_training.fit_targets import class_weights, targets_of
from mi2rage_training.pairs import Pair, mentions_only
from tests.training.fakes import samples
from tests.training.fit_fakes import fit_without_dropout, largest_difference, pairs, same_weights, weights_of


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit_classifier(pairs(48), FitConfig(epochs=12, batch_size=8, seed=1), validation=pairs(12))


def test_it_learns_what_only_the_image_says(fitted: Fit) -> None:
    assert fitted.losses[-1] < 0.3 < fitted.losses[0]
    assert score_pairs(fitted.classifier, pairs(30)).f1 == 1.0
    assert len(fitted.validation_f1) == 12
    assert fitted.validation_f1[fitted.best_epoch - 1] == max(fitted.validation_f1)


def test_hidden_images_leave_the_answer_open(fitted: Fit) -> None:
    both, text = logits_of_pairs(fitted.classifier, pairs(12), views=(View.BOTH, View.TEXT))
    assert not np.allclose(both, text)
    bare = [Pair(pair.sample) for pair in pairs(12)]
    np.testing.assert_allclose(logits_of_pairs(fitted.classifier, bare)[0], text, atol=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    config = FitConfig(epochs=2, batch_size=4, seed=3, image_dropout=0.3, text_dropout=0.3)
    one = fit_classifier(pairs(9), config)
    torch.rand(7)  # what others draw does not matter
    assert same_weights(weights_of(one), weights_of(fit_classifier(pairs(9), config)))
    other = fit_classifier(pairs(9), dataclasses.replace(config, seed=4))
    assert not same_weights(weights_of(one), weights_of(other))


def test_fitting_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_classifier(pairs(6), FitConfig(steps=1, batch_size=4))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_views(fitted: Fit) -> None:
    rows = pairs(8)
    both, text, image = logits_of_pairs(fitted.classifier, rows, views=("both", View.TEXT, View.IMAGE))
    np.testing.assert_array_equal(logits_of_pairs(fitted.classifier, rows)[0], both)
    np.testing.assert_array_equal(logits_of_pairs(fitted.classifier, rows, views=[View.TEXT])[0], text)
    bare = [Pair(mentions_only(pair.sample), pair.image) for pair in rows]
    np.testing.assert_allclose(logits_of_pairs(fitted.classifier, bare)[0], image, atol=1e-5)
    assert np.abs(both - image).max() > 1e-3


def test_a_hidden_sentence_teaches_to_answer_from_the_image() -> None:
    shown = FitConfig(epochs=8, batch_size=8, text_dropout=0.5, image_dropout=0.5, seed=1)
    fit = fit_classifier(pairs(48), shown)
    (image,) = logits_of_pairs(fit.classifier, pairs(12), views=[View.IMAGE])
    gold = fit.classifier.label_ids([pair.sample for pair in pairs(12)])
    assert (image.argmax(1) == gold).mean() > 0.9


def test_steps_take_the_place_of_epochs() -> None:
    few, many = (fit_classifier(pairs(n), FitConfig(steps=7, batch_size=4), validation=pairs(6)) for n in (8, 20))
    assert (few.steps, len(few.losses)) == (7, 4)  # passes of two steps, the last one cut short
    assert (many.steps, len(many.validation_f1)) == (7, 2)


def test_accumulated_parts_make_the_same_step() -> None:
    """1e-5 is for the order of sums, after 3 steps at a rate of 1e-4; the last batch has fewer rows than parts."""
    config = FitConfig(epochs=1, batch_size=5, learning_rate=1e-4, text_dropout=0.3)
    whole = fit_without_dropout(pairs(11), config)
    parts = fit_without_dropout(pairs(11), dataclasses.replace(config, gradient_accumulation=4))
    assert largest_difference(weights_of(whole), weights_of(parts)) < 1e-5
    assert whole.losses[0] == pytest.approx(parts.losses[0], abs=1e-5)


def test_images_beyond_the_memory_limit_are_encoded_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other sizes: 1e-5 for the order of sums, after 3 steps at a rate of 1e-4."""
    config = FitConfig(epochs=1, batch_size=5, learning_rate=1e-4)
    kept = fit_without_dropout(pairs(11), config)
    monkeypatch.setattr(fit_data, "_CACHE_LIMIT_BYTES", 0)
    assert largest_difference(weights_of(kept), weights_of(fit_without_dropout(pairs(11), config))) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_the_vision_tower_is_fitted_when_asked_for(trained: bool) -> None:
    config = FitConfig(steps=2, batch_size=3, train_image_encoder=trained)
    tower, _ = image_encoder_from(config.image_encoder)
    fit = fit_classifier(pairs(6), config, validation=pairs(3))
    assert same_weights(tower.state_dict(), fit.classifier.module.image_encoder.state_dict()) is not trained


def test_bfloat16_learns_too_and_leaves_float32_weights() -> None:
    config = FitConfig(epochs=12, batch_size=8, seed=1, mixed_precision="bf16")  # type: ignore[arg-type]
    fit = fit_classifier(pairs(48), config, validation=pairs(12))
    assert score_pairs(fit.classifier, pairs(30)).f1 == 1.0
    assert {value.dtype for value in weights_of(fit).values() if value.is_floating_point()} == {torch.float32}
    plain = dataclasses.replace(config, epochs=1, mixed_precision="no")  # type: ignore[arg-type]
    assert fit_classifier(pairs(9), plain).losses  # the process is not bound to one precision
    with pytest.raises(InputError, match="expected a GPU"):
        fit_classifier(pairs(9), FitConfig(mixed_precision="fp16"))  # type: ignore[arg-type]


def test_patience_ends_a_fit_that_gets_no_better() -> None:
    flat = FitConfig(epochs=30, batch_size=8, learning_rate=1e-9, patience=2)
    fit = fit_classifier(pairs(9), flat, validation=pairs(6))
    assert len(fit.validation_f1) == 3
    assert fit.validation_f1[0] == max(fit.validation_f1)
    with pytest.raises(InputError, match="without validation"):
        fit_classifier(pairs(9), flat)


def test_a_pair_of_weight_zero_counts_for_nothing() -> None:
    """Two of three pairs carry a wrong label and no weight."""
    rows = pairs(72)
    labels = labels_of(rows)
    wrong = [
        dataclasses.replace(pair, sample=dataclasses.replace(pair.sample, label=labels[i % 2])) if i % 9 > 2 else pair
        for i, pair in enumerate(rows)
    ]
    config = FitConfig(epochs=12, batch_size=24, seed=1)
    weighted = fit_classifier(wrong, config, labels=labels, weights=[float(i % 9 <= 2) for i in range(72)])
    plain = fit_classifier(wrong, config, labels=labels)
    assert score_pairs(weighted.classifier, pairs(30)).accuracy == 1.0
    assert score_pairs(plain.classifier, pairs(30)).accuracy < 1.0


def test_all_of_the_loss_can_be_soft_targets() -> None:
    """They say the next label in place of the gold one."""
    rows = pairs(48)
    labels = labels_of(rows)
    gold = np.array([labels.index(str(pair.sample.label)) for pair in rows])
    soft = np.eye(3)[(gold + 1) % 3]
    fit = fit_classifier(rows, FitConfig(epochs=12, batch_size=8, seed=1, distill=1.0), soft_targets=soft)
    (logits,) = logits_of_pairs(fit.classifier, rows)
    assert (logits.argmax(1) == (gold + 1) % 3).mean() > 0.9


def test_targets_by_hand() -> None:
    gold = np.array([0, 0, 0, 1])
    assert class_weights(gold, 0.0) == pytest.approx([1, 1, 1, 1])
    balanced = class_weights(gold, 1.0)
    assert balanced == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])  # both labels weigh 2 in all
    assert class_weights(gold, 0.5).mean() == pytest.approx(1)
    soft = np.full((4, 3), 1 / 3)
    config = FitConfig(class_balance=1.0, logit_adjustment=2.0, distill=0.25)
    targets = targets_of(gold, 3, config, [1, 1, 0, 2], soft)
    assert targets.weights.numpy() == pytest.approx(balanced * [1, 1, 0, 2])
    assert targets.shares[3].numpy() == pytest.approx([1 / 12, 10 / 12, 1 / 12])
    assert targets.shift.numpy() == pytest.approx([2 * math.log(f) for f in (3 / 4, 1 / 4, 1 / 4)])


def test_logit_adjustment_raises_what_is_rare() -> None:
    """Images say nothing here: at tau 1 the answer must lean from the frequent label to an even one."""
    rows = [Pair(pair.sample) for pair in pairs(40) if pair.sample.label == "None"] + [
        Pair(pair.sample) for pair in pairs(9) if pair.sample.label != "None"
    ]
    margins = []
    for tau in (0.0, 1.0):
        fit = fit_classifier(rows, FitConfig(epochs=6, batch_size=8, logit_adjustment=tau))
        (logits,) = logits_of_pairs(fit.classifier, rows)
        margins.append(float((logits[:, 0] - logits[:, 1:].mean(1)).mean()))
    assert margins[1] < margins[0] - 0.5


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
    sample = samples(1)[0]
    with pytest.raises(DataError, match="expected one of"):
        fitted.classifier.label_ids([dataclasses.replace(sample, label="/per/per/enemy")])
    with pytest.raises(DataError, match="has no label"):
        labels_of([Pair(dataclasses.replace(sample, label=None))])
    with pytest.raises(DataError, match="at least two"):
        labels_of([Pair(sample)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "epochs: came 0"),
        ({"width": 30}, "width: came 30; expected a multiple of the 4 heads"),
        ({"learning_rate": 0.0}, "learning_rate: came 0.0; expected a number above 0"),
        ({"learning_rate": -1.0}, "learning_rate: came -1.0"),
        ({"steps": 0}, "steps: came 0"),
        ({"patience": -1}, "patience: came -1"),
        ({"gradient_accumulation": 0}, "gradient_accumulation: came 0"),
        ({"image_dropout": 1.5}, "share of 0 to 1"),
        ({"image_dropout": 0.6, "text_dropout": 0.6}, "no row loses both"),
        ({"distill": -0.1}, "distill: came -0.1"),
        ({"class_balance": math.nan}, "class_balance: came nan"),
        ({"mixed_precision": "int8"}, "expected one of: no, fp16, bf16"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FitConfig(**settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": [1.0]}, "weights: came 1 for 6 pairs"),
        ({"weights": [1, 1, -1, 1, 1, 1]}, "number 2 is -1"),
        ({"weights": [1, 1, 1, math.inf, 1, 1]}, "number 3 is inf"),
        ({"weights": [0] * 6}, "all are 0"),
        ({"soft_targets": np.ones((6, 2)) / 2}, r"came \(6, 2\)"),
        ({"soft_targets": np.ones((6, 3))}, "row 0 is no distribution"),
        ({}, "distill: came 0.5 with no soft_targets"),
    ],
)
def test_weights_and_soft_targets_that_do_not_fit(given: dict[str, Any], said: str) -> None:
    distill = 0.0 if "weights" in given else 0.5
    with pytest.raises(InputError, match=said):
        fit_classifier(pairs(6), FitConfig(epochs=1, distill=distill), **given)


def test_no_pairs_and_too_long_rows_are_refused(fitted: Fit) -> None:
    with pytest.raises(DataError, match="no pairs"):
        fit_classifier([], FitConfig())
    with pytest.raises(DataError, match="none came"):
        logits_of_pairs(fitted.classifier, [])
    with pytest.raises(ModelFolderError, match="positions"):
        fit_classifier(pairs(6), FitConfig(max_length=4096))


def test_validation_can_come_every_few_steps_whatever_the_size_of_the_data() -> None:
    fitted = fit_classifier(
        pairs(40), FitConfig(steps=7, evaluation_steps=2, batch_size=8, max_length=32), validation=pairs(9)
    )
    assert len(fitted.validation_f1) == 4  # after steps 2, 4, 6, and the last
    assert len(fitted.losses) == 4
