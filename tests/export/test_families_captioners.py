"""Captioners of every family, exported and run without PyTorch: transformers' captions, token for token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import CaptionerSpec
from mi2rage_export.families import family_of
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.resampling import with_preprocessing
from mi2rage_export.to_onnx import export_graph
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training.pytorch_captioner import TorchCaptioner
from tests.models.tiny_captioner import build_captioner, check_captioner, random_images
from tests.models.tiny_encoder_decoder import build_encoder_decoder

TOLERANCE = 1e-4
"""fp32, largest absolute difference over the largest value, where that is above 1."""

PREPROCESSING = "swin-trocr"
"""The captioner whose vision graph begins with the image."""

PREFIXES = ["", "a photo of", "the dog", "", "a red"]


@dataclasses.dataclass
class Exported:
    torch: TorchCaptioner
    runtime: RuntimeCaptioner
    graphs: tuple[Graph, ...]
    folder: Path

    def engine(self, name: str) -> OrtEngine:
        return OrtEngine(self.folder / self.runtime.spec.graphs[name].file, threads=1)


def export(model: Path, folder: Path, *, preprocess: bool = False) -> Exported:
    """What the bundle's writer does, without the bundle."""
    captioner = TorchCaptioner.from_folder(model, device="cpu", dtype=torch.float32)
    family = family_of("captioner", captioner)
    graphs = family.graphs(captioner)
    if preprocess:
        graphs = (with_preprocessing(graphs[0], captioner.preprocessing), *graphs[1:])
    (folder / "captioner").mkdir(parents=True)
    fields = family.write(folder / "captioner", captioner)
    files = {graph.name.partition("/")[2]: f"{graph.name}.onnx" for graph in graphs}
    specs = {
        name: export_graph(graph, folder / files[name], files[name]) for name, graph in zip(files, graphs, strict=True)
    }
    spec = CaptionerSpec(graphs=specs, **fields)
    engines = {name: OrtEngine(folder / file, threads=1) for name, file in files.items()}
    return Exported(captioner, RuntimeCaptioner(spec, engines, PlainTokenizer(spec.tokenizer, folder)), graphs, folder)


def make(folder: Path, kind: str) -> Exported:
    if kind == "blip-large":  # in small: a vision tower of another width and with other heads than the decoder
        build_captioner(folder / "model", seed=1, vision_width=48, vision_heads=3)
        check_captioner(folder / "model")
        return export(folder / "model", folder)
    encoder, decoder = kind.split("-")
    build_encoder_decoder(folder / "model", encoder, decoder)
    return export(folder / "model", folder, preprocess=kind == PREPROCESSING)


@pytest.fixture(
    scope="module", params=["vit-gpt2", "deit-bert", "beit-roberta", PREPROCESSING, "blip-large"], ids=lambda kind: kind
)
def exported(request, tmp_path_factory) -> Exported:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def test_graphs_answer_as_the_unpatched_model(exported):
    """At the smallest, usual and largest sizes, the prefill's empty past among them."""
    for graph in exported.graphs:
        engine = exported.engine(graph.name.partition("/")[2])
        for case, sizes in enumerate(graph.checked):
            arrays = random_inputs(graph, sizes, seed=case)
            with torch.inference_mode():
                expected = graph.reference(*(torch.from_numpy(array) for array in arrays.values()))
            found = engine.run(arrays)
            for output, tensor in zip(graph.outputs, expected, strict=True):
                scale = max(1.0, float(tensor.abs().max()))
                np.testing.assert_allclose(
                    found[output.name] / scale, tensor.numpy() / scale, rtol=0, atol=TOLERANCE, err_msg=str(sizes)
                )


def test_captions_are_those_of_pytorch(exported):
    images = list(random_images(5, seed=7))
    for prefix in ("", "a photo of"):
        prompts = [exported.torch.prompt_ids(prefix)] * len(images)
        assert exported.runtime.prompt_ids(prefix) == prompts[0]
        for seeds in (None, [4, 5, 6, 7, 8]):
            expected = exported.torch.generate_ids(images, prompts, seeds)
            assert exported.runtime.generate_ids(images, prompts, seeds) == expected
    assert exported.runtime.caption(images, PREFIXES) == exported.torch.caption(images, PREFIXES)
    expected = exported.torch.caption(images, PREFIXES, [1, 2, 3, 4, 5], with_prefix=False)
    assert exported.runtime.caption(images, PREFIXES, [1, 2, 3, 4, 5], with_prefix=False) == expected


def test_steps_equal_the_prefill(exported):
    """Four ids at once, and one by one from an empty past, give the same logits."""
    engine = exported.engine("decoder")
    inputs = random_inputs(exported.graphs[1], {"batch": 2, "sequence": 4, "past": 0}, seed=0)
    whole, state = engine.run(inputs), dict(inputs)
    scale = max(1.0, float(np.abs(whole["logits"]).max()))
    for step in range(4):
        output = engine.run(state | {"input_ids": inputs["input_ids"][:, step : step + 1]})
        state |= {"past_keys": output["present_keys"], "past_values": output["present_values"]}
        np.testing.assert_allclose(
            output["logits"][:, 0] / scale, whole["logits"][:, step] / scale, rtol=0, atol=TOLERANCE
        )


def test_the_vision_graph_holds_no_decoder(exported):
    """Its submodules may be lowered to another precision than the decoder's."""
    inside = {id(parameter) for parameter in exported.graphs[0].module.parameters()}
    module = exported.torch.module
    decoder = module.text_decoder if module.config.model_type == "blip" else module.decoder
    shared = [name for name, parameter in decoder.named_parameters() if id(parameter) in inside]
    assert shared and all("cross" in name or "encoder_attn" in name for name in shared)


def test_tensorrt_reads_the_graphs(exported):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for graph in exported.runtime.spec.graphs.values():
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(exported.folder / graph.file)), parser.get_error(0).desc()
        assert {network.get_input(index).name for index in range(network.num_inputs)} == {
            tensor.name for tensor in graph.inputs
        }


@pytest.mark.parametrize("exported", [PREPROCESSING], indirect=True)
def test_images_of_any_size_go_through_the_graph_with_preprocessing(exported):
    """Pillow's resizing inside the graph: the same captions; large and tall images are Pillow's own affair."""
    whole = random_images(6, pixels=60, seed=1)
    images = [whole[0], whole[1][:40], whole[2], whole[3][:, :20], np.repeat(whole[4], 30, axis=1), whole[5][:40]]
    shapes = []
    vision = exported.runtime._vision
    run = vision.run

    def spy(inputs):
        shapes.append(inputs["image"].shape)
        return run(inputs)

    vision.run = spy  # type: ignore[method-assign]
    try:
        found = exported.runtime.generate_ids(images, [exported.torch.prompt_ids("")] * 6)
    finally:
        vision.run = run  # type: ignore[method-assign]
    assert found == exported.torch.generate_ids(images, [exported.torch.prompt_ids("")] * 6)
    assert shapes == [(2, 60, 60, 3), (2, 40, 60, 3), (2, 32, 32, 3)]
