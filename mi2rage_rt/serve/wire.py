"""The tensors of protocol V2: their values in binary and in JSON, and the rows that they make."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mi2rage_engines.errors import DataError
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.tensors import MODELS, ServiceTensor

__all__ = ["Inputs", "Output", "bytes_elements", "flat_values", "numbers", "rows_by_name"]

_DTYPES = {"INT32": "<i4", "UINT64": "<u8", "FP32": "<f4"}
_RANGES = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1)}

Inputs = Mapping[str, Sequence[Any]]
"""By name, one entry a row: bytes for BYTES, a list of whole numbers for the others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One tensor of an answer; `values` is a flat list of bytes, or an array."""

    tensor: ServiceTensor
    shape: tuple[int, ...]
    values: Sequence[bytes] | np.ndarray[Any, Any]

    def raw(self) -> bytes:
        """As the binary form has it."""
        if isinstance(self.values, np.ndarray):
            return self.values.astype(_DTYPES[self.tensor.datatype], copy=False).tobytes()
        return b"".join(struct.pack("<I", len(value)) + value for value in self.values)

    def plain(self) -> list[Any]:
        """As JSON has it."""
        if isinstance(self.values, np.ndarray):
            return list(self.values.ravel().tolist())
        if self.tensor.file:
            return [base64.b64encode(value).decode("ascii") for value in self.values]
        return [value.decode("utf-8") for value in self.values]


def rows_by_name(
    model: str, tensors: Sequence[tuple[str, str, Sequence[int], Sequence[Any]]], limits: Limits
) -> Inputs:
    """The rows of a request's tensors, after a look at names, datatypes and shapes.

    Args:
        model: its name.
        tensors: name, datatype, shape, and values one after the other.
        limits: of rows.

    Raises:
        DataError: a tensor is missing, unknown, given twice, or of another datatype or shape.
    """
    table = {tensor.name: tensor for tensor in MODELS[model].inputs}
    found: dict[str, list[Any]] = {}
    rows: int | None = None
    for name, datatype, shape, values in tensors:
        tensor = table.get(name)
        if tensor is None or name in found:
            fault = "given twice" if tensor else f"no input of the {model}"
            raise DataError(f"input {name[:60]!r}: {fault}; expected {', '.join(table)}, once each")
        if datatype != tensor.datatype:
            raise DataError(f"input {name}: of datatype {datatype[:20]}; expected {tensor.datatype}; send it so")
        rows = _row_count(tensor, shape, rows, limits)
        width = tensor.shape[0]
        if len(values) != rows * width:
            raise DataError(f"input {name}: {len(values)} values for a shape of {rows * width}; expected one for each")
        if datatype == "BYTES":
            found[name] = list(values)
        else:
            found[name] = [values[row * width : (row + 1) * width] for row in range(rows)]
    missing = [tensor.name for tensor in table.values() if not tensor.optional and tensor.name not in found]
    if missing:
        raise DataError(f"inputs: {', '.join(missing)} missing; expected {', '.join(table)}; add what is missing")
    return found


def _row_count(tensor: ServiceTensor, shape: Sequence[int], rows: int | None, limits: Limits) -> int:
    fits = len(shape) >= 1 and (tuple(shape[1:]) == tensor.shape or (len(shape) == 1 and tensor.shape == (1,)))
    if not fits or not 1 <= shape[0] <= limits.max_rows:
        expected = ", ".join(map(str, tensor.shape))
        raise DataError(
            f"input {tensor.name}: of shape {list(shape)[:8]}; expected [B, {expected}] with B from 1 to "
            f"{limits.max_rows}; send it so"
        )
    if rows is not None and shape[0] != rows:
        raise DataError(f"input {tensor.name}: {shape[0]} rows, but {rows} before it; expected as many in all inputs")
    return shape[0]


def bytes_elements(name: str, raw: bytes) -> list[bytes]:
    """The elements of a BYTES tensor's binary form: each behind its length, 4 bytes, little-endian.

    Raises:
        DataError: lengths and bytes do not fit.
    """
    elements, place = [], 0
    while place < len(raw):
        length = int.from_bytes(raw[place : place + 4], "little")
        element = raw[place + 4 : place + 4 + length]
        if len(raw) - place < 4 or len(element) != length:
            raise DataError(
                f"input {name}: an element of {length} bytes, but {max(len(raw) - place - 4, 0)} are left; expected "
                "each element behind its length, 4 bytes little-endian"
            )
        elements.append(element)
        place += 4 + length
    return elements


def numbers(name: str, datatype: str, raw: bytes) -> list[int]:
    """The whole numbers of a binary tensor.

    Raises:
        DataError: of an unknown datatype, or bytes are left over.
    """
    dtype = _DTYPES.get(datatype) if datatype in _RANGES else None
    if dtype is None or len(raw) % np.dtype(dtype).itemsize:
        raise DataError(f"input {name}: {len(raw)} bytes of {datatype[:20]}; expected whole {' or '.join(_RANGES)}")
    return list(np.frombuffer(raw, dtype=dtype).tolist())


def flat_values(name: str, datatype: str, data: Sequence[Any], limits: Limits, *, file: bool = False) -> list[Any]:
    """The values of a tensor that came as JSON, nested or not.

    Raises:
        DataError: too many, or of the wrong kind.
    """
    flat: list[Any] = []
    waiting = [iter(data)]
    while waiting:
        value = next(waiting[-1], waiting)
        if value is waiting:
            waiting.pop()
        elif isinstance(value, list):
            waiting.append(iter(value))
        else:
            flat.append(value)
        if len(flat) > 2 * limits.max_rows or len(waiting) > 8:
            raise DataError(f"input {name}: too many values, or nested too deeply; expected [B] or [B, n]")
    return [_value(name, datatype, value, file) for value in flat]


def _value(name: str, datatype: str, value: Any, file: bool) -> Any:
    if datatype == "BYTES" and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True) if file else value.encode("utf-8")
        except (binascii.Error, ValueError) as error:
            kind = "base64" if file else "valid Unicode"
            raise DataError(f"input {name}: {error}; expected {kind}; encode it again") from error
    low, high = _RANGES.get(datatype, (0, -1))
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    kind = "text" if datatype == "BYTES" else f"whole numbers from {low} to {high}"
    raise DataError(f"input {name}: {str(value)[:40]!r}; expected {kind} ({datatype[:20]}); send it so")
