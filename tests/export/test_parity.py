"""The checks themselves: each must fail when something is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mi2rage_engines.errors import ParityError
from mi2rage_export import parity
from mi2rage_export.components import captioner_graphs, classifier_graphs, generator_graphs
from mi2rage_rt.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(exported_bundle):
    return Bundle.open(exported_bundle)


def _changed(graph, change):
    return dataclasses.replace(graph, reference=lambda *tensors: tuple(map(change, graph.reference(*tensors))))


@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor * 1.001, lambda tensor: tensor + float("nan"), lambda tensor: tensor[..., :-1]],
    ids=["scaled", "nan", "shape"],
)
def test_a_graph_that_differs_fails(classifier, exported_bundle, change):
    (graph,) = classifier_graphs(classifier)
    path = exported_bundle / "classifier" / "classifier.onnx"
    assert parity.check_graph(graph, path).passed
    record = parity.check_graph(_changed(graph, change), path)
    assert not record.passed
    assert np.isfinite(record.value)
    with pytest.raises(ParityError, match=r"classifier/classifier: max_abs_scaled is .* the bound is 0.0001"):
        parity.demand(record)


def test_every_graph_is_checked_at_its_smallest_usual_and_largest_sizes(generator, captioner, classifier):
    for graph in (*generator_graphs(generator), *captioner_graphs(captioner), *classifier_graphs(classifier)):
        axes = {axis for item in graph.inputs for axis in item.shape if isinstance(axis, str)}
        assert set(graph.traced) == axes
        assert all(size >= 2 for size in graph.traced.values())
        assert all(set(sizes) == axes for sizes in graph.checked)
        assert len(graph.checked) >= 3
        for axis in axes:
            assert any(sizes[axis] != graph.traced[axis] for sizes in graph.checked)


def test_differences_are_measured_against_the_size_of_the_answer():
    large = np.array([1000.0, 1.0])
    assert parity.difference(large + 0.01, large) == pytest.approx(1e-5)
    assert parity.difference(large / 1000 + 0.01, large / 1000) == pytest.approx(0.01)
    assert parity.difference(np.array([np.inf]), np.array([np.inf])) == np.inf


def test_whole_components_that_differ_fail(bundle, generator, captioner, classifier, monkeypatch):
    monkeypatch.setattr(type(generator), "generate", lambda self, prompts, seeds: np.zeros((4, 24, 24, 3), np.uint8))
    assert not parity.check_generator(bundle.generator(), generator).passed
    assert parity.check_captioner(bundle.captioner(), captioner).passed
    monkeypatch.setattr(type(captioner), "generate_ids", lambda self, images, prompts: [[1]] * len(images))
    record = parity.check_captioner(bundle.captioner(), captioner)
    assert (record.passed, record.value, record.cases) == (False, 0.0, 16)
    right = classifier.logits
    monkeypatch.setattr(type(classifier), "logits", lambda self, samples, images: right(samples, images) + 2e-4)
    record = parity.check_classifier(bundle.classifier(), classifier)
    assert not record.passed
    assert record.value == pytest.approx(2e-4, rel=0.2)


def test_inputs_are_drawn_from_the_seed(generator):
    from mi2rage_export.graphs import random_inputs

    graph = generator_graphs(generator)[1]
    sizes = graph.checked[0]
    first, again, other = (random_inputs(graph, sizes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(torch.from_numpy(first[name]), torch.from_numpy(again[name])) for name in first)
    assert not np.array_equal(first["sample"], other["sample"])
