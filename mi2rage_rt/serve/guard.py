"""Before a request reaches a route: token, body size and time, disconnects; after it: errors without traces."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from mi2rage_rt.serve.refusals import RefusedError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mi2rage_rt.serve.admission import Place
    from mi2rage_rt.serve.auth import Token
    from mi2rage_rt.serve.service import Service

__all__ = ["OPEN_PATHS", "PLACE", "Guard", "error_body", "error_headers"]

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""What needs no token: probes cannot keep secrets."""

PLACE = "mi2rage_rt.place"
"""In a request's state: the `Place` that a server got for it before it called the application."""

_LONGEST_MESSAGE = 500


def error_body(message: str) -> bytes:
    """What every refusal says: `{"error": ...}`."""
    return json.dumps({"error": message[:_LONGEST_MESSAGE]}).encode("ascii")


def error_headers(refusal: RefusedError) -> dict[str, str]:
    """Retry-After in whole seconds, and what a 401 has to say."""
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


class Guard:
    """An ASGI application around another.

    Args:
        app: what answers; it finds the whole body there already.
        service: for its limits, and whether it is being stopped.
        token: what requests must show, or None.
        targets: model and protocol by path, of all requests that compute.
    """

    def __init__(
        self, app: ASGIApp, service: Service, token: Token | None, targets: Mapping[str, tuple[str, str]]
    ) -> None:
        self._app = app
        self._service = service
        self._token = token
        self._targets = targets

    def enter(self, method: str, path: str) -> Place | None:
        """Let a request in by its first line; None where it computes nothing. Raises what `Admission.enter` does."""
        target = self._targets.get(path) if method == "POST" else None
        return None if target is None else self._service.admission.enter(*target)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        begun = False
        place: Place | None = scope.get("state", {}).get(PLACE)

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if place is not None:
                place.leave()  # it is computed: who reads slowly keeps nobody out
            if message["type"] == "http.response.start" and self._service.draining:
                # The client's next request goes to a server that stays.
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            self._check_head(scope)
            if place is None:
                place = self.enter(scope["method"], scope["path"])
            body = await self._body(scope, receive, place)
            await self._run(scope, body, receive, answer)
        except ClientDisconnect:
            return
        except RefusedError as refusal:
            await _refuse(refusal, scope, answer)
        except Exception:
            logger.exception("%r %r failed", scope["method"], scope["path"][:200])
            if begun:
                raise
            await _refuse(RefusedError(500, "the server failed on this request; its log says why"), scope, answer)
        finally:
            if place is not None:
                place.leave()

    def _check_head(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if (
            self._token is not None
            and scope["path"] not in OPEN_PATHS
            and not self._token.fits(headers.get(b"authorization"))
        ):
            raise RefusedError(401, "expected the header 'Authorization: Bearer TOKEN' with this server's token")
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise RefusedError(
                415, f"a body with Content-Encoding {encoding[:20]!r}; expected none; send it uncompressed"
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._service.limits.max_body_bytes:
            raise self._too_large(length[:20].decode("latin-1"))

    def _too_large(self, size: str) -> RefusedError:
        most = self._service.limits.max_body_bytes
        return RefusedError(
            413, f"a body of {size} bytes; expected at most {most}; send less at once, or smaller images"
        )

    async def _body(self, scope: Scope, receive: Receive, place: Place | None) -> bytes:
        """All of it; the request holds its place from then on."""
        if scope["method"] in ("GET", "HEAD"):
            return b""
        limits = self._service.limits
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.max_body_bytes:
                        raise self._too_large(f"more than {limits.max_body_bytes}")
                    if not message.get("more_body"):
                        break
                    if place is not None:
                        place.leave()  # else a few slow senders would keep all others out
        except TimeoutError as error:
            message_ = f"the body was not there within {limits.body_timeout_s:.0f} s; send it faster, or less"
            raise RefusedError(408, message_) from error
        if place is not None:
            place.enter()
        return b"".join(parts)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: Send) -> None:
        """The application's answer; given up where the client goes away, so that nothing is computed in vain."""
        given = False

        async def whole_body() -> Message:
            nonlocal given
            if given:
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, whole_body, answer)
            return
        work = asyncio.ensure_future(self._app(scope, whole_body, answer))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            gone.cancel()
            work.cancel()


async def _refuse(refusal: RefusedError, scope: Scope, send: Send) -> None:
    body = error_body(str(refusal))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(refusal)}
    short = refusal.status in (429, 503) and any(name == b"content-length" for name, _ in scope["headers"])
    if scope["method"] not in ("GET", "HEAD") and not short:
        headers["connection"] = "close"  # else the rest of the body would be read, however long it is
    encoded = [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
