"""A server that is too busy, stopped, or broken; and one that asks for a token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mi2rage_rt.serve.admission import Admission
from mi2rage_rt.serve.guard import Guard
from mi2rage_rt.serve.http_server import HttpServer, listening_socket
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.refusals import RefusedError
from mi2rage_rt.serve.service import Service
from tests.runtime.serve.conftest import TOKEN
from tests.runtime.serve.process import Reply, ServerProcess

SENTENCE = ("tim", "leads", "apple")


def test_too_many_requests_are_refused_at_once_and_late_ones_dropped(bundle_folder: Path) -> None:
    options = ("--models", "classifier", "--max-batch", "1", "--max-queue", "2", "--max-wait-ms", "0")
    with ServerProcess(bundle_folder, *options, delay_s=1.5, grpc=False) as server, ThreadPoolExecutor(12) as pool:
        began_s = time.monotonic()

        def ask(number: int) -> tuple[Reply, float]:
            return server.relation(*SENTENCE), time.monotonic() - began_s

        replies = list(pool.map(ask, range(12)))
        statuses = sorted(reply.status for reply, _ in replies)
        assert set(statuses) == {200, 429} and 3 <= statuses.count(200) <= 8, statuses
        for reply, _ in replies:
            if reply.status == 429:
                assert int(reply.headers["Retry-After"]) >= 1 and "waiting" in reply.document["error"]
        # Those that were refused did not wait for those that were computed.
        assert min(s for reply, s in replies if reply.status == 429) < max(
            s for reply, s in replies if reply.status == 200
        )
        assert server.metric("mi2rage_rejected_total") == statuses.count(429)

        running = pool.submit(server.relation, *SENTENCE)
        time.sleep(0.3)
        computed = server.metric("mi2rage_answered_total")
        late = [
            pool.submit(server.relation, *SENTENCE, timeout_ms=100),
            pool.submit(server.relation, *SENTENCE, headers={"X-Timeout-Ms": "100"}),
        ]
        assert [reply.result().status for reply in late] == [504, 504]
        assert running.result().status == 200
        assert server.metric("mi2rage_answered_total") == computed + 1  # the late ones were not computed
        assert server.metric("mi2rage_late_total") == 2


def test_a_refused_client_keeps_its_connection(bundle_folder: Path) -> None:
    options = ("--models", "classifier", "--max-batch", "1", "--max-queue", "1", "--max-wait-ms", "0")
    with ServerProcess(bundle_folder, *options, delay_s=1.0, grpc=False) as server, ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(server.relation, *SENTENCE)]
        time.sleep(0.3)
        busy.append(pool.submit(server.relation, *SENTENCE))
        time.sleep(0.3)
        kept = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
        body = json.dumps({"tokens": list(SENTENCE), "head": [0, 1], "tail": [2, 3]})
        kept.request("POST", "/v1/relations", body)
        reply = kept.getresponse()
        assert reply.status == 429 and reply.getheader("Connection") != "close" and reply.read()
        own = kept.sock
        assert [reply.result().status for reply in busy] == [200, 200]
        kept.request("POST", "/v1/relations", body)
        assert kept.getresponse().status == 200 and kept.sock is own
        two = server.ask("/v2/models/classifier/infer", {"inputs": [
            {"name": "tokens", "shape": [2], "datatype": "BYTES", "data": ['["tim"]', '["tim"]']},
            {"name": "head", "shape": [2, 2], "datatype": "INT32", "data": [[0, 1], [0, 1]]},
            {"name": "tail", "shape": [2, 2], "datatype": "INT32", "data": [[0, 1], [0, 1]]},
        ]})  # fmt: skip
        assert two.status == 400 and "at most 1" in two.document["error"]  # so many never fit


def test_requests_are_counted_from_their_headers_on() -> None:
    """What was let in and has not reached the queue yet counts too."""
    counted: list[tuple[str, str, int, float]] = []

    def check_room(model: str, inside: int) -> None:
        if inside >= 2:
            raise RefusedError(429, f"{inside} wait", 1.0)

    service = SimpleNamespace(
        check_room=check_room, metrics=SimpleNamespace(count=lambda *counts: counted.append(counts))
    )
    admission = Admission(cast(Service, service))
    places = [admission.enter("classifier", "json") for _ in range(2)]
    with pytest.raises(RefusedError, match="2 wait"):
        admission.enter("classifier", "json")
    assert counted == [("classifier", "json", 429, 0.0)]
    places[0].enter()  # it is inside already
    places[0].leave()
    places[0].leave()
    assert admission.inside["classifier"] == 1
    third = admission.enter("classifier", "json")
    with pytest.raises(RefusedError):
        places[0].enter()
    third.leave()
    places[1].leave()
    assert admission.inside["classifier"] == 0


HEAD = b"POST /v1/relations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


def test_slow_bodies_keep_nobody_out(bundle_folder: Path) -> None:
    options = ("--models", "classifier", "--max-batch", "1", "--max-queue", "1", "--max-wait-ms", "0")
    with ServerProcess(bundle_folder, *options, grpc=False) as server:
        slow = [socket.create_connection(("127.0.0.1", server.http_port), 60) for _ in range(12)]
        for number, connection in enumerate(slow):
            connection.sendall(HEAD + b"{" * (number % 2))  # more than may be inside, none with its whole body
        time.sleep(0.3)
        assert server.relation(*SENTENCE).status == 200
        for connection in slow:
            connection.close()
        assert server.relation(*SENTENCE).status == 200


def test_pipelined_requests_are_answered_in_their_order_or_turned_away(bundle_folder: Path) -> None:
    options = ("--models", "classifier", "--max-batch", "1", "--max-queue", "1", "--max-wait-ms", "0")
    with ServerProcess(bundle_folder, *options, delay_s=0.5, grpc=False) as server:
        body = json.dumps({"tokens": list(SENTENCE), "head": [0, 1], "tail": [2, 3]}).encode()
        head = f"POST /v1/relations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.http_port), 60) as connection:
            connection.sendall((head + body) * 3 + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            found = b""
            while found.count(b"HTTP/1.1") < 4 or not found.endswith(b"}"):
                part = connection.recv(65536)
                assert part, found
                found += part
        statuses = [int(line[:3]) for line in found.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [200, 200, 200, 200]
        assert found.endswith(b'{"live":true}')


def test_a_body_that_nobody_reads_does_not_hold_its_connection(tmp_path: Path) -> None:
    """Its answer is there before its end: what comes after that has a time limit too."""

    async def run() -> bytes:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

        limits = dataclasses.replace(Limits(), body_timeout_s=0.2)
        service = cast(Service, SimpleNamespace(limits=limits, draining=False))
        app.enter = lambda method, path: None  # type: ignore[attr-defined]
        server = HttpServer(cast(Guard, app), service, 1.0)
        with listening_socket("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            found = await reader.readuntil(b"ok")
            writer.write(b"a")
            await asyncio.wait_for(reader.read(), 10)  # the server closes
            server.should_exit = True
            await serving
            return found

    assert b"200" in asyncio.run(run())


def test_refusals_that_nobody_reads_do_not_pile_up() -> None:
    async def run() -> int:
        def enter(method: str, path: str) -> None:
            raise RefusedError(429, "full", 1.0)

        app: Any = SimpleNamespace(enter=enter)
        service = cast(Service, SimpleNamespace(limits=Limits(), draining=False))
        server = HttpServer(app, service, 1.0)
        request, sent = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" * 1000, 0
        with listening_socket("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
            with contextlib.suppress(OSError):
                while sent < 300:  # ends long before: the answers fill every buffer, and the server hangs up
                    writer.write(request)
                    sent += 1
                    await asyncio.wait_for(writer.drain(), 10)
            writer.transport.abort()
            server.should_exit = True
            await serving
            return sent

    assert asyncio.run(run()) < 300


def test_who_reads_its_answer_slowly_keeps_nobody_out() -> None:
    inside: list[int] = []

    async def run() -> None:
        service = cast(Any, SimpleNamespace(limits=Limits(), draining=False))
        service.check_room = lambda model, inside: None
        service.admission = Admission(service)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            inside.append(service.admission.inside["classifier"])
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message: Any) -> None:
            inside.append(service.admission.inside["classifier"])

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        guard = Guard(app, service, None, {"/x": ("classifier", "json")})
        await guard({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)

    asyncio.run(run())
    assert inside == [1, 0]


def test_too_many_connections_are_told_so_and_probes_are_answered(bundle_folder: Path) -> None:
    with ServerProcess(bundle_folder, "--models", "classifier", "--max-connections", "4", grpc=False) as server:
        idle = [socket.create_connection(("127.0.0.1", server.http_port), 60) for _ in range(4)]
        time.sleep(0.3)
        reply = server.relation(*SENTENCE)
        assert reply.status == 503 and reply.headers["Retry-After"] == "1" and reply.headers["Connection"] == "close"
        assert "too many connections" in reply.document["error"]
        assert server.ask("/v2/health/live").status == server.ask("/v2/health/ready").status == 200
        idle += [socket.create_connection(("127.0.0.1", server.http_port), 60) for _ in range(256)]
        time.sleep(0.3)
        with pytest.raises(OSError):  # closed unheard: files are not endless
            server.ask("/v2/health/live")
        for connection in idle:
            connection.close()
        time.sleep(0.3)
        assert server.relation(*SENTENCE).status == 200


def test_a_bad_request_fails_alone_in_its_batch(bundle_folder: Path) -> None:
    with ServerProcess(bundle_folder, "--models", "classifier", delay_s=0.3, grpc=False) as server:
        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(server.relation, *SENTENCE)
            time.sleep(0.1)
            words = [SENTENCE, ("crash", "it"), SENTENCE, SENTENCE]
            replies = list(pool.map(lambda tokens: server.relation(*tokens), words))
        assert first.result().status == 200
        assert [reply.status for reply in replies] == [200, 500, 200, 200]
        assert replies[1].document["error"] == "the model failed on this request; the server's log says why"
        assert server.ask("/v2/health/live").status == 200
        server.terminate()
        assert server.wait() == 0
        assert "a secret trace" in server.output()


@pytest.mark.parametrize("word", ["die", "lost"])
def test_a_dead_worker_or_a_lost_device_makes_it_not_live(bundle_folder: Path, word: str) -> None:
    with ServerProcess(bundle_folder, delay_s=0.0) as server:
        assert server.ask("/v2/health/live").status == 200
        reply = server.relation(word, "it")
        assert reply.status in (500, 503) and "secret" not in reply.document["error"]
        until_s = time.monotonic() + 30
        while server.ask("/v2/health/live").status == 200 and time.monotonic() < until_s:
            time.sleep(0.05)
        assert server.ask("/v2/health/live").document == {"live": False}
        assert server.ask("/v2/health/ready").status == 503
        assert server.metric("mi2rage_live") == 0
        assert server.relation(*SENTENCE).status == 503
        assert server.ask("/v1/images", {"prompt": "a"}).status == 200  # the other models still answer
        server.terminate()
        assert server.wait() == 0


def test_a_batch_that_never_ends_makes_it_not_live(bundle_folder: Path) -> None:
    # The warm-up takes the delay as well, before the watch begins.
    options = ("--models", "classifier", "--stall-s", "1", "--drain-s", "0")
    with ServerProcess(bundle_folder, *options, delay_s=5.0, grpc=False) as server:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.relation, *SENTENCE)
            time.sleep(3.5)
            assert server.ask("/v2/health/live").status == 503
            assert running.result().status == 200
        time.sleep(1.5)
        assert server.ask("/v2/health/live").status == 200


def test_sigterm_answers_what_was_taken(bundle_folder: Path) -> None:
    options = ("--models", "classifier", "--max-batch", "2", "--drain-s", "1.5")
    with ServerProcess(bundle_folder, *options, delay_s=0.4, grpc=False) as server, ThreadPoolExecutor(8) as pool:
        kept = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
        kept.request("GET", "/v2/health/ready")
        reply = kept.getresponse()
        assert reply.status == 200 and reply.getheader("Connection") != "close" and reply.read()
        waiting = [pool.submit(server.relation, *SENTENCE) for _ in range(8)]
        time.sleep(0.3)
        server.terminate()
        server.wait_for("stopping")
        kept.request("GET", "/v2/health/ready")  # the connection is still served, and then closed
        reply = kept.getresponse()
        assert reply.status == 503 and reply.getheader("Connection") == "close"
        assert [reply.result().status for reply in waiting] == [200] * 8
        assert server.wait() == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.http_port), timeout=5)
        assert server.output().splitlines()[-1] == "stopped"


def test_no_request_is_lost_when_it_is_stopped_under_load(bundle_folder: Path) -> None:
    outcomes: list[str] = []
    not_taken: list[str] = []

    def ask_on(server: ServerProcess) -> None:
        """Ask until the server refuses connections; a connection it has taken must be answered."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
            try:
                connection.connect()
            except OSError:
                return
            answers = 0
            try:
                body = json.dumps({"tokens": list(SENTENCE), "head": [0, 1], "tail": [2, 3]})
                while True:
                    connection.request("POST", "/v1/relations", body)
                    reply = connection.getresponse()
                    reply.read()
                    answers += 1
                    outcomes.append(str(reply.status))
                    if reply.getheader("Connection") == "close":
                        break
            except (OSError, http.client.HTTPException) as error:
                # A connection that the kernel took while the listening socket was closed never reached the server:
                # it is reset, which a client sees while it sends (broken pipe) or while it waits.
                reset = answers == 0 and isinstance(error, (ConnectionResetError, BrokenPipeError))
                (not_taken if reset else outcomes).append(type(error).__name__)
                return
            finally:
                connection.close()

    options = ("--models", "classifier", "--drain-s", "1.5")
    with ServerProcess(bundle_folder, *options, delay_s=0.01, grpc=False) as server:
        threads = [threading.Thread(target=ask_on, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        server.terminate()
        assert server.wait() == 0
        for thread in threads:
            thread.join(60)
    assert outcomes.count("200") > 50
    assert set(outcomes) == {"200"}, outcomes
    assert len(not_taken) <= len(threads), not_taken


def test_without_the_token_nothing_is_told(bundle_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with ServerProcess(bundle_folder, "--models", "classifier,captioner", "--token-file", str(file)) as server:
        assert server.ask("/v2/health/live").status == server.ask("/v2/health/ready").status == 200
        for given in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}):
            for path in ("/v2", "/metrics", "/openapi.json", "/nothing"):
                assert server.ask(path, headers=given).status == 401
            reply = server.relation(*SENTENCE, headers=given)
            assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in reply.body.decode()
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert server.relation(*SENTENCE, headers=right).status == 200
        assert server.ask("/v2", headers=right).status == 200

        pytest.importorskip("tritonclient")
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        client = triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        assert client.is_server_live() and client.is_server_ready()
        with pytest.raises(InferenceServerException, match="authorization"):
            client.get_model_metadata("classifier")
        metadata = client.get_model_metadata("classifier", headers={"authorization": f"Bearer {TOKEN}"})
        assert metadata.name == "classifier"


def test_grpc_says_what_is_too_much_and_too_late(bundle_folder: Path) -> None:
    pytest.importorskip("tritonclient")
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    options = ("--models", "classifier", "--max-batch", "1", "--max-queue", "1", "--max-wait-ms", "0")
    with ServerProcess(bundle_folder, *options, delay_s=0.8) as server, ThreadPoolExecutor(8) as pool:
        client = triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")

        def ask(parameters: dict[str, int] | None) -> str:
            inputs = [triton.InferInput("tokens", [1], "BYTES")]
            inputs += [triton.InferInput(name, [1, 2], "INT32") for name in ("head", "tail")]
            inputs[0].set_data_from_numpy(np.array([b'["tim", "in"]'], dtype=np.object_))
            inputs[1].set_data_from_numpy(np.array([[0, 1]], dtype=np.int32))
            inputs[2].set_data_from_numpy(np.array([[1, 2]], dtype=np.int32))
            try:
                client.infer("classifier", inputs, parameters=parameters)
            except InferenceServerException as error:
                return str(error.status())
            return "OK"

        first = pool.submit(ask, None)
        time.sleep(0.3)
        assert ask({"timeout_ms": 100}) == "StatusCode.DEADLINE_EXCEEDED"
        assert first.result() == "OK"
        outcomes = list(pool.map(ask, [None] * 8))
        assert set(outcomes) == {"OK", "StatusCode.RESOURCE_EXHAUSTED"}, outcomes


def test_slow_and_huge_heads_are_cut_off(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        sent = 0
        with pytest.raises(OSError):  # the server closes
            while sent < 2**24:
                connection.sendall(b"a" * 8192)
                sent += 8192
                time.sleep(0.001)
        assert sent < 2**22
    assert server.ask("/v2/health/live").status == 200
