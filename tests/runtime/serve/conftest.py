"""One server of the tiny bundle for all tests that leave it whole. The SDK and Triton's client share no process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mi2rage_rt.bundle import Bundle
from mi2rage_rt.images import encode_image
from tests.runtime.serve.process import ServerProcess

if importlib.util.find_spec("kserve") is None:
    collect_ignore_glob = ["test_*.py"]

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="session")
def server(bundle_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(bundle_folder, "--max-body-mb", "1", "--max-pixels", "250000") as process:
        yield process


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder, threads=1)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """PNG and JPEG files of different sizes."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (7 + n, 20 - n, 3), dtype=np.uint8) for n in range(6)]
    return [encode_image(image, "jpeg" if n % 2 else "png") for n, image in enumerate(images)]
