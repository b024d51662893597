"""uvicorn with bounds that it lacks: on headers' size and time, on connections, and on requests by their first line."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mi2rage_engines.errors import InputError
from mi2rage_rt.serve.guard import OPEN_PATHS, PLACE, error_body, error_headers
from mi2rage_rt.serve.refusals import RefusedError

if TYPE_CHECKING:
    from mi2rage_rt.serve.admission import Place
    from mi2rage_rt.serve.guard import Guard
    from mi2rage_rt.serve.service import Service

__all__ = ["HttpServer", "listening_socket", "loop_factory"]

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_BACKLOG = 2048
_SPARE_CONNECTIONS = 256
"""Beyond the bound these are still answered, with 503, but for the probes; more are closed unheard."""
_TOO_MANY = RefusedError(503, "too many connections are open; try again, or ask another server", 1.0)
_KEEP_ALIVE_S = 65
"""Longer than the 60 s of common proxies, which otherwise meet closed connections."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        InputError: the port is taken, or the host unknown.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}: {reason}; expected an address of this machine; give one with --host") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise InputError(
            f"{host}:{port}: cannot listen there ({error.strerror or error}); expected a free port of this machine; "
            "give another one with --port"
        ) from error
    bound.setblocking(False)
    return bound


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the fastest event loop that is installed."""
    return uvicorn.Config("", loop="auto").get_loop_factory()


def _answer(refusal: RefusedError, *, keep: bool) -> bytes:
    body = error_body(str(refusal))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(refusal)}
    if not keep:
        headers["connection"] = "close"
    lines = [
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _protocol(service: Service, enter: Callable[[str, str], Place | None]) -> type[HttpToolsProtocol]:
    limits = service.limits

    class Bounded(HttpToolsProtocol):
        """Closes connections whose headers grow too long, or do not come; and answers what is not let in by itself.

        Such an answer costs a fraction of one that goes through the application; see `Admission`.
        """

        _head_bytes = 0
        _in_body = False
        _turned_away = False
        _place: Place | None = None
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections + _SPARE_CONNECTIONS:
                transport.abort()
            else:
                self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._in_body:
                self._head_bytes += len(data)
                self._start_timer()
            super().data_received(data)
            if self._in_body and not self._turned_away and self.cycle is not None and self.cycle.response_complete:
                self._start_timer()  # for the rest of a body that nobody reads
            if self._head_bytes > limits.max_header_bytes and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()
            if self._place is not None:  # its body is still coming, and may come slowly: the guard lets it in again
                self._place.leave()
                self._place = None

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._unset_keepalive_if_required()
            self._head_bytes, self._in_body = 0, True
            if self.cycle is not None and not self.cycle.response_complete:  # pipelined: it has to wait its turn
                super().on_headers_complete()
                return
            path = self.url.partition(b"?")[0].decode("latin-1")
            if len(self.connections) > limits.max_connections and path not in OPEN_PATHS:
                self._turn_away(_TOO_MANY, keep=False)
                return
            try:
                place = enter(self.parser.get_method().decode("ascii"), path)
            except RefusedError as refusal:
                self._turn_away(refusal, keep=not service.draining)
                return
            self.scope["state"][PLACE] = self._place = place
            try:
                super().on_headers_complete()
            except BaseException:
                if place is not None:
                    place.leave()
                raise

        def on_body(self, body: bytes) -> None:
            if not self._turned_away:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body, self._place = False, None
            if not self._turned_away and not self.cycle.response_complete:
                super().on_message_complete()
                return
            self._turned_away = False
            self._stop_timer()
            if not self.transport.is_closing():
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def _turn_away(self, refusal: RefusedError, *, keep: bool) -> None:
            """Answer at once. The connection is kept, if it may be, where the request says how long its body is."""
            known = any(name == b"content-length" for name, _ in self.headers)
            keep = keep and known and not self.expect_100_continue and self.parser.should_keep_alive()
            self._turned_away = True
            if self.flow.write_paused:  # it does not read its answers
                self.transport.abort()
                return
            self.transport.write(_answer(refusal, keep=keep))
            if keep:
                self._start_timer()  # for the rest of the body, which is not read by anyone
            else:
                self.transport.close()

        def _start_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(limits.body_timeout_s, self._close_slow)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_slow(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Bounded


class HttpServer(uvicorn.Server):
    """Serves an application on a socket, until `should_exit`; signals are the caller's.

    Args:
        app: the application, which says who comes in.
        service: for its limits, and whether it is being stopped.
        grace_s: how long requests may still run at the end.
    """

    def __init__(self, app: Guard, service: Service, grace_s: float) -> None:
        protocol: Any = _protocol(service, app.enter)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield
