"""From a DLPack capsule to NumPy, without PyTorch or CuPy: what lies on a GPU is copied by the CUDA driver."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import numpy as np

from mi2rage_engines.engine import Array
from mi2rage_engines.errors import EngineError

__all__ = ["DlpackTensor", "array_from_capsule", "tensor_from_capsule"]

_ON_HOST, _ON_CUDA = (1, 3), (2, 13)
"""DLPack's device types: the host's memory and CUDA's pinned part of it; CUDA's and its managed memory."""
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """The `DLTensor` that a capsule named `dltensor` points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class DlpackTensor:
    """Where a capsule's values lie; `address` holds as long as the capsule does.

    Attributes:
        address: of the first value.
        device_type, device_id: as DLPack numbers them.
        shape, dtype: of the tensor, whose values lie in C order.
    """

    address: int
    device_type: int
    device_id: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def tensor_from_capsule(capsule: object) -> DlpackTensor:
    """Read a capsule that nobody has taken yet; it stays so.

    Raises:
        EngineError: its type is none of NumPy's, or its values do not lie in C order.
    """
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    head = _Tensor.from_address(pointer_of(capsule, b"dltensor"))
    kind, lanes = _KINDS.get(head.dtype.code), head.dtype.lanes
    if kind is None or lanes != 1:
        raise EngineError(
            f"DLPack: type code {head.dtype.code} with {head.dtype.bits} bits and {lanes} lanes; expected whole "
            "numbers, floats or bools as NumPy has them; export the graph in another precision"
        )
    shape = tuple(head.shape[axis] for axis in range(head.ndim))
    if head.strides and not _in_c_order(shape, [head.strides[axis] for axis in range(head.ndim)]):
        raise EngineError(f"DLPack: a tensor {shape} is not contiguous; expected C order; make a contiguous copy first")
    return DlpackTensor(
        (head.data or 0) + head.byte_offset,
        head.device.type,
        head.device.id,
        shape,
        np.dtype("bool" if kind == "b" else f"{kind}{head.dtype.bits // 8}"),
    )


def _in_c_order(shape: tuple[int, ...], strides: list[int]) -> bool:
    if not math.prod(shape):
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def array_from_capsule(capsule: object, driver: ctypes.CDLL | None = None) -> Array:
    """A copy of a capsule's values on the host.

    Args:
        capsule: read, not taken.
        driver: CUDA's, by default the machine's own.

    Raises:
        EngineError: as `tensor_from_capsule`, another kind of device, or the driver refuses.
    """
    tensor = tensor_from_capsule(capsule)
    array = np.empty(tensor.shape, dtype=tensor.dtype)
    if not math.prod(tensor.shape):
        return array
    if tensor.device_type in _ON_HOST:
        ctypes.memmove(array.ctypes.data, tensor.address, array.nbytes)
    elif tensor.device_type in _ON_CUDA:
        _copy_from_cuda(array, tensor, driver)
    else:
        raise EngineError(
            f"DLPack: device type {tensor.device_type}; expected the host's memory or CUDA's; use --kind cpu"
        )
    return array


def _copy_from_cuda(array: Array, tensor: DlpackTensor, driver: ctypes.CDLL | None) -> None:
    try:
        cuda = driver or ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"CUDA: no driver ({error}); expected the one of the GPU; use --kind cpu") from error
    handle, context, old = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), tensor.device_id)
    failed = failed or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    if not failed:
        failed = cuda.cuCtxPushCurrent_v2(context)
        if not failed:
            target, source = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(tensor.address)
            failed = cuda.cuMemcpyDtoH_v2(target, source, ctypes.c_size_t(array.nbytes))
            cuda.cuCtxPopCurrent_v2(ctypes.byref(old))
        cuda.cuDevicePrimaryCtxRelease_v2(handle)
    if failed:
        raise EngineError(
            f"CUDA: the driver answers with error {failed} to a copy of {array.nbytes} bytes from GPU "
            f"{tensor.device_id}; expected the values; see whether the GPU is lost (nvidia-smi)"
        )
