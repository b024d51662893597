"""A small share of what `fuzz` sends."""

from __future__ import annotations

import pytest

from tests.runtime.serve.fuzz import fuzz, fuzz_grpc
from tests.runtime.serve.process import ServerProcess


def test_malformed_requests_are_answered(server: ServerProcess) -> None:
    found = fuzz(server, cases=1500, seed=7)
    assert found["statuses"].get(200, 0) > 100 and found["statuses"].get(400, 0) > 100, found


def test_malformed_messages_are_answered(server: ServerProcess) -> None:
    pytest.importorskip("tritonclient.grpc")
    found = fuzz_grpc(server, cases=1000, seed=7)
    assert found["statuses"].get("OK", 0) > 100 and found["statuses"].get("INVALID_ARGUMENT", 0) > 100, found
