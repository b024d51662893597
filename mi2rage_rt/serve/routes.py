"""Routes, and the OpenAPI page about them.

Starlette answers the requests, for FastAPI takes as long for one as all else here together; FastAPI writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mi2rage_rt import __version__
from mi2rage_rt.serve.plain import ErrorAnswer
from mi2rage_rt.serve.protocol_v2 import VERSION

__all__ = [
    "COMPUTE",
    "COMPUTE_PLAIN",
    "LENGTH_HEADER",
    "READ",
    "READ_MODEL",
    "SERVER_NAME",
    "TIMEOUT_HEADER",
    "Handler",
    "Routes",
    "schema_of",
]

SERVER_NAME = "mi2rage-rt"

Handler = Callable[[Request], Awaitable[Response]]

_STATUSES = {
    400: "the request is wrong; the message says what was expected",
    401: "the token is missing or wrong",
    404: "no such model, or version",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is compressed",
    429: "too many requests wait; Retry-After says when to try again",
    500: "the model failed; the server's log says why",
    503: "starting, stopping, overrun with connections, or a model is dead",
    504: "the time was over before the request was begun; it was dropped",
}
READ = (401, 413, 415, 500, 503)
READ_MODEL = (*READ, 404)
COMPUTE = tuple(_STATUSES)
COMPUTE_PLAIN = tuple(status for status in _STATUSES if status != 404)

TIMEOUT_HEADER = {
    "name": "X-Timeout-Ms",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "milliseconds in which the request must have been begun",
}
LENGTH_HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 0},
    "description": "length of the body's JSON part, where binary tensors follow it",
}


class Routes:
    """Handlers, and what the page says about them; `models` are those that paths may name."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = models
        self._routes: list[Route] = []
        self._documented = FastAPI(
            title=SERVER_NAME,
            version=__version__,
            description="Relation extraction from text and images, captions, and images from text.",
        )

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        summary: str,
        statuses: Sequence[int],
        *,
        body: Mapping[str, Any] | None = None,
        headers: Sequence[dict[str, Any]] = (),
        answer: type[BaseModel] | None = None,
        content_types: Sequence[str] = (),
    ) -> None:
        """A route.

        Args:
            method: `GET` or `POST`.
            path: with names of its parts in braces.
            handler: answers it.
            summary: one line.
            statuses: that it may give, 200 apart.
            body: schema by content type.
            headers: that it reads, as OpenAPI describes parameters.
            answer: what a 200 holds, where that is a JSON document of ours.
            content_types: of a 200, JSON apart.
        """
        self._routes.append(Route(path, handler, methods=[method]))
        parts = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        known = {"model": list(self._models), "version": [VERSION]}
        named = [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string", "enum": known[part]}}
            for part in parts
        ]
        extra: dict[str, Any] = {"parameters": [*named, *headers]}
        if body is not None:
            content = {kind: {"schema": schema} for kind, schema in body.items()}
            extra["requestBody"] = {"required": True, "content": content}
        responses: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorAnswer, "description": _STATUSES[status]} for status in sorted(statuses)
        }
        files = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in content_types}
        responses[200] = {"content": files if "text/plain" in files else {"application/json": {}, **files}}
        if answer is not None:
            responses[200]["model"] = answer
        self._documented.add_api_route(
            path, handler, methods=[method], summary=summary, responses=responses, openapi_extra=extra,
            response_model=None, operation_id=f"{method.lower()}{path.replace('/', '_').translate(_NO_BRACES)}",
        )  # fmt: skip

    def served(self) -> list[Route]:
        """All routes, those of the page among them."""
        text = json.dumps(self._documented.openapi())

        async def page(_: Request) -> Response:
            return Response(text, media_type="application/json")

        async def browser(_: Request) -> Response:
            return get_swagger_ui_html(openapi_url="/openapi.json", title=SERVER_NAME)

        return [*self._routes, Route("/openapi.json", page), Route("/docs", browser)]


_NO_BRACES = str.maketrans("", "", "{}")


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema with everything in one place: OpenAPI resolves references elsewhere."""
    schema = model.model_json_schema()
    inlined: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return inlined


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in node.items()}
    return [_inlined(value, definitions) for value in node] if isinstance(node, list) else node
