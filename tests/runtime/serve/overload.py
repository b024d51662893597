"""Throughput with and without micro-batching, and behaviour at twice the capacity.

`python -m tests.runtime.serve.overload BUNDLE [--seconds 60] [--device-ms 100]`, with nothing else running.
Three servers one after the other, on the loopback, with relations only. The clients are three times the batch: with
fewer than twice as many, the answered ones are not back in time for the next batch, which starts half empty.

1. one request a batch, `--clients` clients that wait for each answer: requests a second and latencies;
2. batches of 32, the same clients: the same figures, and how many times as many requests;
3. batches of 32, requests at twice the rate of (2) whatever comes back, for `--seconds`: those answered well and in
   time (goodput), latencies of the accepted and of the refused ones, statuses, the server's memory before and after.

The load comes from a process of its own, which needs a core: on two cores the server has one. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.serve.process import ServerProcess

WORDS = ("tim", "cook", "leads", "apple", "in", "rome", "a", "red", "car", "by", "the", "sea", "of", "and", "with")


def make_bodies(image: bytes | None, timeout_ms: float | None) -> list[bytes]:
    """Requests about sentences of 8 to 24 words."""
    rng, bodies = random.Random(0), []
    for _ in range(64):
        tokens = [rng.choice(WORDS) for _ in range(rng.randint(8, 24))]
        document: dict[str, Any] = {"tokens": tokens, "head": [0, 1], "tail": [3, 5], "timeout_ms": timeout_ms}
        if image is not None:
            document["image"] = base64.b64encode(image).decode()
        bodies.append(json.dumps(document).encode())
    return bodies


class Connection:
    """One kept HTTP connection, written by hand: a client library would take more time than the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> int:
        """The status."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST /v1/relations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        headers = await reader.readuntil(b"\r\n\r\n")
        lines = headers.decode("latin-1").lower().split("\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
        await reader.readexactly(length)
        if "connection: close" in lines:
            await self.close()
        return int(lines[0].split()[1])

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def figures(latencies_ms: list[float], seconds: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99)) if latencies_ms else (0.0,) * 3
    per_s = len(latencies_ms) / seconds
    return {"per_s": round(per_s, 1), "p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1)}


async def closed_loop(port: int, bodies: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Clients that wait for each answer."""
    latencies_ms: list[float] = []
    warm_s = time.monotonic() + min(3.0, seconds / 3)
    until_s = warm_s + seconds

    async def client(number: int) -> None:
        connection = Connection(port)
        while (now_s := time.monotonic()) < until_s:
            status = await connection.ask(bodies[number % len(bodies)])
            if status != 200:
                raise SystemExit(f"status {status} without overload: the machine is too busy for this measurement")
            if now_s >= warm_s:
                latencies_ms.append((time.monotonic() - now_s) * 1e3)
            number += clients
        await connection.close()

    await asyncio.gather(*map(client, range(clients)))
    return figures(latencies_ms, seconds)


async def open_loop(port: int, bodies: list[bytes], rate: float, seconds: float, in_time_ms: float) -> dict[str, Any]:
    """Requests at a fixed rate, each on a free connection or a new one."""
    free: list[Connection] = []
    accepted_ms: list[float] = []
    refused_ms: list[float] = []
    statuses: collections.Counter[str] = collections.Counter()
    good: collections.Counter[int] = collections.Counter()
    began_s = time.monotonic()

    async def one(number: int) -> None:
        connection = free.pop() if free else Connection(port)
        sent_s = time.monotonic()
        try:
            status = await connection.ask(bodies[number % len(bodies)])
        except (OSError, asyncio.IncompleteReadError) as error:
            statuses[type(error).__name__] += 1
            await connection.close()
        else:
            statuses[str(status)] += 1
            latency_ms = (time.monotonic() - sent_s) * 1e3
            (accepted_ms if status == 200 else refused_ms).append(latency_ms)
            if status == 200 and latency_ms <= in_time_ms:
                good[int(time.monotonic() - began_s)] += 1
        free.append(connection)

    tasks: set[asyncio.Task[None]] = set()
    sent, most = 0, 0
    while (now_s := time.monotonic() - began_s) < seconds:
        while sent < now_s * rate:
            task = asyncio.create_task(one(sent))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        most = max(most, len(tasks))
        await asyncio.sleep(0.002)
    while tasks:
        await asyncio.wait(tasks)
    return {
        "offered_per_s": round(rate, 1),
        "sent_per_s": round(sent / seconds, 1),
        "goodput_per_s": round(sum(good.values()) / seconds, 1),
        "accepted": figures(accepted_ms, seconds),
        "refused": figures(refused_ms, seconds),
        "statuses": dict(statuses),
        "unanswered": sent - sum(statuses.values()),
        "most_at_once": most,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--in-time-ms", type=float, default=2000.0, help="later answers are no goodput")
    parser.add_argument(
        "--device-ms", type=float, help="every batch takes so much longer, as on a device beside the CPU"
    )
    given = parser.parse_args()
    image = given.image.read_bytes() if given.image else None
    delay_s = None if given.device_ms is None else given.device_ms / 1e3
    found: dict[str, Any] = {"bundle": str(given.bundle), "clients": given.clients}
    common = ("--models", "classifier", "--max-queue", "128")
    for name, size in (("one_a_batch", "1"), ("batched", "32")):
        with ServerProcess(given.bundle, *common, "--max-batch", size, delay_s=delay_s, grpc=False) as server:
            work = closed_loop(server.http_port, make_bodies(image, None), given.clients, given.seconds / 3)
            found[name] = asyncio.run(work)
            found[name]["rows_a_batch"] = round(
                server.metric("mi2rage_batch_size_sum") / server.metric("mi2rage_batch_size_count"), 1
            )
            if size == "32":
                before_mb = server.metric("process_resident_memory_bytes") / 2**20
                rate = 2 * found[name]["per_s"]
                offer = open_loop(
                    server.http_port, make_bodies(image, given.in_time_ms), rate, given.seconds, given.in_time_ms
                )
                found["twice_the_capacity"] = asyncio.run(offer)
                after_mb = server.metric("process_resident_memory_bytes") / 2**20
                found["memory_mb"] = [round(before_mb, 1), round(after_mb, 1)]
                assert server.ask("/v2/health/ready").status == 200
    found["throughput_ratio"] = round(found["batched"]["per_s"] / found["one_a_batch"]["per_s"], 2)
    found["p95_ratio"] = round(found["batched"]["p95_ms"] / found["one_a_batch"]["p95_ms"], 2)
    found["goodput_share"] = round(found["twice_the_capacity"]["goodput_per_s"] / found["batched"]["per_s"], 3)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
