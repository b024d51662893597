"""The server as its clients see it: Triton's over HTTP and gRPC, and curl's."""

from __future__ import annotations

import base64
import http.client
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.classifier import softmax
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import decode_image
from mi2rage_rt.samples import Sample, Span
from tests.runtime.serve.process import ServerProcess, base64_from, form

SENTENCES = [["tim", "leads", "apple"], ["rome", "apple", "in", "the", "sea"], ["tim", "in", "rome"]]
CASES = [pytest.param(name, binary, id=f"{name}-{'binary' if binary else 'plain'}")
         for name, binary in (("http", True), ("http", False), ("grpc", True))]  # fmt: skip


class Client:
    """`tritonclient`, HTTP or gRPC, with tensors as arrays."""

    def __init__(self, server: ServerProcess, protocol: str, binary: bool) -> None:
        pytest.importorskip("tritonclient")
        import tritonclient.grpc
        import tritonclient.http

        module: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
        port = server.http_port if protocol == "http" else server.grpc_port
        self.module, self.http, self.binary = module, protocol == "http", binary
        self.client = module.InferenceServerClient(f"127.0.0.1:{port}")

    def infer(self, model: str, tensors: dict[str, np.ndarray], **options: Any) -> Any:
        inputs = []
        for name, array in tensors.items():
            datatype = {"O": "BYTES", "i": "INT32", "u": "UINT64"}[array.dtype.kind]
            tensor = self.module.InferInput(name, list(array.shape), datatype)
            if self.http:
                in_base64 = not self.binary and name == "image"
                sent = column([base64_from(row[0]) for row in array]) if in_base64 else array
                tensor.set_data_from_numpy(sent, binary_data=self.binary)
            else:
                tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        if self.http and not self.binary:
            names = [tensor["name"] for tensor in self.client.get_model_metadata(model)["outputs"]]
            options["outputs"] = [self.module.InferRequestedOutput(name, binary_data=False) for name in names]
        return self.client.infer(model, inputs, **options)


def column(rows: list[Any]) -> np.ndarray:
    """BYTES `[B, 1]`."""
    array = np.empty((len(rows), 1), dtype=np.object_)
    array[:, 0] = [row if isinstance(row, bytes) else row.encode() for row in rows]
    return array


def relation_tensors(pictures: list[bytes]) -> dict[str, np.ndarray]:
    return {
        "tokens": column([json.dumps(words) for words in SENTENCES]),
        "head": np.array([[0, 1], [1, 2], [0, 1]], dtype=np.int32),
        "tail": np.array([[2, 3], [0, 1], [2, 3]], dtype=np.int32),
        "image": column([pictures[0], b"", pictures[1]]),
    }


@pytest.mark.parametrize(("protocol", "binary"), CASES)
def test_health_and_metadata(server: ServerProcess, protocol: str, binary: bool) -> None:
    client = Client(server, protocol, binary).client
    assert client.is_server_live() and client.is_server_ready()
    assert all(client.is_model_ready(model) for model in ("classifier", "captioner", "generator"))
    metadata = client.get_model_metadata("classifier")
    inputs = metadata["inputs"] if protocol == "http" else metadata.inputs
    named = {t["name"]: t["shape"] for t in inputs} if protocol == "http" else {t.name: list(t.shape) for t in inputs}
    assert named == {"tokens": [-1, 1], "head": [-1, 2], "tail": [-1, 2], "image": [-1, 1]}
    server_metadata = client.get_server_metadata()
    assert (server_metadata["name"] if protocol == "http" else server_metadata.name) == "mi2rage-rt"


@pytest.mark.parametrize(("protocol", "binary"), CASES)
def test_relations_equal_the_python_calls(
    server: ServerProcess, bundle: Bundle, pictures: list[bytes], protocol: str, binary: bool
) -> None:
    tensors = relation_tensors(pictures)
    result = Client(server, protocol, binary).infer("classifier", tensors, request_id="7")
    model = bundle.classifier()
    samples = [
        Sample("x", tuple(words), Span(*map(int, head)), Span(*map(int, tail)))
        for words, head, tail in zip(SENTENCES, tensors["head"], tensors["tail"], strict=True)
    ]
    logits = model.logits(samples, [decode_image(pictures[0]), None, decode_image(pictures[1])])
    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-5)
    predictions = model.predict(samples, [decode_image(pictures[0]), None, decode_image(pictures[1])])
    relations = [row[0] if isinstance(row[0], str) else row[0].decode() for row in result.as_numpy("relation")]
    assert relations == [prediction.relation for prediction in predictions]
    np.testing.assert_allclose(result.as_numpy("probability")[:, 0], softmax(logits).max(axis=1), atol=1e-5)
    response = result.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "7"


@pytest.mark.parametrize(("protocol", "binary"), CASES)
def test_captions_equal_the_python_calls(
    server: ServerProcess, bundle: Bundle, pictures: list[bytes], protocol: str, binary: bool
) -> None:
    client = Client(server, protocol, binary)
    images = [decode_image(picture) for picture in pictures[:3]]
    model, prefixes = bundle.captioner(), ["a", "", "tim"]
    result = client.infer("captioner", {"image": column(pictures[:3]), "prefix": column(prefixes)})
    assert _texts(result, "caption") == model.caption(images, prefixes)
    seeds = np.array([[1], [2], [2**63 + 1]], dtype=np.uint64)
    options = CaptionOptions(max_new_tokens=4, temperature=9.0, top_p=1.0)
    result = client.infer(
        "captioner", {"image": column(pictures[:3]), "seed": seeds},
        parameters={"max_new_tokens": 4, "temperature": "9.0", "top_p": "1.0"},
    )  # fmt: skip
    assert _texts(result, "caption") == model.caption(images, None, [1, 2, 2**63 + 1], options)


@pytest.mark.parametrize(("protocol", "binary"), CASES)
def test_images_equal_the_python_calls(server: ServerProcess, bundle: Bundle, protocol: str, binary: bool) -> None:
    prompts = ["a red car", "the sea"]
    tensors = {"prompt": column(prompts), "seed": np.array([[3], [2**64 - 1]], dtype=np.uint64)}
    result = Client(server, protocol, binary).infer("generator", tensors, parameters={"steps": 5, "height": 8})
    files = result.as_numpy("image")[:, 0]
    images = [decode_image(base64.b64decode(file) if not binary else file) for file in files]
    expected = bundle.generator().generate(prompts, [3, 2**64 - 1], GenerateOptions(steps=5, height=8))
    assert np.abs(np.stack(images).astype(int) - expected).max() <= 1


def _texts(result: Any, name: str) -> list[str]:
    return [row[0] if isinstance(row[0], str) else row[0].decode() for row in result.as_numpy(name)]


@pytest.mark.parametrize(("protocol", "binary"), [("http", True), ("grpc", True)])
@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("classifier", {"head": np.array([[0, 9]] * 3, dtype=np.int32)}, "head"),
        ("classifier", {"tokens": column(["no json"] * 3)}, "JSON list"),
        ("classifier", {"image": column([b"no image", b"", b""])}, "not an image"),
        ("classifier", {"tail": np.array([[0, 1]] * 2, dtype=np.int32)}, "rows"),
        ("classifier", {"seed": np.array([[1]] * 3, dtype=np.uint64)}, "no input"),
        ("nothing", {}, "nothing"),
    ],
)
def test_errors_reach_tritons_client(
    server: ServerProcess, pictures: list[bytes], protocol: str, binary: bool, model: str,
    change: dict[str, np.ndarray], words: str,
) -> None:  # fmt: skip
    from tritonclient.utils import InferenceServerException

    client = Client(server, protocol, binary)
    with pytest.raises(InferenceServerException, match=words) as caught:
        client.infer(model, {**relation_tensors(pictures), **change})
    expected = {"http": "404" if model == "nothing" else "400"}.get(
        protocol, "StatusCode.NOT_FOUND" if model == "nothing" else "StatusCode.INVALID_ARGUMENT"
    )
    assert caught.value.status() == expected
    assert client.client.is_server_ready()


def test_a_sentence_as_text_as_words_and_as_a_form(
    server: ServerProcess, bundle: Bundle, pictures: list[bytes]
) -> None:
    sample = Sample("x", ("tim", "leads", "apple", "'s", "sea"), Span(0, 1), Span(2, 3))
    shares = softmax(bundle.classifier().logits([sample], [decode_image(pictures[1])]))[0]
    by_text = {"text": "tim leads  apple's sea", "head": [0, 3], "tail": [11, 16]}
    by_words = {"tokens": list(sample.tokens), "head": [0, 1], "tail": [2, 3], "image": base64_from(pictures[1])}
    body, headers = form([("request", None, json.dumps(by_text).encode()), ("image", "x.jpg", pictures[1])])
    replies = [
        server.ask("/v1/relations", {**by_text, "image": base64_from(pictures[1])}),
        server.ask("/v1/relations", by_words),
        server.ask("/v1/relations", body, headers),
    ]
    for reply in replies:
        assert reply.status == 200, reply
        assert list(reply.document["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert (reply.document["head"], reply.document["tail"]) == ("tim", "apple")
        assert reply.document["relation"] == bundle.classifier().labels[int(shares.argmax())]
    assert server.ask("/v1/relations", by_text).document["probabilities"] != replies[0].document["probabilities"]


def test_plain_captions_and_images(server: ServerProcess, bundle: Bundle, pictures: list[bytes]) -> None:
    expected = bundle.captioner().caption([decode_image(pictures[0])], ["a"])[0]
    body, headers = form([("request", None, b'{"prefix": "a"}'), ("image", "x.png", pictures[0])])
    assert server.ask("/v1/captions", body, headers).document == {"caption": expected}
    asked = {"prefix": "a", "image": base64_from(pictures[0])}
    assert server.ask("/v1/captions", asked).document == {"caption": expected}
    made = bundle.generator().generate(["a dog"], [5])[0]
    reply = server.ask("/v1/images", {"prompt": "a dog", "seed": 5})
    assert np.array_equal(decode_image(base64.b64decode(reply.document["image"])), made)
    reply = server.ask("/v1/images", {"prompt": "a dog", "seed": 5}, {"Accept": "image/png"})
    assert reply.headers["Content-Type"] == "image/png" and np.array_equal(decode_image(reply.body), made)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/relations", {"text": "tim", "head": [0, 3]}, 400, "tail"),
        ("/v1/relations", {"text": "tim  in", "head": [3, 4], "tail": [0, 3]}, 400, "white space"),
        ("/v1/relations", {"text": "tim", "tokens": ["tim"], "head": [0, 1], "tail": [0, 1]}, 400, "either"),
        ("/v1/relations", {"tokens": ["tim"], "head": [0, 1], "tail": [0, 1], "file": "/etc/passwd"}, 400, "file"),
        ("/v1/relations", {"tokens": ["tim"] * 513, "head": [0, 1], "tail": [0, 1]}, 400, "at most 512"),
        ("/v1/relations", {"text": "x" * 10_001, "head": [0, 1], "tail": [0, 1]}, 400, "at most 10000"),
        ("/v1/relations", {"tokens": ["tim"], "head": [0, 1], "tail": [0, 1], "image": "***"}, 400, "base64"),
        ("/v1/relations", {"tokens": ["tim"], "head": [0, 1], "tail": [0, 1], "timeout_ms": 0}, 400, "timeout_ms"),
        ("/v1/relations", b"\xff\xfe", 400, "body"),
        ("/v1/relations", b"[" * 100_000, 400, "body"),
        ("/v1/relations", b'{"tokens": ["\\ud800"], "head": [0, 1], "tail": [0, 1]}', 400, "body"),
        ("/v1/captions", {}, 400, "image"),
        ("/v1/images", {"prompt": "a", "steps": 101}, 400, "steps"),
        ("/v1/images", {"prompt": "a", "steps": 77}, 400, "steps 77"),
        ("/v1/images", {"prompt": "a", "height": 100_000, "width": 4}, 400, "other side"),
        ("/v1/images", {"prompt": "a", "height": 2048, "width": 2048}, 400, "at most 1048576"),
        ("/v1/images", {"prompt": "a", "guidance_scale": 1e300}, 400, "guidance_scale"),
        ("/v1/nothing", {}, 404, ""),
        ("/v2/models/classifier/versions/2/infer", {"inputs": []}, 404, "version"),
        ("/v2/models/classifier/infer", {"inputs": []}, 400, "missing"),
        ("/v2/models/classifier/infer", {"inputs": 1}, 400, "inputs"),
        ("/v2/health/live", {}, 405, ""),
    ],
)  # fmt: skip
def test_refusals(server: ServerProcess, path: str, body: Any, status: int, words: str) -> None:
    reply = server.ask(path, body)
    assert reply.status == status, reply
    assert words in reply.document["error"] and "Traceback" not in reply.document["error"]
    assert server.ask("/v2/health/live").document == {"live": True}


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
    connection.putrequest("POST", "/v1/relations")
    connection.putheader("Content-Length", str(2**20 + 1))
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 413
    assert "at most 1048576" in json.loads(reply.read())["error"]
    connection.close()


def test_large_and_wide_images_are_refused_before_they_are_decoded(server: ServerProcess) -> None:
    import io

    from PIL import Image

    for size, format, words in [((600, 600), "PNG", "250000"), ((2, 200), "PNG", "20 times"), ((9, 9), "GIF", "JPEG")]:
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, format)
        reply = server.relation("tim", "in", image=base64_from(buffer.getvalue()))
        assert reply.status == 400 and words in reply.document["error"], reply


def test_the_binary_form_is_checked(server: ServerProcess) -> None:
    head = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}
    text = json.dumps(head).encode()
    for length, tail, words in [
        (len(text) + 99, b"", "expected the length"),
        (len(text), b"", "left"),
        (len(text), b"\x09\x00\x00\x00a", "an element of 9 bytes"),
        (len(text), b"\x01\x00\x00\x00ab", "left over"),
        (len(text), b"\x01\x00\x00\x00a", "seed missing"),
        ("x", b"", "expected the length"),
    ]:
        headers = {"Inference-Header-Content-Length": str(length)}
        reply = server.ask("/v2/models/generator/infer", text + tail, headers)
        assert reply.status == 400 and words in reply.document["error"], reply
    reply = server.ask("/v1/images", b"x", {"Content-Encoding": "gzip"})
    assert reply.status == 415


def test_metrics_count_by_model(server: ServerProcess) -> None:
    before = server.metric("mi2rage_requests_total", 'model="classifier"', 'status="200"')
    computed = server.metric("mi2rage_batch_size_count", 'model="classifier"')
    assert server.relation("tim", "in").status == 200
    assert server.metric("mi2rage_requests_total", 'model="classifier"', 'status="200"') == before + 1
    assert server.metric("mi2rage_batch_size_count", 'model="classifier"') == computed + 1
    page = server.ask("/metrics").body.decode()
    for name in ("request_seconds", "queue_seconds", "compute_seconds", "queue_depth", "rejected", "late", "live"):
        assert f"\n# TYPE mi2rage_{name}" in page, name


def test_the_openapi_page_lists_every_route_and_status(server: ServerProcess) -> None:
    page = server.ask("/openapi.json").document
    paths = page["paths"]
    assert {"/v1/relations", "/v1/captions", "/v1/images", "/v2/models/{model}/infer", "/metrics"} <= set(paths)
    for path in ("/v1/relations", "/v2/models/{model}/infer"):
        assert {"200", "400", "401", "413", "429", "503", "504"} <= set(paths[path]["post"]["responses"])
        assert "422" not in paths[path]["post"]["responses"]


def test_models_may_be_left_out(bundle_folder: Path) -> None:
    with ServerProcess(bundle_folder, "--models", "generator", grpc=False) as process:
        assert process.ask("/v1/images", {"prompt": "a"}).status == 200
        assert process.ask("/v1/captions", {}).status == 404
        assert process.ask("/v2/models/captioner").status == 404
        assert process.ask("/v2/health/ready").status == 200
