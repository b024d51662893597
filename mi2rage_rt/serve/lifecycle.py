"""A server process from its first socket to its last answer."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from mi2rage_rt.bundle import Bundle
from mi2rage_rt.serve.auth import Token
from mi2rage_rt.serve.http_server import HttpServer, listening_socket, loop_factory
from mi2rage_rt.serve.options import ServiceOptions
from mi2rage_rt.serve.rest import make_app
from mi2rage_rt.serve.service import Service

__all__ = ["ServerOptions", "serve"]

logger = logging.getLogger(__name__)

_OTHER_FILES = 256
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a server listens, and how it ends.

    Attributes:
        host: address of this machine.
        port: of HTTP; 0 takes a free one.
        grpc_port: 0 takes a free one; None leaves gRPC out.
        token: what requests must show, or None.
        drain_s: after SIGTERM, how long requests are still taken, while readiness says no: balancers need a moment.
        grace_s: how long the requests taken may run after that.
        tell: gets each line about the server's state.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = 8081
    token: Token | None = None
    drain_s: float = 1.0
    grace_s: float = 25.0
    tell: Callable[[str], None] = print


def serve(
    folder: Path,
    options: ServerOptions,
    service: ServiceOptions,
    *,
    providers: list[str] | None = None,
    threads: int | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT, then answer what was taken, and return.

    Args:
        folder: the bundle.
        options: where, and how it ends.
        service: what; no models stand for all that the bundle has.
        providers, threads: see `Bundle.open`.

    Raises:
        InputError: the port is taken, or the bundle or an option cannot be used.
        EngineError: a graph cannot be loaded.
    """
    _allow_files(service.limits.max_connections)
    with listening_socket(options.host, options.port) as listener:
        bundle = Bundle.open(folder, providers=providers, threads=threads)
        chosen = dataclasses.replace(service, models=service.models or bundle.components)
        for model in chosen.models:
            chosen.batch_options(model)  # a wrong number is told before anything is loaded
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_Server(listener, Service(bundle, chosen), options).run())


def _allow_files(connections: int) -> None:
    """Raise this process's own limit of open files, often 1024, as far as connections over HTTP and gRPC need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _grpc_class() -> Any:
    """Import the KServe SDK, which takes seconds; and which reads the process's arguments as if they were its own."""
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        return importlib.import_module("mi2rage_rt.serve.grpc_service").GrpcServer
    finally:
        sys.argv = arguments


class _Server:
    def __init__(self, listener: socket.socket, service: Service, options: ServerOptions) -> None:
        self._listener = listener
        self._service = service
        self._options = options
        self._began_s = time.monotonic()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Listen, load, warm up, serve, drain."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        service, options = self._service, self._options
        http = HttpServer(make_app(service, options.token), service, options.grace_s)
        serving = asyncio.create_task(http.serve([self._listener]))
        grpc: Any = None
        try:
            host, port = self._listener.getsockname()[:2]
            options.tell(f"listening on http://{host}:{port}")
            loading = asyncio.to_thread(service.load)
            if options.grpc_port is None:
                await self._unless_stopped(loading)
            else:
                importing = asyncio.to_thread(_grpc_class)
                found = await self._unless_stopped(_both(importing, loading))
                if found is not None:
                    grpc = found(service, options.token)
                    bound = await grpc.start(options.host, options.grpc_port)
                    options.tell(f"listening on grpc://{options.host}:{bound}")
            if not self._stop.is_set():
                await self._unless_stopped(service.warm_up())
            if not self._stop.is_set():
                options.tell(f"ready after {time.monotonic() - self._began_s:.1f} s")
            await self._until_stopped(serving)
            if service.ready():
                service.draining = True
                options.tell("stopping: answering what was taken")
                await asyncio.sleep(options.drain_s)
        finally:
            service.draining = True
            http.should_exit = True
            ends: list[Coroutine[Any, Any, Any]] = [_quiet(serving)]
            if grpc is not None:
                ends.append(grpc.stop(options.grace_s))
            await asyncio.gather(*ends)
            await service.close()
        options.tell("stopped")

    def _on_signal(self) -> None:
        self._stop.set()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:  # a second signal ends the process at once
            loop.remove_signal_handler(number)
        # asyncio's runner would otherwise have left SIGINT ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def _unless_stopped(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The work's result; None where the server is stopped meanwhile, and the work given up."""
        doing = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((doing, stopped), return_when=asyncio.FIRST_COMPLETED)
            return await doing if doing.done() else None
        finally:
            doing.cancel()
            stopped.cancel()

    async def _until_stopped(self, serving: asyncio.Task[None]) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            stopped.cancel()


async def _both(first: Coroutine[Any, Any, Any], second: Coroutine[Any, Any, Any]) -> Any:
    """The first one's result when both are done."""
    results = await asyncio.gather(first, second)
    return results[0]


async def _quiet(serving: asyncio.Task[None]) -> None:
    await asyncio.wait((serving,))
    if not serving.cancelled() and serving.exception() is not None:
        logger.error("the HTTP server ended with an error", exc_info=serving.exception())
