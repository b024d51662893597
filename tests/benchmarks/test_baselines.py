"""Which PyTorch model a bundle is compared with."""

from __future__ import annotations

import types

import pytest
import torch

from mi2rage_benchmarks import baselines
from mi2rage_benchmarks.baselines import findable, given_sources, load_baselines
from mi2rage_engines.bundle import open_manifest
from mi2rage_engines.errors import InputError


def test_random_weights_stand_for_the_model_of_their_role():
    models = {"generator": None, "captioner": "some/folder", "classifier": None}
    assert given_sources(models, ("sd15+taesd", "bert-clip"), 3) == {
        "captioner": "some/folder",
        "generator": "random weights sd15+taesd, seed 3",
        "classifier": "random weights bert-clip, seed 3",
    }
    with pytest.raises(InputError, match="random weights 'blip-base': there is a captioner already"):
        given_sources(models, ("blip-base",), 0)
    with pytest.raises(InputError, match="random weights 'gpt': not known; expected one of sd15"):
        given_sources(models, ("gpt",), 0)


@pytest.mark.parametrize(
    ("source", "found"),
    [("embedded", True), ("random weights sd-turbo+taesd, seed 0", True), ("owner/name", False), (".", True)],
)
def test_what_needs_no_network(source, found):
    assert findable(source) is found


def test_a_manifests_word_leads_to_the_model_and_its_sampler(exported_bundle, monkeypatch):
    from mi2rage_training import random_weights

    manifest = open_manifest(exported_bundle)
    asked = []
    model = types.SimpleNamespace(module=torch.nn.Linear(1, 1))

    def random_model(name, *, seed):
        asked.append((name, seed))
        return "captioner", model

    monkeypatch.setattr(random_weights, "random_model", random_model)
    source = {"captioner": "random weights blip-base, seed 7"}
    changed = manifest.model_copy(update={"source": source})
    assert load_baselines(("captioner",), {}, changed) == {"captioner": model}
    assert asked == [("blip-base", 7)]

    table = manifest.generator.schedules[0].model_copy(update={"scheduler": "EulerDiscreteScheduler"})
    generator = manifest.generator.model_copy(update={"schedules": (table,)})
    models = load_baselines(("generator",), {}, manifest.model_copy(update={"generator": generator}))
    assert type(models["generator"].pipeline.scheduler).__name__ == "EulerDiscreteScheduler"


def test_the_roles_are_those_of_a_manifest(exported_bundle):
    assert set(baselines.ROLES) == set(open_manifest(exported_bundle).source)
