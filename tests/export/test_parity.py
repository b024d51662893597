"""The checks themselves: each must fail when something is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mi2rage_engines.bundle import ParityRecord
from mi2rage_engines.errors import BundleError, ParityError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_export import parity
from mi2rage_export.families import family_of
from mi2rage_export.graphs import random_inputs
from mi2rage_export.reference import FOLDER, picked, read_answers, read_references, write_answers
from mi2rage_rt.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(exported_bundle):
    return Bundle.open(exported_bundle)


@pytest.fixture
def copy(exported_bundle, tmp_path):
    """The parity folder alone, to be changed."""
    shutil.copytree(exported_bundle / FOLDER, tmp_path / FOLDER)
    return tmp_path


def _graph_records(exported_bundle, manifest, folder, name="classifier/classifier"):
    spec = manifest.graphs[name]
    return parity.check_graph(
        OrtEngine(exported_bundle / spec.file), name, spec, read_references(folder).graphs[name], folder
    )


@pytest.mark.parametrize(
    "change",
    [lambda array: array * 1.001, lambda array: array + float("nan"), lambda array: array[:-1]],
    ids=["scaled", "nan", "shape"],
)
def test_a_graph_that_differs_fails(exported_bundle, manifest, copy, change):
    parity.demand(_graph_records(exported_bundle, manifest, copy))
    answers = read_answers(copy, "classifier-classifier")
    write_answers(copy, "classifier-classifier", {name: change(array) for name, array in answers.items()})
    records = _graph_records(exported_bundle, manifest, copy)
    assert not records[0].passed
    assert all(np.isfinite(record.value) for record in records)  # JSON has no infinity
    with pytest.raises(ParityError, match=r"classifier/classifier: max_abs_scaled is .* the bound is 0.0001"):
        parity.demand(records)


def test_other_inputs_than_those_recorded_are_noticed(exported_bundle, manifest, copy):
    path = copy / FOLDER / "references.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["graphs"]["classifier/classifier"]["cases"][0]["seed"] += 1
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="draws other inputs for classifier/classifier"):
        _graph_records(exported_bundle, manifest, copy)


def test_every_graph_is_checked_at_its_smallest_usual_and_largest_sizes(generator, captioner, classifier):
    for role, model in (("generator", generator), ("captioner", captioner), ("classifier", classifier)):
        for graph in family_of(role, model).graphs(model):
            axes = {axis for item in graph.inputs for axis in item.shape if isinstance(axis, str)}
            assert set(graph.traced) == set(graph.axes) == axes
            assert all(size >= 2 for size in graph.traced.values())
            assert all(set(sizes) == axes for sizes in graph.checked)
            assert len(graph.checked) >= 3
            for axis in axes:
                assert any(sizes[axis] != graph.traced[axis] for sizes in graph.checked)


def test_differences_are_measured_against_the_size_of_the_answer():
    large = np.array([1000.0, 1.0])
    assert parity.difference(large + 0.01, large).max_abs_scaled == pytest.approx(1e-5)
    assert parity.difference(large / 1000 + 0.01, large / 1000).max_abs_scaled == pytest.approx(0.01)
    assert parity.difference(large * 3, large).cosine == pytest.approx(1.0)
    assert parity.difference(np.array([1.0, 0.0]), np.array([0.0, 1.0])).cosine == pytest.approx(0.0)
    assert parity.difference(np.array([0.0, 2.0]), np.array([1e-9, 2.0])).max_rel < 1e-5
    assert parity.difference(np.array([np.inf]), np.array([np.inf])).max_abs == np.inf


def test_large_outputs_are_sampled_over_their_whole_length():
    array = np.arange(1_000_000, dtype=np.float64).reshape(1000, 1000)
    kept = picked(array)
    assert (len(kept), kept[0], kept[-1]) == (1 << 16, 0.0, 999_999.0)
    np.testing.assert_array_equal(picked(array[:2, :3]), [0, 1, 2, 1000, 1001, 1002])


def test_images_and_captions_are_measured():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert parity.psnr_db(black, black) == 100.0
    assert parity.psnr_db(black + np.uint8(255), black) == pytest.approx(0.0)
    assert parity.psnr_db(black[:, :2], black) == -np.inf
    assert parity.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 0.5
    assert parity.common_prefix([], []) == 1.0
    assert parity.agreement(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]) == 0.0
    assert parity.agreement(np.full((2, 2), np.nan, np.float32), np.eye(2, dtype=np.float32)) == -1.0


def test_nothing_but_a_number_passes_and_figures_without_a_bound_do():
    assert not parity.record("x", "cosine", float("nan"), 0.9, 1, least=True).passed
    assert not parity.record("x", "max_abs", float("inf"), None, 1).passed
    assert parity.record("x", "max_abs", 12.0, None, 1).passed


def test_whole_components_that_differ_fail(bundle, exported_bundle, monkeypatch):
    references = read_references(exported_bundle)
    generator, captioner, classifier = bundle.generator(), bundle.captioner(), bundle.classifier()

    def failed(records: list[ParityRecord]) -> list[str]:
        return [record.measure for record in records if not record.passed]

    assert not failed(parity.check_generator(generator, references.generator, exported_bundle, "fp32"))
    assert not failed(parity.check_captioner(captioner, references.captioner, "fp32"))
    assert not failed(parity.check_classifier(classifier, references.classifier, exported_bundle, "fp32"))
    monkeypatch.setattr(type(generator), "generate", lambda *_: np.zeros((4, 24, 24, 3), np.uint8))
    assert failed(parity.check_generator(generator, references.generator, exported_bundle, "fp32")) == ["image_psnr_db"]
    monkeypatch.setattr(type(captioner), "generate_ids", lambda self, images, prompts: [[1]] * len(images))
    records = parity.check_captioner(captioner, references.captioner, "fp32")
    assert failed(records) == ["caption_prefix", "caption_agreement"]
    assert not failed(parity.check_captioner(captioner, references.captioner, "fp16"))
    right = type(classifier).logits
    monkeypatch.setattr(type(classifier), "logits", lambda *given: right(*given) + np.float32(2e-3))
    records = parity.check_classifier(classifier, references.classifier, exported_bundle, "fp32")
    assert failed(records) == ["max_abs_scaled"]


def test_inputs_are_drawn_from_the_seed(generator):
    graph = family_of("generator", generator).graphs(generator)[1]
    sizes = graph.checked[0]
    first, again, other = (random_inputs(graph, sizes, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["sample"], other["sample"])
