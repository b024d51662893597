"""Malformed requests by the hundred thousand: `python -m tests.runtime.serve.fuzz BUNDLE [--cases 100000] [--seed 0]`.

Valid requests of every route are damaged by a seeded generator and sent over connections that are kept. The server must
answer each with a documented status below 500, stay live, and end with about the memory that it had after the first
tenth. Prints one JSON document.
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
    assert server.ask("/v2/health/live").status == 200 and server.ask("/v2/health/ready").status == 200
    return {
        "cases": cases,
        "seed": seed,
        "statuses": dict(sorted(statuses.items())),
        "slowest_ms": round(slowest_s * 1e3),
        "memory_mb": [round(value, 1) for value in memory],
        "seconds": round(time.monotonic() - began_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with ServerProcess(given.bundle, "--max-body-mb", "1", "--max-wait-ms", "0", grpc=False) as server:
        try:
            print(json.dumps(fuzz(server, given.cases, given.seed), indent=2))
        except Exception:
            server.terminate()
            print(server.output()[-4000:])
            raise


if __name__ == "__main__":
    main()
