"""uvicorn with bounds that it lacks: on the size of headers, and on the time that they take to come."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mi2rage_engines.errors import InputError
from mi2rage_rt.serve.limits import Limits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["HttpServer", "listening_socket", "loop_factory"]

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_BACKLOG = 2048
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
    except OSError as error:
        raise InputError(f"{host}: {error.strerror or error}; expected an address of this machine") from error
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


def _protocol(limits: Limits) -> type[HttpToolsProtocol]:
    class Bounded(HttpToolsProtocol):
        """Closes connections whose headers grow too long, or do not come."""

        _head_bytes = 0
        _in_body = False
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._in_body:
                self._head_bytes += len(data)
                self._start_timer()
            super().data_received(data)
            if self._head_bytes > limits.max_header_bytes and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._head_bytes, self._in_body = 0, True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_body = False
            super().on_message_complete()

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
        app: the application.
        limits: of headers and connections.
        grace_s: how long requests may still run at the end.
    """

    def __init__(self, app: ASGIApp, limits: Limits, grace_s: float) -> None:
        protocol: Any = _protocol(limits)
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
                limit_concurrency=limits.max_connections,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield
