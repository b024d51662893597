"""Captioners of every family, exported and run without PyTorch: transformers' captions, token for token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import CaptionerSpec
from mi2rage_export.families import family_of
from mi2rage_export.graphs import Graph, random_inputs
from mi2rage_export.resampling import with_preprocessing
from mi2rage_export.to_onnx import export_graph
from mi2rage_rt.captioner import CaptionOptions, RuntimeCaptioner
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training.pytorch_captioner import CaptionDecoding, TorchCaptioner
from mi2rage_training.pytorch_sources import resolve
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
    graphs = (*family.graphs(captioner), family.static_cache(captioner))
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


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_those_of_pytorch(exported, beams, monkeypatch):
    """Token for token what `generate(num_beams=...)` finds, with the penalties that it has by default."""
    images = list(random_images(5, seed=7))
    monkeypatch.setattr(exported.torch, "decoding", CaptionDecoding(beams=beams))
    for prefix in ("", "a photo of"):
        prompts = [exported.torch.prompt_ids(prefix)] * len(images)
        found = exported.runtime.generate_ids(images, prompts, options=CaptionOptions(beams=beams))
        assert found == exported.torch.generate_ids(images, prompts)
    options = CaptionOptions(beams=beams, batch_size=2 * beams)
    assert exported.runtime.caption(images, PREFIXES, options=options) == exported.torch.caption(images, PREFIXES)


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"),
    [(2.0, True), (0.0, True), (-1.0, False), (2.0, False), (1.0, "never"), (-1.0, "never")],
)
def test_beams_are_penalised_and_stopped_alike(exported, length_penalty, early_stopping, monkeypatch):
    module = exported.torch.module
    config = (module.text_decoder if module.config.model_type == "blip" else module).generation_config
    monkeypatch.setattr(config, "length_penalty", length_penalty)
    monkeypatch.setattr(config, "early_stopping", early_stopping)
    monkeypatch.setattr(exported.torch, "decoding", CaptionDecoding(beams=3))
    images = list(random_images(6, seed=11))
    options = CaptionOptions(beams=3, length_penalty=length_penalty, early_stopping=early_stopping)
    for prefix in ("", "a photo of"):  # which no penalty counts
        prompts = [exported.torch.prompt_ids(prefix)] * len(images)
        expected = exported.torch.generate_ids(images, prompts)
        assert exported.runtime.generate_ids(images, prompts, options=options) == expected


def test_a_static_cache_changes_no_token(exported):
    images = list(random_images(5, seed=7))
    for seeds, beams in ((None, 1), ([4, 5, 6, 7, 8], 1), (None, 3)):
        dynamic, static = (CaptionOptions(beams=beams, static_cache=static) for static in (False, True))
        expected = exported.runtime.caption(images, PREFIXES, seeds, dynamic)
        assert exported.runtime.caption(images, PREFIXES, seeds, static) == expected


def test_the_embedded_captioner_searches_as_transformers_does(tmp_path):
    """The micro-world's: sharp, trained distributions beside the random ones above."""
    embedded = export(resolve("embedded", "captioner"), tmp_path)
    draws = np.random.default_rng(5).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    images = list(np.repeat(np.repeat(draws, 12, axis=1), 12, axis=2))
    for beams in (1, 3):
        embedded.torch.decoding = CaptionDecoding(beams=beams)
        for prefix in ("", "a photo of"):
            prompts = [embedded.torch.prompt_ids(prefix)] * len(images)
            expected = embedded.torch.generate_ids(images, prompts)
            for static in (False, True):
                options = CaptionOptions(beams=beams, static_cache=static)
                assert embedded.runtime.generate_ids(images, prompts, options=options) == expected
    assert len({tuple(ids) for ids in expected}) > 1


def test_steps_equal_the_prefill(exported):
    """Four ids at once, and one by one from an empty past, give the same logits; a cache of fixed length too."""
    engine, static = exported.engine("decoder"), exported.engine("decoder_static")
    inputs = random_inputs(exported.graphs[1], {"batch": 2, "sequence": 4, "past": 0}, seed=0)
    ids = inputs["input_ids"]
    whole, state = engine.run(inputs), dict(inputs)
    room = np.zeros((*state["past_keys"].shape[:3], 9, state["past_keys"].shape[4]), np.float32)
    fixed = state | {"past_keys": room, "past_values": room}
    whole_fixed = static.run(fixed | {"position": np.array([0])})
    scale = max(1.0, float(np.abs(whole["logits"]).max()))
    for step in range(4):
        output = engine.run(state | {"input_ids": ids[:, step : step + 1]})
        state |= {"past_keys": output["present_keys"], "past_values": output["present_values"]}
        placed = static.run(fixed | {"input_ids": ids[:, step : step + 1], "position": np.array([step])})
        fixed |= {"past_keys": placed["present_keys"], "past_values": placed["present_values"]}
        np.testing.assert_allclose(placed["logits"] / scale, output["logits"] / scale, rtol=0, atol=TOLERANCE)
    for last in (output, placed, whole_fixed):
        np.testing.assert_allclose(last["logits"] / scale, whole["logits"] / scale, rtol=0, atol=TOLERANCE)
    assert whole["logits"].shape[1] == 1
    assert not placed["present_keys"][..., 4:, :].any()


def test_the_prefixes_that_the_folder_proposes_are_kept(tmp_path):
    model = build_captioner(tmp_path / "model")
    (model / "mi2rage.json").write_text('{"text_prefixes": ["{head} by {tail} ,"]}')
    captioner = TorchCaptioner.from_folder(model, device="cpu", dtype=torch.float32)
    assert family_of("captioner", captioner).write(tmp_path, captioner)["text_prefixes"] == ("{head} by {tail} ,",)


def test_the_vision_graph_holds_no_decoder(exported):
    """Its submodules may be lowered to another precision than the decoder's."""
    inside = {id(parameter) for parameter in exported.graphs[0].module.parameters()}
    module = exported.torch.module
    decoder = module.text_decoder if module.config.model_type == "blip" else module.decoder
    shared = [name for name, parameter in decoder.named_parameters() if id(parameter) in inside]
    assert shared and all("cross" in name or "encoder_attn" in name for name in shared)


def test_no_decoder_copies_what_it_sees_of_the_image(exported):
    """At every token it would: 42 MB of BLIP-base for one image."""
    for name in ("decoder", "decoder_static"):
        graph = onnx.load(exported.folder / exported.runtime.spec.graphs[name].file, load_external_data=False).graph
        readers = [node.op_type for node in graph.node if any(given.startswith("cross_") for given in node.input)]
        assert len(readers) >= 2 * exported.runtime.spec.layers
        assert not {"Split", "Gather", "Slice", "Concat", "Identity"} & set(readers)


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
