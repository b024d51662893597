"""One tiny bundle for all; tests that change it copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.tiny_bundle import build_bundle


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundle"))
