"""The python-backend models over a stand-in for Triton: their answers are those of the Python API."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

from google.protobuf import json_format

from mi2rage_engines.engine import HostArray
from mi2rage_engines.errors import BundleError, EngineError
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.caption_options import CaptionOptions
from mi2rage_rt.classifier import softmax
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import decode_image, encode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.triton_backend import BundleModel
from mi2rage_rt.triton_config import Kind, TritonOptions
from mi2rage_rt.triton_engine import TritonEngine
from mi2rage_rt.triton_repository import write_repository
from tests.runtime.fake_triton import ClientRequest, FakeTriton, Tensor, read_config

TEXT = ("tim", "cook", "leads", "apple")


def image_file(seed: int, size: int = 10) -> bytes:
    return encode_image(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def relation_request(count: int = 1, image: bytes | None = None, tail: tuple[int, int] = (3, 4)) -> ClientRequest:
    arrays: dict[str, Any] = {
        "tokens": np.array([[json.dumps(TEXT).encode()]] * count, object),
        "head": np.array([[0, 2]] * count, np.int32),
        "tail": np.array([tail] * count, np.int32),
    }
    return ClientRequest(arrays if image is None else {**arrays, "image": np.array([[image]] * count, object)})


def image_request(*rows: tuple[str, int], **parameters: Any) -> ClientRequest:
    prompts, seeds = zip(*rows, strict=True)
    arrays = {
        "prompt": np.array([[prompt.encode()] for prompt in prompts], object),
        "seed": np.array(seeds, np.uint64)[:, None],
    }
    return ClientRequest(arrays, **parameters)


def caption_request(*files: bytes, prefix: str | None = None, seed: int | None = None, **parameters: Any) -> Any:
    arrays: dict[str, Any] = {"image": np.array([[file] for file in files], object)}
    if prefix is not None:
        arrays["prefix"] = np.array([[prefix.encode()]] * len(files), object)
    if seed is not None:
        arrays["seed"] = np.array([[seed + row] for row in range(len(files))], np.uint64)
    return ClientRequest(arrays, **parameters)


class Served:
    """A repository, and its python-backend models as Triton would hold them."""

    def __init__(self, bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch, options: TritonOptions) -> None:
        write_repository(bundle, place, options)
        self.server = FakeTriton(place)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.server.module())
        self.place = place

    def model(self, name: str) -> BundleModel:
        """The class in `model.py`, initialized as Triton does it."""
        path = self.place / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location(f"served_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        config = json_format.MessageToDict(
            read_config(self.place / name / "config.pbtxt"), preserving_proto_field_name=True
        )
        model.initialize(
            {
                "model_repository": str(self.place / name),
                "model_version": "1",
                "model_name": name,
                "model_config": json.dumps(config),
            }
        )
        return model  # type: ignore[no-any-return]


@pytest.fixture(params=["cpu", "gpu"])
def served(
    request: pytest.FixtureRequest, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Served:
    kind: Kind = request.param
    return Served(bundle_folder, tmp_path / "repository", monkeypatch, TritonOptions(kind=kind))


def test_classifier_answers_as_the_python_api(served: Served, bundle_folder: Path) -> None:
    file = image_file(1)
    responses = served.model("classifier").execute([relation_request(2, file), relation_request()])
    with Bundle.open(bundle_folder) as bundle:
        sample = Sample("s", TEXT, Span(0, 2), Span(3, 4))
        wanted = bundle.classifier(8).logits([sample] * 3, [decode_image(file), decode_image(file), None])
        labels = bundle.classifier().labels
    found = [response.arrays() for response in responses]
    np.testing.assert_allclose(np.concatenate([one["logits"] for one in found]), wanted, rtol=1e-6)
    assert [one["logits"].shape for one in found] == [(2, 3), (1, 3)]
    assert [row[0].decode() for one in found for row in one["relation"]] == [labels[i] for i in wanted.argmax(1)]
    probabilities = np.concatenate([one["probability"] for one in found])
    np.testing.assert_allclose(probabilities, softmax(wanted).max(1, keepdims=True), rtol=1e-6)
    assert served.server.calls == {"classifier_classifier": 1}  # two requests, one run


def test_generator_answers_as_the_python_api(served: Served, bundle_folder: Path) -> None:
    requests = [
        image_request(("a red car", 7), ("the sea", 2**64 - 1)),
        image_request(("a dog", 3), steps=5, guidance_scale="1.5"),
        image_request(("a dog", 4)),
    ]
    found = [response.arrays()["image"] for response in served.model("generator").execute(requests)]
    with Bundle.open(bundle_folder) as bundle:
        generator = bundle.generator()
        first = generator.generate(["a red car", "the sea", "a dog"], [7, 2**64 - 1, 4])
        other = generator.generate(["a dog"], [3], GenerateOptions(steps=5, guidance_scale=1.5))
    for png, wanted in zip([*found[0], *found[2], *found[1]], [*first, *other], strict=True):
        np.testing.assert_array_equal(decode_image(png[0]), wanted)


def test_captioner_answers_as_the_python_api(served: Served, bundle_folder: Path) -> None:
    files = [encode_image(np.full((6, 6, 3), level, np.uint8)) for level in (250, 0, 250)]
    images = [decode_image(file) for file in files]
    requests = [
        caption_request(*files),
        caption_request(files[0], prefix="a red"),
        caption_request(*files[:2], seed=5, top_p=0.95, temperature=3.0),
        caption_request(files[1], beams=2, max_new_tokens=4),
    ]
    found = [response.arrays()["caption"][:, 0].tolist() for response in served.model("captioner").execute(requests)]
    with Bundle.open(bundle_folder) as bundle:
        captioner = bundle.captioner()
        wanted = [
            captioner.caption(images),
            captioner.caption(images[:1], ["a red"]),
            captioner.caption(images[:2], seeds=[5, 6], options=CaptionOptions(top_p=0.95, temperature=3.0)),
            captioner.caption(images[1:2], options=CaptionOptions(beams=2, max_new_tokens=4)),
        ]
    assert [[caption.decode() for caption in captions] for captions in found] == wanted
    assert len(set(wanted[0])) == 2  # dark and bright differ


def test_exported_graphs_answer_as_the_python_api(
    exported_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with a scalar, the whole step as a graph, and images encoded apart from sentences."""
    served = Served(exported_bundle, tmp_path / "repository", monkeypatch, TritonOptions(kind="gpu", max_batch=3))
    file = image_file(2, 30)
    Tensor.taken_by_dlpack = 0
    pictures = served.model("generator").execute([image_request(*[("a b", seed) for seed in range(4)])])[0].arrays()
    # In each of two batches, latents come from the host at the first of four steps; noise is not drawn.
    assert Tensor.taken_by_dlpack == 2 * 3 * 2
    captions = served.model("captioner").execute([caption_request(file, file)])[0].arrays()
    assert Tensor.taken_by_dlpack > 4  # keys and values of what is past stay on the device
    logits = served.model("classifier").execute([relation_request(5, file)])[0].arrays()["logits"]
    with Bundle.open(exported_bundle) as bundle:
        wanted = bundle.generator(GenerateOptions(batch_size=3)).generate(["a b"] * 4, range(4))
        words = bundle.captioner().caption([decode_image(file)])
        sample = Sample("s", TEXT, Span(0, 2), Span(3, 4))
        rows = bundle.classifier(3).logits([sample] * 5, [decode_image(file)] * 5)
    for png, image in zip(pictures["image"][:, 0], wanted, strict=True):
        np.testing.assert_allclose(decode_image(png).astype(int), image, atol=1)
    assert captions["caption"][:, 0].tolist() == [words[0].encode()] * 2
    np.testing.assert_allclose(logits, rows, atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (relation_request(tail=(3, 9)), "tail [3, 9]"),
        (relation_request(image=b"no image"), "image: not an image"),
        (ClientRequest({"tokens": np.array([[b"x"]], object)}), "no input head"),
        (
            ClientRequest(
                {
                    "tokens": np.array([[b"Tim leads"]], object),
                    "head": np.array([[0, 1]], np.int32),
                    "tail": np.array([[1, 2]], np.int32),
                }
            ),
            "not a JSON list of words",
        ),
    ],
)
def test_a_bad_request_fails_alone(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: ClientRequest, said: str
) -> None:
    model = Served(bundle_folder, tmp_path / "repository", monkeypatch, TritonOptions()).model("classifier")
    good, bad, other = model.execute([relation_request(), request_, relation_request()])
    assert bad.has_error() and said in bad.error().message()
    np.testing.assert_array_equal(good.arrays()["logits"], other.arrays()["logits"])


def test_a_request_that_fails_in_the_run_fails_alone(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix that leaves no room is known to the captioner alone; so is a size to the generator."""
    served = Served(bundle_folder, tmp_path / "repository", monkeypatch, TritonOptions())
    file = image_file(3)
    captioner = served.model("captioner")
    good, bad = captioner.execute([caption_request(file), caption_request(file, prefix="a red " * 20)])
    assert "leaves no room" in bad.error().message() and good.arrays()["caption"].shape == (1, 1)
    wrong, unknown, fine = served.model("generator").execute(
        [image_request(("a", 1), height=5), image_request(("a", 1), strength=1), image_request(("a", 1))]
    )
    assert "height 5" in wrong.error().message()
    assert "'strength'" in unknown.error().message()
    assert not fine.has_error()


def test_a_failing_graph_is_no_stack_trace(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(bundle_folder, tmp_path / "repository", monkeypatch, TritonOptions())
    model = served.model("classifier")

    def lost(*given: Any) -> Any:
        raise ValueError("secret")

    monkeypatch.setattr(served.server, "_run", lost)
    (response,) = model.execute([relation_request()])
    assert "server's log" in response.error().message() and "secret" not in response.error().message()
    assert "secret" in caplog.text


def test_engine_reshapes_what_triton_has_no_shape_for(bundle_folder: Path, tmp_path: Path) -> None:
    """The tiny classifier's `head_index (batch,)` is a row of one number to Triton, its UNet's timestep a scalar."""
    write_repository(bundle_folder, tmp_path / "repository")
    server = FakeTriton(tmp_path / "repository")
    with Bundle.open(bundle_folder) as bundle:
        graph = bundle.manifest.graphs["classifier/classifier"]
        unet = bundle.manifest.graphs["generator/unet"]
    config = read_config(tmp_path / "repository" / "classifier_classifier" / "config.pbtxt")
    head = next(tensor for tensor in config.input if tensor.name == "head_index")
    assert list(head.dims) == [1] and head.HasField("reshape") and list(head.reshape.shape) == []
    engine = TritonEngine(server.module(), "classifier_classifier", graph)
    inputs: dict[str, Any] = {
        "input_ids": np.full((2, 5), 5),
        "attention_mask": np.ones((2, 5), np.int64),
        "head_index": np.array([0, 1]),
        "tail_index": np.array([2, 2]),
        "pixel_values": np.zeros((2, 3, 6, 6), np.float32),
        "image_mask": np.zeros(2, np.float32),
    }
    assert engine.run(inputs)["logits"].shape == (2, 3)
    step = TritonEngine(server.module(), "generator_unet", unet)
    sample = np.zeros((1, 12, 2, 2), np.float32)
    given = {"sample": sample, "timestep": np.float32(500), "encoder_hidden_states": np.zeros((1, 8, 4), np.float32)}
    buffer = HostArray(np.ones_like(sample))
    results = step.call(given, into={"out_sample": buffer})
    assert results["out_sample"] is buffer
    np.testing.assert_allclose(buffer.numpy(), 0.5)
    with pytest.raises(EngineError, match=r"sample has shape \(1, 12, 2\)"):
        step.run({**given, "sample": sample[..., 0]})
    with pytest.raises(EngineError, match="Triton refused"):
        engine.run({**inputs, "head_index": np.array([0, 9])})


def test_a_damaged_version_folder_is_refused(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(bundle_folder, tmp_path / "repository", monkeypatch, TritonOptions())
    path = served.place / "captioner" / "1" / "component.json"
    path.write_text(path.read_text().replace('"heads"', '"tails"'))
    with pytest.raises(BundleError, match="write the repository again"):
        served.model("captioner")
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        served.model("captioner")
