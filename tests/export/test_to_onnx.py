"""The ONNX files: same bytes each time, weights beside the graph where they are large, nothing printed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch

from mi2rage_engines.errors import Mi2rageError
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import GraphSpec
from mi2rage_export.families import family_of
from mi2rage_export.graphs import random_inputs
from mi2rage_export.parity import check_graph, demand
from mi2rage_export.recording import record_graph
from mi2rage_export.to_onnx import export_graph, save_model, trace
from mi2rage_training.pytorch_models import TorchGenerator
from tests.models.tiny_generator import build_generator


@pytest.fixture(scope="module")
def text_encoder(generator):
    return family_of("generator", generator).graphs(generator)[0]


def test_the_same_module_gives_the_same_bytes_and_large_weights_stand_apart(
    text_encoder, exported_bundle, tmp_path, capfd
):
    model = trace(text_encoder)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    save_model(model, tmp_path / "again.onnx")
    once = exported_bundle / "generator" / "text_encoder" / "model.onnx"
    assert (tmp_path / "again.onnx").read_bytes() == once.read_bytes()

    save_model(model, tmp_path / "large" / "model.onnx", embed_up_to_bytes=1000)
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["model.onnx", "model.onnx_data"]
    onnx.checker.check_model(tmp_path / "large" / "model.onnx")
    _demand_parity(text_encoder, tmp_path / "large" / "model.onnx")


def _demand_parity(graph, path):
    reference = record_graph(graph, path.parent, seed=0)
    spec = GraphSpec(file=path.name, inputs=tuple(item.spec for item in graph.inputs), outputs=graph.outputs, opset=20)
    demand(check_graph(OrtEngine(path), graph.name, spec, reference, path.parent))


def test_the_tiny_autoencoder_too(tmp_path):
    generator = TorchGenerator.from_folder(build_generator(tmp_path / "taesd", vae="tiny"), device="cpu")
    graph = family_of("generator", generator).graphs(generator)[2]
    spec = export_graph(graph, tmp_path / "vae.onnx", "vae.onnx")
    assert [tensor.name for tensor in (*spec.inputs, *spec.outputs)] == ["latent_sample", "sample"]
    _demand_parity(graph, tmp_path / "vae.onnx")


def test_one_decoder_graph_serves_prefill_and_every_step(captioner, exported_bundle):
    """Five tokens at once, and the same one by one from an empty past, give the same logits within 1e-4."""
    graph = family_of("captioner", captioner).graphs(captioner)[1]
    engine = OrtEngine(exported_bundle / "captioner" / "decoder.onnx")
    inputs = random_inputs(graph, {"batch": 2, "sequence": 5, "past": 0}, seed=0)
    state = dict(inputs)
    for step in range(5):
        whole = engine.run(inputs | {"input_ids": inputs["input_ids"][:, : step + 1]})
        output = engine.run(state | {"input_ids": inputs["input_ids"][:, step : step + 1]})
        state |= {"past_keys": output["present_keys"], "past_values": output["present_values"]}
        assert whole["logits"].shape[1] == 1, "of a prefill only the last position is asked for"
        np.testing.assert_allclose(output["logits"], whole["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(state["past_keys"], whole["present_keys"], rtol=0, atol=1e-4)


def test_a_module_that_cannot_be_traced_is_named(text_encoder, tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids + 1 if input_ids.sum() > 3 else input_ids

    graph = dataclasses.replace(text_encoder, name="x/branches", module=Branches(), outputs=text_encoder.outputs[:1])
    with pytest.raises(Mi2rageError, match="x/branches: PyTorch's ONNX exporter failed"):
        export_graph(graph, tmp_path / "x.onnx", "x.onnx")
    assert list(tmp_path.iterdir()) == []
