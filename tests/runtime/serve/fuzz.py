"""Malformed requests by the hundred thousand: `python -m tests.runtime.serve.fuzz BUNDLE [--cases 100000] [--seed 0]`.

Valid requests of every route are damaged by a seeded generator and sent over connections that are kept; with `--grpc`
messages of protocol V2 over gRPC. The server must answer each with a documented status that is no fault of its own,
stay live, and end with about the memory that it had after the first tenth. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import base64
import collections
import functools
import http.client
import io
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.runtime.serve.process import ServerProcess, form

WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**64,
    10**400,
    "",
    "x",
    "\x00",
    "é" * 50,
    "\ud800",
    [],
    [[]],
    {},
    [1, 2, 3],
]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@functools.cache
def sound_pictures() -> list[bytes]:
    """Image files of all formats, allowed or not."""
    rng, files = np.random.default_rng(0), []
    for number in range(120):
        buffer = io.BytesIO()
        shape = (*rng.integers(1, 40, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer, FORMATS[number % len(FORMATS)])
        files.append(buffer.getvalue())
    return files


def picture(rng: random.Random) -> bytes:
    """An image file, sound or not."""
    content = rng.choice(sound_pictures())
    return damaged(rng, content) if rng.random() < 0.7 else content


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or cut off."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(found):
            found[place] = rng.randrange(256)
        elif kind == 1:
            found[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del found[place : place + rng.randint(1, 30)]
        elif kind == 3:
            found[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        elif rng.random() < 0.3:
            del found[place:]
    return bytes(found)


def spoilt(rng: random.Random, document: Any) -> Any:
    """A document with one of its values replaced, left out or repeated, somewhere."""
    if isinstance(document, dict) and document and rng.random() < 0.8:
        key = rng.choice(list(document))
        changed = dict(document)
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[rng.choice(["file", "path", "x" * 300, "binary_data_size"])] = rng.choice(WRONG)
        else:
            changed[key] = spoilt(rng, document[key])
        return changed
    if isinstance(document, list) and document and rng.random() < 0.7:
        place = rng.randrange(len(document))
        if rng.random() < 0.2:
            return document * rng.choice([0, 2, 100])
        return [*document[:place], spoilt(rng, document[place]), *document[place + 1 :]]
    if isinstance(document, int) and rng.random() < 0.5:
        return document + rng.choice([-1, 1, 2, 1000])
    return rng.choice(WRONG)


def plain_case(rng: random.Random) -> tuple[str, dict[str, str], Any, bytes | None]:
    file = picture(rng) if rng.random() < 0.6 else None
    kind = rng.randrange(4)
    if kind == 0:
        return "/v1/relations", {}, {"text": "tim leads apple", "head": [0, 3], "tail": [10, 15]}, file
    if kind == 1:
        return "/v1/relations", {}, {"tokens": ["tim", "in", "rome"], "head": [0, 1], "tail": [2, 3]}, file
    if kind == 2:
        return "/v1/captions", {}, {"prefix": "a", "seed": 1, "max_new_tokens": 3, "beams": 1, "top_p": 0.9}, file
    return "/v1/images", {}, {"prompt": "a dog", "seed": 3, "steps": 4, "height": 8, "guidance_scale": 2.0}, None


def protocol_case(rng: random.Random) -> tuple[str, dict[str, str], dict[str, Any], dict[str, bytes]]:
    """A request of protocol V2 and the raw contents of its inputs."""
    model = rng.choice(["classifier", "captioner", "generator"])

    def texts(*values: bytes) -> bytes:
        return b"".join(struct.pack("<I", len(value)) + value for value in values)

    if model == "classifier":
        raw = {
            "tokens": texts(b'["tim", "in", "rome"]'),
            "head": struct.pack("<ii", 0, 1),
            "tail": struct.pack("<ii", 2, 3),
            "image": texts(picture(rng)),
        }
    elif model == "captioner":
        raw = {"image": texts(picture(rng)), "prefix": texts(b"a"), "seed": struct.pack("<Q", 7)}
    else:
        raw = {"prompt": texts(b"a dog"), "seed": struct.pack("<Q", 7)}
    kinds = {"head": "INT32", "tail": "INT32", "seed": "UINT64"}
    inputs = [
        {
            "name": name,
            "datatype": kinds.get(name, "BYTES"),
            "shape": [1, 2] if name in ("head", "tail") else [1, 1],
            "parameters": {"binary_data_size": len(content)},
        }
        for name, content in raw.items()
    ]
    document = {"id": "1", "inputs": inputs, "parameters": {"binary_data_output": True, "timeout_ms": 5000}}
    return f"/v2/models/{model}/infer", {}, document, raw


def make_case(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of one request."""
    if rng.random() < 0.5:
        path, headers, document, file = plain_case(rng)
        if rng.random() < 0.7:
            document = spoilt(rng, document)
        if file is not None and rng.random() < 0.5:
            body, headers = form([("request", None, json.dumps(document).encode()), ("image", "x", file)])
        else:
            if file is not None and isinstance(document, dict):
                document = {**document, "image": base64.b64encode(file).decode()}
            body = json.dumps(document).encode()
    else:
        path, headers, document, raw = protocol_case(rng)
        if rng.random() < 0.5:
            document = spoilt(rng, document)
        if rng.random() < 0.3:
            raw = {name: damaged(rng, content) for name, content in raw.items()}
        text = json.dumps(document).encode()
        body = text + b"".join(raw.values())
        headers = {"Inference-Header-Content-Length": str(len(text) + rng.choice([0, 0, 0, 0, 1, -1, 10**6]))}
    if rng.random() < 0.2:
        body = damaged(rng, body)
    if rng.random() < 0.05:
        headers["X-Timeout-Ms"] = rng.choice(["1", "0", "-1", "nan", "x", "1e400"])
    return path, body, headers


def found_out(
    server: ServerProcess,
    cases: int,
    seed: int,
    statuses: collections.Counter[Any],
    memory: list[float],
    began_s: float,
) -> dict[str, Any]:
    """What came of a run, once the server has shown that it is live and ready."""
    assert server.ask("/v2/health/live").status == 200 and server.ask("/v2/health/ready").status == 200
    return {
        "cases": cases,
        "seed": seed,
        "statuses": dict(sorted(statuses.items())),
        "memory_mb": [round(value, 1) for value in memory],
        "seconds": round(time.monotonic() - began_s, 1),
    }


def fuzz(server: ServerProcess, cases: int, seed: int) -> dict[str, Any]:
    """Send the cases; what came back, by status.

    Raises:
        AssertionError: a status from 500 on but for a deadline's 504, no answer, or the server is not live.
    """
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
    statuses: collections.Counter[int] = collections.Counter()
    memory: list[float] = []
    began_s, slowest_s = time.monotonic(), 0.0
    for number in range(cases):
        path, body, headers = make_case(rng)
        sent_s = time.monotonic()
        connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        slowest_s = max(slowest_s, time.monotonic() - sent_s)
        statuses[reply.status] += 1
        allowed = reply.status < 500 or reply.status == 504
        assert allowed and b"Traceback" not in content, (
            number,
            path,
            body[:2000],
            headers,
            reply.status,
            content[:500],
        )
        if reply.getheader("Connection") == "close":
            connection.close()
        if number % max(1, cases // 20) == 0:
            memory.append(server.metric("process_resident_memory_bytes") / 2**20)
    return {"slowest_ms": round(slowest_s * 1e3)} | found_out(server, cases, seed, statuses, memory, began_s)


def grpc_case(rng: random.Random) -> Any:
    """A message `ModelInferRequest`, some of it wrong."""
    from tritonclient.grpc import service_pb2 as messages  # KServe's are of the same names: one process has either

    path, _, document, raw = protocol_case(rng)
    names = {"tokens": "BYTES", "image": "BYTES", "prefix": "BYTES", "prompt": "BYTES", "seed": "UINT64"}
    request = messages.ModelInferRequest(model_name=path.split("/")[3], id=document["id"])
    for name, content in raw.items():
        tensor = request.inputs.add(name=name, datatype=names.get(name, "INT32"))
        tensor.shape.extend([1, 2] if name in ("head", "tail") else [1, 1])
        request.raw_input_contents.append(damaged(rng, content) if rng.random() < 0.3 else content)
    for _ in range(rng.choice([0, 0, 1, 3])):
        spoil_message(rng, request)
    return request


def spoil_message(rng: random.Random, request: Any) -> None:
    """Change one thing in a message."""
    tensor, raws = rng.choice(request.inputs), request.raw_input_contents

    def parameter() -> None:
        value = request.parameters[rng.choice(["steps", "height", "beams", "timeout_ms", "guidance_scale", "x"])]
        if rng.random() < 0.5:
            value.int64_param = rng.choice([-1, 0, 1, 2**40])
        elif rng.random() < 0.8:
            value.string_param = rng.choice(["1", "nan", "1e400", "", "x"])

    def numbers() -> None:
        del raws[:]
        tensor.contents.int_contents.extend([rng.choice([-1, 0, 2**31 - 1])] * rng.randint(0, 3))

    shapes: list[list[int]] = [[], [0], [-1, 1], [2**62, 2], [1], [1, 1, 1], [2, 1]]
    changes: list[Callable[[], object]] = [
        lambda: setattr(tensor, "name", rng.choice(["", "file", "x" * 300, "head"])),
        lambda: setattr(tensor, "datatype", rng.choice(["", "FP32", "INT32", "BYTES", "BOOL", "x"])),
        lambda: tensor.shape.__setitem__(slice(None), rng.choice(shapes)),
        lambda: raws.pop() if raws else None,
        lambda: tensor.contents.bytes_contents.extend([rng.randbytes(rng.randint(0, 9))] * rng.randint(1, 3)),
        lambda: request.outputs.add(name=rng.choice(["", "caption", "logits", "x"])),
        lambda: setattr(request, "model_name", rng.choice(["", "x" * 300, "classifier", "captioner"])),
        numbers,
        parameter,
    ]
    rng.choice(changes)()


def fuzz_grpc(server: ServerProcess, cases: int, seed: int) -> dict[str, Any]:
    """Send the cases, one in ten as bytes that are no message any more; what came back, by status.

    Raises:
        AssertionError: a fault of the server's own, no answer, or the server is not live.
    """
    import grpc

    rng = random.Random(seed)
    statuses: collections.Counter[str] = collections.Counter()
    memory: list[float] = []
    began_s = time.monotonic()
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for number in range(cases):
            request = grpc_case(rng)
            content = request.SerializeToString()
            if rng.random() < 0.1:
                content = damaged(rng, content)
            try:
                infer(content, timeout=60)
                status, words = "OK", ""
            except grpc.RpcError as error:
                status, words = error.code().name, str(error.details())
            statuses[status] += 1
            own_fault = status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "UNIMPLEMENTED")
            assert not own_fault and "Traceback" not in words, (number, status, words, content[:2000])
            if number % max(1, cases // 20) == 0:
                memory.append(server.metric("process_resident_memory_bytes") / 2**20)
    return found_out(server, cases, seed, statuses, memory, began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grpc", action="store_true", help="over gRPC")
    given = parser.parse_args()
    send = fuzz_grpc if given.grpc else fuzz
    with ServerProcess(given.bundle, "--max-body-mb", "1", "--max-wait-ms", "0", grpc=given.grpc) as server:
        try:
            print(json.dumps(send(server, given.cases, given.seed), indent=2))
        except Exception:
            server.terminate()
            print(server.output()[-4000:])
            raise


if __name__ == "__main__":
    main()
