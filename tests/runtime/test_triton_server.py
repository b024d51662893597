"""A real `tritonserver`, where one is named: see `tests.runtime.triton_server` for the environment it needs.

MI2RAGE_PYTRITON=/path/to/env python -m pytest tests/runtime/test_triton_server.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")
if "MI2RAGE_PYTRITON" not in os.environ:
    pytest.skip("MI2RAGE_PYTRITON names no environment with nvidia-pytriton", allow_module_level=True)

from tritonclient.utils import InferenceServerException

from mi2rage_rt.bundle import Bundle
from mi2rage_rt.images import decode_image, encode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.triton_repository import write_repository
from tests.runtime.triton_server import serving, with_python_graphs

TEXT = ("tim", "cook", "leads", "apple")
CLIENT = Path(__file__).parents[2] / "examples" / "clients" / "client.py"


def example() -> Any:
    """The example client, as a module."""
    spec = importlib.util.spec_from_file_location("example_client", CLIENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ports(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    place = tmp_path_factory.mktemp("triton")
    environment = Path(os.environ["MI2RAGE_PYTRITON"])
    write_repository(bundle_folder, place / "repository")
    served = with_python_graphs(place / "repository", place / "served", environment)
    with serving(served, environment, place / "server.log") as found:
        yield found


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, ports: tuple[int, int]) -> Any:
    use_grpc = request.param == "grpc"
    return example().Client(f"127.0.0.1:{ports[use_grpc]}", use_grpc)


def relation_inputs(image: bytes | None = None, tail: str = "3:4") -> dict[str, Any]:
    module = example()
    inputs = {
        "tokens": module.of_bytes(json.dumps(TEXT).encode()),
        "head": module.span("0:2"),
        "tail": module.span(tail),
    }
    return inputs if image is None else {**inputs, "image": module.of_bytes(image)}


def test_every_model_answers_as_the_python_api(client: Any, bundle_folder: Path) -> None:
    module = example()
    picture = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    file = encode_image(picture)
    relation = client.ask("classifier", relation_inputs(file))
    made = client.ask(
        "generator", {"prompt": module.of_bytes(b"a red car"), "seed": module.seed_row(2**64 - 1)}, {"steps": 5}
    )
    written = client.ask("captioner", {"image": module.of_bytes(file), "prefix": module.of_bytes(b"the")})
    with Bundle.open(bundle_folder) as bundle:
        from mi2rage_rt.generator import GenerateOptions

        wanted = bundle.classifier().logits([Sample("s", TEXT, Span(0, 2), Span(3, 4))], [picture])[0]
        labels = bundle.classifier().labels
        image = bundle.generator().generate(["a red car"], [2**64 - 1], GenerateOptions(steps=5))[0]
        caption = bundle.captioner().caption([picture], ["the"])[0]
    np.testing.assert_allclose(relation["logits"], wanted, rtol=1e-5)
    assert relation["relation"] == [labels[int(wanted.argmax())].encode()]
    np.testing.assert_array_equal(decode_image(made["image"][0]), image)
    assert written["caption"] == [caption.encode()]


def test_many_at_once_and_the_bad_ones_alone(ports: tuple[int, int]) -> None:
    """Two of ten have a mention that does not fit; they are put together with others, and fail alone."""

    def ask(place: int) -> Any:
        client = example().Client(f"127.0.0.1:{ports[1]}", True)
        try:
            return client.ask("classifier", relation_inputs(tail="3:9" if place in (3, 7) else "3:4"))
        except InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    refused = [place for place, answer in enumerate(answers) if isinstance(answer, str)]
    assert refused == [3, 7] and all("tail [3, 9]" in answers[place] for place in refused)
    good = [answer["logits"] for answer in answers if not isinstance(answer, str)]
    np.testing.assert_allclose(good, [good[0]] * 8, rtol=1e-6)


def test_curl_and_the_example_client(ports: tuple[int, int], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode_image(np.full((300, 200, 3), 250, np.uint8)))
    told = subprocess.run(
        ["sh", str(CLIENT.with_name("curl.sh")), str(photo)],
        env={**os.environ, "URL": f"http://127.0.0.1:{ports[0]}", "PROTOCOL": "v2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert '"name":"relation"' in told.stdout and '"name":"caption"' in told.stdout
    url = ["--grpc", "--url", f"127.0.0.1:{ports[1]}"]
    made = tmp_path / "made.png"
    for words, wanted in (
        (["relation", "tim cook leads apple", "--head", "0:2", "--tail", "3:4", "--image", str(photo)], "  0."),
        (["caption", str(photo), "--prefix", "the"], "the"),
        (["image", "a dog", "--steps", "5", "--out", str(made)], "made.png"),
    ):
        done = subprocess.run([sys.executable, str(CLIENT), *url, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr
    assert decode_image(made.read_bytes()).shape == (4, 4, 3)
    wrong = subprocess.run(
        [sys.executable, str(CLIENT), *url, "image", "a", "--steps", "77"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "77" in wrong.stderr


def test_wrong_requests_are_refused_by_name(client: Any) -> None:
    module = example()
    with pytest.raises(InferenceServerException, match="not an image"):
        client.ask("captioner", {"image": module.of_bytes(b"no image")})
    with pytest.raises(InferenceServerException, match="seed"):
        client.ask("generator", {"prompt": module.of_bytes(b"a")})
    with pytest.raises(InferenceServerException, match="strength"):
        client.ask("generator", {"prompt": module.of_bytes(b"a"), "seed": module.seed_row(1)}, {"strength": 2})
