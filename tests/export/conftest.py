"""The tiny models, loaded, and the shared bundle, opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_training.classifier_model import LoadedClassifier, load_classifier
from mi2rage_training.pytorch_captioner import TorchCaptioner
from mi2rage_training.pytorch_models import TorchGenerator


@pytest.fixture(scope="session")
def generator(tiny_generator: Path) -> TorchGenerator:
    return TorchGenerator.from_folder(tiny_generator, device="cpu")


@pytest.fixture(scope="session")
def captioner(tiny_captioner: Path) -> TorchCaptioner:
    return TorchCaptioner.from_folder(tiny_captioner, device="cpu")


@pytest.fixture(scope="session")
def classifier(tiny_classifier: Path) -> LoadedClassifier:
    return load_classifier(tiny_classifier)


@pytest.fixture(scope="session")
def manifest(exported_bundle: Path) -> Manifest:
    return open_manifest(exported_bundle)
