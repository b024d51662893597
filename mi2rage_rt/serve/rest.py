"""The HTTP routes: protocol V2, the plain ones, health and metrics."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mi2rage_rt import __version__
from mi2rage_rt.classifier import softmax
from mi2rage_rt.serve import http_form, plain
from mi2rage_rt.serve import protocol_v2 as v2
from mi2rage_rt.serve.auth import Token
from mi2rage_rt.serve.guard import Guard, error_body, error_headers
from mi2rage_rt.serve.metrics import CONTENT_TYPE
from mi2rage_rt.serve.refusals import RefusedError
from mi2rage_rt.serve.routes import (
    COMPUTE,
    COMPUTE_PLAIN,
    LENGTH_HEADER,
    READ,
    READ_MODEL,
    SERVER_NAME,
    TIMEOUT_HEADER,
    Handler,
    Routes,
    schema_of,
)
from mi2rage_rt.serve.rows import caption_options, checked_parameters, generate_options, prompt_row
from mi2rage_rt.serve.service import Service
from mi2rage_rt.serve.tensors import MODELS

__all__ = ["make_app"]

_JSON_BYTES = "inference-header-content-length"
_TIMEOUT = "x-timeout-ms"


def make_app(service: Service, token: Token | None) -> Guard:
    """The application: the routes, behind their guard.

    Args:
        service: what computes; it may still be loading.
        token: what requests must show, or None.
    """
    routes = Routes(service.models)
    # The first that fits answers: those that have to be fast come first.
    for model, add in (("classifier", _add_relations), ("captioner", _add_captions), ("generator", _add_images)):
        if model in service.models:
            add(routes, service)
    _add_infer(routes, service)
    _add_state(routes, service)
    app = Starlette(routes=routes.served(), exception_handlers={RefusedError: _refused, HTTPException: _no_route})
    app.router.redirect_slashes = False
    return Guard(app, service, token, _targets(service))


def _targets(service: Service) -> dict[str, tuple[str, str]]:
    """Model and protocol by path, of all requests that compute."""
    plain_paths = {"classifier": "/v1/relations", "captioner": "/v1/captions", "generator": "/v1/images"}
    targets = {plain_paths[model]: (model, "json") for model in service.models}
    for path in _model_paths():
        for model in service.models:
            targets[path.format(model=model, version=v2.VERSION) + "/infer"] = (model, "http")
    return targets


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return Response(error_body(str(error)), error.status, error_headers(error), "application/json")


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(error_body(str(error.detail)), error.status_code, error.headers, "application/json")


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _header_ms(request: Request) -> float | None:
    header = request.headers.get(_TIMEOUT)
    return None if header is None else v2.milliseconds("X-Timeout-Ms", header)


# -- state -----------------------------------------------------------------------------------------


def _add_state(routes: Routes, service: Service) -> None:
    def state(name: str, good: bool) -> Response:
        return JSONResponse({name: good}, 200 if good else 503)

    async def live(_: Request) -> Response:
        return state("live", service.live)

    async def ready(_: Request) -> Response:
        return state("ready", service.ready())

    async def server(_: Request) -> Response:
        return JSONResponse({"name": SERVER_NAME, "version": __version__, "extensions": list(v2.EXTENSIONS)})

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    async def model_ready(request: Request) -> Response:
        model = _checked_model(service, request)
        good = service.ready(model)
        return JSONResponse({"name": model, "ready": good}, 200 if good else 503)

    async def model_metadata(request: Request) -> Response:
        model = _checked_model(service, request)
        inputs, outputs = v2.metadata_tensors(model)
        named = {"name": model, "versions": [v2.VERSION], "platform": "onnxruntime"}
        return JSONResponse({**named, "inputs": inputs, "outputs": outputs})

    routes.add("GET", "/v2/health/live", live, "Whether every model works; needs no token", READ)
    routes.add("GET", "/v2/health/ready", ready, "Whether every model takes requests; needs no token", READ)
    for path in ("/v2", "/v2/"):  # the protocol's text has the one, its OpenAPI page the other
        routes.add("GET", path, server, "The server's name, version and extensions", READ)
    routes.add("GET", "/metrics", metrics, "Metrics for Prometheus", READ, content_types=("text/plain",))
    for path in _model_paths():
        routes.add("GET", f"{path}/ready", model_ready, "Whether a model takes requests", READ_MODEL)
        routes.add("GET", path, model_metadata, "A model's tensors", READ_MODEL)


def _model_paths() -> tuple[str, str]:
    return "/v2/models/{model}", "/v2/models/{model}/versions/{version}"


def _checked_model(service: Service, request: Request) -> str:
    """The model that the path names.

    Raises:
        RefusedError: it is not served.
    """
    model = str(request.path_params["model"])
    version = str(request.path_params.get("version", v2.VERSION))
    if model not in service.models or version != v2.VERSION:
        raise RefusedError(
            404,
            f"model {model[:60]!r}, version {version[:20]!r}: is not served here; expected version {v2.VERSION} of one "
            f"of {', '.join(service.models)}",
        )
    return model


# -- protocol V2 -----------------------------------------------------------------------------------


def _add_infer(routes: Routes, service: Service) -> None:
    async def infer(request: Request) -> Response:
        async def work() -> Response:
            model = _checked_model(service, request)
            header = request.headers.get(_JSON_BYTES)
            parsed, inputs = http_form.read_http(model, await request.body(), header, service.limits)
            v2.wanted_outputs(model, [output.name for output in parsed.outputs])
            _, parameters = http_form.transport_parameters(parsed)
            outputs = await v2.infer(service, model, inputs, parameters, _header_ms(request))
            answer = http_form.write_http(model, parsed, outputs)
            if answer.json_bytes is None:
                return Response(answer.body, media_type="application/json")
            length = {_JSON_BYTES: str(answer.json_bytes)}
            return Response(answer.body, headers=length, media_type="application/octet-stream")

        return await service.answer(str(request.path_params["model"]), "http", work)

    body = {
        "application/json": schema_of(http_form.HttpRequest),
        "application/octet-stream": {"type": "string", "format": "binary"},
    }
    for path in _model_paths():
        routes.add(
            "POST",
            f"{path}/infer",
            infer,
            "Compute rows of a model",
            COMPUTE,
            body=body,
            headers=(TIMEOUT_HEADER, LENGTH_HEADER),
            content_types=("application/octet-stream",),
        )


# -- plain routes ----------------------------------------------------------------------------------


def _add_plain(
    routes: Routes,
    path: str,
    handler: Handler,
    kind: type[BaseModel],
    answer: type[BaseModel],
    *,
    form: bool,
    content_types: Sequence[str] = (),
) -> None:
    schema = schema_of(kind)
    body = {"application/json": schema}
    if form:
        body["multipart/form-data"] = plain.form_schema(schema)
    routes.add(
        "POST",
        path,
        handler,
        (kind.__doc__ or "").strip(),
        COMPUTE_PLAIN,
        body=body,
        headers=(TIMEOUT_HEADER,),
        answer=answer,
        content_types=content_types,
    )


def _add_relations(routes: Routes, service: Service) -> None:
    async def relations(request: Request) -> Response:
        async def work() -> Response:
            document, image = await plain.read_plain(request, plain.RelationRequest)
            row = plain.relation_row_from_request(document, image, service.limits)
            time_ms = service.timeout_ms(document.timeout_ms, _header_ms(request))
            shares = softmax(await service.classify([row], time_ms))[0]
            assert service.classifier is not None
            labels, sample = service.classifier.model.labels, row.sample
            answer = plain.RelationAnswer(
                relation=labels[int(shares.argmax())],
                probability=float(shares.max()),
                probabilities=dict(zip(labels, shares.tolist(), strict=True)),
                head=sample.mention(sample.head),
                tail=sample.mention(sample.tail),
            )
            return _json(answer)

        return await service.answer("classifier", "json", work)

    _add_plain(routes, "/v1/relations", relations, plain.RelationRequest, plain.RelationAnswer, form=True)


def _add_captions(routes: Routes, service: Service) -> None:
    names = tuple(parameter.name for parameter in MODELS["captioner"].parameters)

    async def captions(request: Request) -> Response:
        async def work() -> Response:
            document, image = await plain.read_plain(request, plain.CaptionRequest)
            row = plain.caption_row_from_request(document, image, service.limits)
            given = checked_parameters("captioner", plain.model_parameters(document, names))
            assert service.captioner is not None
            options = caption_options(service.captioner.model.options, given, service.limits)
            time_ms = service.timeout_ms(document.timeout_ms, _header_ms(request))
            return _json(plain.CaptionAnswer(caption=(await service.caption([row], options, time_ms))[0]))

        return await service.answer("captioner", "json", work)

    _add_plain(routes, "/v1/captions", captions, plain.CaptionRequest, plain.CaptionAnswer, form=True)


def _add_images(routes: Routes, service: Service) -> None:
    names = tuple(parameter.name for parameter in MODELS["generator"].parameters)

    async def images(request: Request) -> Response:
        async def work() -> Response:
            document, _ = await plain.read_plain(request, plain.ImageRequest)
            given = checked_parameters("generator", plain.model_parameters(document, names))
            assert service.generator is not None
            model = service.generator.model
            size = (model.spec.height, model.spec.width)
            options = generate_options(model.options, given, size, service.limits)
            row = prompt_row(document.prompt, document.seed, service.limits)
            time_ms = service.timeout_ms(document.timeout_ms, _header_ms(request))
            png = (await service.generate([row], options, time_ms))[0]
            if "image/png" in request.headers.get("accept", ""):
                return Response(png, media_type="image/png")
            return _json(plain.ImageAnswer(image=base64.b64encode(png).decode("ascii"), seed=row.seed))

        return await service.answer("generator", "json", work)

    png = ("image/png",)
    _add_plain(routes, "/v1/images", images, plain.ImageRequest, plain.ImageAnswer, form=False, content_types=png)
