"""Protocol V2 over gRPC, on the messages and the service of the KServe SDK."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as services

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt import __version__
from mi2rage_rt.serve import protocol_v2 as v2
from mi2rage_rt.serve import wire
from mi2rage_rt.serve.auth import Token
from mi2rage_rt.serve.refusals import RefusedError
from mi2rage_rt.serve.service import Service

__all__ = ["GrpcServer"]

logger = logging.getLogger(__name__)

_LONGEST_MESSAGE = 500
_OPEN_METHODS = frozenset(
    f"/{messages.DESCRIPTOR.services_by_name['GRPCInferenceService'].full_name}/{name}"
    for name in ("ServerLive", "ServerReady")
)
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_NUMBERS = {"INT32": "int_contents", "UINT64": "uint64_contents"}
_CONTENTS = {"BYTES": "bytes_contents", "FP32": "fp32_contents", **_NUMBERS}


class _Servicer(services.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers the calls; model load and unload stay unimplemented, for a client is not to change the server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ServerLiveResponse(live=self._service.live)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ServerReadyResponse(ready=self._service.ready())

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ServerMetadataResponse(name="mi2rage-rt", version=__version__, extensions=v2.EXTENSIONS)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._told(context, lambda: self._model_ready(request.name, request.version))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._told(context, lambda: self._model_metadata(request.name, request.version))

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        remaining_s = context.time_remaining()
        timeout_ms = None if remaining_s is None else max(remaining_s, 1e-6) * 1e3

        async def work() -> Any:
            self._check_model(request.model_name, request.model_version)
            return await self._infer(request, timeout_ms)

        return await self._told(context, lambda: self._answer(request.model_name, work))

    async def _answer(self, model: str, work: Callable[[], Awaitable[Any]]) -> Any:
        place = self._service.admission.enter(model, "grpc") if model in self._service.models else None
        try:
            return await self._service.answer(model, "grpc", work)
        finally:
            if place is not None:
                place.leave()

    async def _told(self, context: Any, work: Callable[[], Awaitable[Any]]) -> Any:
        """The work's result; what goes wrong becomes a status."""
        try:
            return await work()
        except RefusedError as refusal:
            trailers: tuple[tuple[str, str], ...] = ()
            if refusal.retry_after_s is not None:
                trailers = (("retry-after", str(max(1, math.ceil(refusal.retry_after_s)))),)
            await context.abort(_CODES[refusal.status], str(refusal)[:_LONGEST_MESSAGE], trailers)
        except Exception:
            logger.exception("a gRPC call failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says why")

    def _check_model(self, model: str, version: str) -> None:
        if model not in self._service.models or version not in ("", v2.VERSION):
            known = ", ".join(self._service.models)
            raise RefusedError(
                404, f"model {model[:60]!r}, version {version[:20]!r}: is not served; expected one of {known}"
            )

    async def _model_ready(self, model: str, version: str) -> Any:
        self._check_model(model, version)
        return messages.ModelReadyResponse(ready=self._service.ready(model))

    async def _model_metadata(self, model: str, version: str) -> Any:
        self._check_model(model, version)
        inputs, outputs = v2.metadata_tensors(model)
        return messages.ModelMetadataResponse(
            name=model, versions=[v2.VERSION], platform="onnxruntime", inputs=inputs, outputs=outputs
        )

    async def _infer(self, request: Any, timeout_ms: float | None) -> Any:
        model = request.model_name
        wanted = v2.wanted_outputs(model, [output.name for output in request.outputs])
        inputs = wire.rows_by_name(model, _tensors(request), self._service.limits)
        parameters = {name[:60]: _parameter(name, value) for name, value in request.parameters.items()}
        outputs = await v2.infer(self._service, model, inputs, parameters, timeout_ms)
        raw = bool(request.raw_input_contents)
        chosen = sorted((output for output in outputs if output.tensor.name in wanted), key=_place_in(wanted))
        return messages.ModelInferResponse(
            model_name=model,
            model_version=v2.VERSION,
            id=request.id,
            outputs=[_described(output, with_contents=not raw) for output in chosen],
            raw_output_contents=[output.raw() for output in chosen] if raw else [],
        )


def _place_in(names: Sequence[str]) -> Callable[[wire.Output], int]:
    return lambda output: names.index(output.tensor.name)


def _tensors(request: Any) -> list[tuple[str, str, Sequence[int], Sequence[Any]]]:
    """Name, datatype, shape and values of each input."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise DataError(f"{len(raws)} raw contents for {len(request.inputs)} inputs; expected one for each, or none")
    tensors: list[tuple[str, str, Sequence[int], Sequence[Any]]] = []
    for place, tensor in enumerate(request.inputs):
        name = tensor.name[:60]
        if raws:
            is_bytes = tensor.datatype == "BYTES"
            values = (
                wire.bytes_elements(name, raws[place]) if is_bytes else wire.numbers(name, tensor.datatype, raws[place])
            )
        else:
            field = _CONTENTS.get(tensor.datatype)
            values = [] if field is None else list(getattr(tensor.contents, field))
        tensors.append((tensor.name, tensor.datatype, list(tensor.shape), values))
    return tensors


def _parameter(name: str, value: Any) -> Any:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise InputError(
            f"parameter {name[:60]!r}: its value is of no kind that this protocol has; expected a whole number, or a "
            "number as text"
        )
    return getattr(value, kind)


def _described(output: wire.Output, *, with_contents: bool) -> Any:
    tensor = output.tensor
    described = messages.ModelInferResponse.InferOutputTensor(
        name=tensor.name, datatype=tensor.datatype, shape=output.shape
    )
    if with_contents:
        values = output.values if isinstance(output.values, list) else output.plain()
        getattr(described.contents, _CONTENTS[tensor.datatype]).extend(values)
    return described


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token, the probes' apart."""

    def __init__(self, token: Token) -> None:
        self._token = token

        async def refuse(request: Any, context: Any) -> Any:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "expected the metadata 'authorization: Bearer TOKEN' of this server"
            )

        self._refusing = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        given = dict(details.invocation_metadata or ()).get("authorization")
        if details.method in _OPEN_METHODS or self._token.fits(given):
            return await continuation(details)
        return self._refusing


class _MessageCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses bytes that are no message; gRPC itself would call that UNKNOWN, and log a trace."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        def read(content: bytes) -> Any:
            try:
                return handler.request_deserializer(content)
            except Exception as error:  # of protobuf, whose classes need not be known here
                return error

        async def answer(request: Any, context: Any) -> Any:
            if isinstance(request, Exception):
                wanted = "expected a message of the Open Inference Protocol V2; see whether the client's version fits"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are no message; {wanted}")
            try:
                return await handler.unary_unary(request, context)
            except NotImplementedError:  # KServe's own answer, past the log of what went wrong
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not load or unload models")

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)


class GrpcServer:
    """The service on one port.

    Args:
        service: what computes.
        token: what calls must show, or None.
    """

    def __init__(self, service: Service, token: Token | None) -> None:
        limits = service.limits
        self._server = grpc.aio.server(
            interceptors=(*(() if token is None else (_TokenCheck(token),)), _MessageCheck()),
            options=(
                ("grpc.max_receive_message_length", limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", limits.max_header_bytes),
                ("grpc.so_reuseport", 0),  # else two servers would share a port without a word
            ),
            maximum_concurrent_rpcs=limits.max_connections,
        )
        services.add_GRPCInferenceServiceServicer_to_server(_Servicer(service), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, where 0 asks for a free one.

        Raises:
            InputError: the port is taken, or the host unknown.
        """
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(where)
        except RuntimeError as error:
            raise InputError(f"{where}: gRPC cannot listen there; expected a free port; give another one") from error
        await self._server.start()
        return int(bound)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and wait for those that run."""
        await self._server.stop(grace_s)
