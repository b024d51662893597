"""From DLPack capsules to NumPy; CUDA's driver is a stand-in that copies within this process's memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import EngineError
from mi2rage_rt.device_copy import _Tensor, array_from_capsule, tensor_from_capsule


class Driver:
    """Notes the calls; a copy of more bytes than there are would crash the test."""

    def __init__(self, refuses: str = "") -> None:
        self.calls: list[str] = []
        self.refuses = refuses

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(function)
            if function == "cuMemcpyDtoH_v2" and not self.refuses:
                ctypes.memmove(arguments[0].value, arguments[1].value, arguments[2].value)
            return 700 if function == self.refuses else 0

        return call


def head_of(capsule: object) -> _Tensor:
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return _Tensor.from_address(pointer_of(capsule, b"dltensor"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (), (2, 0, 3)])
def test_values_and_types_come_over(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    capsule = array.__dlpack__()
    known = tensor_from_capsule(capsule)
    assert (known.shape, known.dtype) == (shape, np.dtype(dtype))
    copy = array_from_capsule(capsule)
    np.testing.assert_array_equal(copy, array)
    assert copy.dtype == array.dtype and not np.shares_memory(copy, array)


def test_cuda_memory_is_copied_in_its_context() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    capsule = array.__dlpack__()
    head_of(capsule).device.type = 2
    driver = Driver()
    np.testing.assert_array_equal(array_from_capsule(capsule, driver), array)  # type: ignore[arg-type]
    assert driver.calls[2:] == [
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuMemcpyDtoH_v2",
        "cuCtxPopCurrent_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_a_refusing_driver_leaves_no_context_behind() -> None:
    array = np.arange(6, dtype=np.float32)
    capsule = array.__dlpack__()
    head_of(capsule).device.type = 2
    driver = Driver(refuses="cuMemcpyDtoH_v2")
    with pytest.raises(EngineError, match="error 700 to a copy of 24 bytes"):
        array_from_capsule(capsule, driver)  # type: ignore[arg-type]
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


def test_what_numpy_cannot_hold_is_refused() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with pytest.raises(EngineError, match="not contiguous"):
        array_from_capsule(array.T.__dlpack__())
    capsule = array.__dlpack__()
    head_of(capsule).dtype.code = 4  # bfloat16
    with pytest.raises(EngineError, match="type code 4"):
        tensor_from_capsule(capsule)
    other = array.__dlpack__()
    head_of(other).device.type = 10  # ROCm
    with pytest.raises(EngineError, match="device type 10"):
        array_from_capsule(other)
