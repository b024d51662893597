"""Requests and answers of protocol V2 over HTTP: JSON, with the binary tensors behind it.

The binary form is Triton's "binary tensor data extension".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mi2rage_engines.errors import DataError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.protocol_v2 import VERSION, wanted_outputs
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.serve.wire import Inputs, Output, bytes_elements, flat_values, numbers, rows_by_name

__all__ = ["Answer", "HttpRequest", "read_http", "transport_parameters", "write_http"]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A body with the length of its JSON part, None where all of it is JSON."""

    body: bytes
    json_bytes: int | None


class _Part(BaseModel):
    # Not forbidden: the protocol lets clients add what servers may ignore, and KServe's own does.
    model_config = ConfigDict(extra="ignore", strict=True)


_Value = str | int | bool | Annotated[float, Field(allow_inf_nan=False)]


class _InputTensor(_Part):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, _Value] = {}
    data: list[Any] | None = None


class _OutputTensor(_Part):
    name: str
    parameters: dict[str, _Value] = {}


class HttpRequest(_Part):
    """The JSON part of a request."""

    id: str | None = None
    parameters: dict[str, _Value] = {}
    inputs: list[_InputTensor]
    outputs: list[_OutputTensor] = []


def read_http(model: str, body: bytes, json_bytes: str | None, limits: Limits) -> tuple[HttpRequest, Inputs]:
    """A request's JSON part, and its rows.

    Args:
        model: its name.
        body: JSON, with the binary tensors behind it.
        json_bytes: the header Inference-Header-Content-Length.
        limits: of rows.

    Raises:
        DataError: it does not follow the protocol.
    """
    length = len(body)
    if json_bytes is not None:
        length = int(json_bytes) if json_bytes.isdecimal() and len(json_bytes) < 12 else -1
        if not 0 <= length <= len(body):
            raise DataError(
                f"Inference-Header-Content-Length {json_bytes[:40]!r}: expected the length of the JSON part, 0 to "
                f"{len(body)}; send it so"
            )
    try:
        request = HttpRequest.model_validate_json(body[:length])
    except ValidationError as error:
        raise DataError(f"body: {first_problem(error)}; expected an inference request of protocol V2") from error
    files = {tensor.name for tensor in MODELS[model].inputs if tensor.file}
    tensors, place = [], length
    for tensor in request.inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            if tensor.data is None:
                raise DataError(f"input {tensor.name[:60]!r}: has no data; expected data, or binary_data_size")
            values = flat_values(tensor.name[:60], tensor.datatype, tensor.data, limits, file=tensor.name in files)
        else:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - place:
                raise DataError(
                    f"input {tensor.name[:60]!r}: binary_data_size {str(size)[:20]}, with {len(body) - place} bytes "
                    "left; expected a size that fits"
                )
            raw = body[place : place + size]
            place += size
            values = _binary_values(tensor.name[:60], tensor.datatype, raw)
        tensors.append((tensor.name, tensor.datatype, tensor.shape, values))
    if place != len(body):
        raise DataError(f"body: {len(body) - place} bytes are left over; expected none; check each binary_data_size")
    return request, rows_by_name(model, tensors, limits)


def _binary_values(name: str, datatype: str, raw: bytes) -> list[Any]:
    return list(bytes_elements(name, raw)) if datatype == "BYTES" else list(numbers(name, datatype, raw))


def transport_parameters(request: HttpRequest) -> tuple[bool, dict[str, Any]]:
    """Whether outputs are binary unless they say otherwise; and the parameters that are left for the model."""
    left = dict(request.parameters)
    return left.pop("binary_data_output", False) is True, left


def write_http(model: str, request: HttpRequest, outputs: Sequence[Output]) -> Answer:
    """The answer in the form that the request asks for.

    Raises:
        InputError: it asks for an output that is not there.
    """
    binary, _ = transport_parameters(request)
    chosen = {output.name: output.parameters.get("binary_data", binary) is True for output in request.outputs}
    names = wanted_outputs(model, [output.name for output in request.outputs])
    by_name = {output.tensor.name: output for output in outputs}
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name in names:
        output = by_name[name]
        entry: dict[str, Any] = {"name": name, "datatype": output.tensor.datatype, "shape": list(output.shape)}
        if chosen.get(name, binary):
            parts.append(output.raw())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = output.plain()
        described.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": described}
    if request.id is not None:
        document["id"] = request.id
    text = json.dumps(document, ensure_ascii=False).encode("utf-8")
    return Answer(b"".join([text, *parts]), len(text) if parts else None)
