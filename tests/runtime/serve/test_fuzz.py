"""A small share of what `fuzz` sends."""

from __future__ import annotations

from tests.runtime.serve.fuzz import fuzz
from tests.runtime.serve.process import ServerProcess


def test_malformed_requests_are_answered(server: ServerProcess) -> None:
    found = fuzz(server, cases=1500, seed=7)
    assert found["statuses"].get(200, 0) > 100 and found["statuses"].get(400, 0) > 100, found
