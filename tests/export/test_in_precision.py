"""What is said of graphs of which int8 took little."""

from __future__ import annotations

import logging

import pytest

from mi2rage_export.in_precision import _warn_of_little
from mi2rage_export.quantize import Quantized


@pytest.mark.parametrize(
    ("layers", "kept", "keep", "is_said"), [(2, 16, 0, True), (2, 16, 16, False), (9, 9, 0, False)]
)
def test_little_int8_is_said(caplog, layers, kept, keep, is_said):
    names = tuple(f"layer_{index}" for index in range(kept))
    found = Quantized("int8-qdq", tuple(f"q_{index}" for index in range(layers)), names, 0.04)
    with caplog.at_level(logging.WARNING):
        _warn_of_little("captioner/decoder", found, names[:keep])
    assert ("captioner/decoder: only 2 of its 18 layers that could be (11%) are in int8-qdq" in caplog.text) is is_said
    assert len(caplog.records) == is_said
