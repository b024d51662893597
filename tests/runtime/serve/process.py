"""A server as a process of its own, and ways to ask it."""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[3]
LONG_S = 180.0


class Reply:
    """A status, headers and a body."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"{self.status} {self.body[:300]!r}"


class ServerProcess:
    """`mi2rage-rt serve` on free ports of the loopback; use it in a `with` block, which waits until it is ready.

    Args:
        bundle: the folder.
        args: more options.
        delay_s: None for the real command, a number for `odd_server`.
    """

    def __init__(self, bundle: Path, *args: str, delay_s: float | None = None, grpc: bool = True) -> None:
        module = ["mi2rage_rt.cli"] if delay_s is None else ["tests.runtime.serve.odd_server", str(delay_s)]
        ports = ["--port", "0", *(["--grpc-port", "0"] if grpc else ["--no-grpc"]), "--threads", "1"]
        self.command = [sys.executable, "-m", *module, "serve", str(bundle), *ports, *args]
        self.http_port = self.grpc_port = 0
        self.lines: list[str] = []
        self._coming: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.wait_for("ready after")
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LONG_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._coming.put(line.rstrip("\n"))
        self._coming.put(None)

    def wait_for(self, text: str) -> str:
        """The first line from now on that holds the text."""
        until_s = time.monotonic() + LONG_S
        while True:
            line = self._coming.get(timeout=max(0.0, until_s - time.monotonic()))
            if line is None:
                raise AssertionError("the server ended: " + "\n".join(self.lines))
            self.lines.append(line)
            for name in ("http", "grpc"):
                if line.startswith(f"listening on {name}://"):
                    setattr(self, f"{name}_port", int(line.rpartition(":")[2]))
            if text in line:
                return line

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(LONG_S)

    def output(self) -> str:
        """All that the server has said, after its end."""
        while (line := self._coming.get(timeout=LONG_S)) is not None:
            self.lines.append(line)
        return "\n".join(self.lines)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Reply:
        """One request on a connection of its own; what is neither bytes nor None goes as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.http_port}{path}"
        request = urllib.request.Request(url, content, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=LONG_S) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def relation(self, *tokens: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
        """A plain request about a sentence, its first token being the head and its second the tail."""
        body = {"tokens": list(tokens), "head": [0, 1], "tail": [1, 2], **more}
        return self.ask("/v1/relations", body, headers)

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples that hold these labels."""
        rows = [
            row for row in self.ask("/metrics").body.decode().splitlines() if row.startswith((name + "{", name + " "))
        ]
        return sum(float(row.rpartition(" ")[2]) for row in rows if all(label in row for label in labels))


def form(fields: Sequence[tuple[str, str | None, bytes]]) -> tuple[bytes, dict[str, str]]:
    """A multipart body of (name, file name, content), and its header."""
    parts = []
    for name, file, content in fields:
        named = f'; filename="{file}"' if file else ""
        parts.append(
            f'--XX\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return b"".join([*parts, b"--XX--\r\n"]), {"Content-Type": "multipart/form-data; boundary=XX"}


def base64_from(content: bytes) -> str:
    return base64.b64encode(content).decode()
