"""Tiny models and one bundle of all three, made once a run and shared by all its worker processes.

Whoever changes a folder copies it first.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mi2rage_rt import progress
from tests.models.tiny_captioner import build_captioner, check_captioner
from tests.models.tiny_classifier import build_classifier, check_classifier
from tests.models.tiny_generator import build_generator, check_generator

PACKAGES = ("mi2rage_engines", "mi2rage_rt", "mi2rage_training", "mi2rage_export", "mi2rage_benchmarks")


@pytest.fixture(autouse=True)
def _own_manners() -> Iterator[None]:
    """What the command line does to the packages' loggers and to the bars ends with the test that called it."""
    loggers = [logging.getLogger(package) for package in PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    progress.be_quiet(False)


def shared(
    factory: pytest.TempPathFactory, request: pytest.FixtureRequest, name: str, make: Callable[[Path], object]
) -> Path:
    """The folder `name`, made by the first worker that needs it; the others wait for it."""
    base = factory.getbasetemp()
    root = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    root.mkdir(exist_ok=True)
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A Stable Diffusion pipeline with AutoencoderKL and DDIM; 4 steps, guidance 2, 24 px."""

    def make(folder: Path) -> None:
        check_generator(build_generator(folder))

    return shared(tmp_path_factory, request, "generator", make)


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A BLIP captioner for 24 px images; 12 new tokens at most."""

    def make(folder: Path) -> None:
        check_captioner(build_captioner(folder))

    return shared(tmp_path_factory, request, "captioner", make)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A relation classifier with four labels."""

    def make(folder: Path) -> None:
        check_classifier(build_classifier(folder))

    return shared(tmp_path_factory, request, "classifier", make)


@pytest.fixture(scope="session")
def exported_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    tiny_generator: Path,
    tiny_captioner: Path,
    tiny_classifier: Path,
) -> Path:
    """The three tiny models, exported as one bundle; takes about a minute."""
    from mi2rage_export.bundle_writer import export_bundle
    from mi2rage_export.request import ExportRequest

    def make(folder: Path) -> None:
        request = ExportRequest(generator=tiny_generator, captioner=tiny_captioner, classifier=tiny_classifier)
        export_bundle(folder, request)

    return shared(tmp_path_factory, request, "bundle", make)


@pytest.fixture(scope="session")
def cached_bundle(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, tiny_generator: Path
) -> Path:
    """The tiny generator with the graphs for feature caching."""
    from mi2rage_export.bundle_writer import export_bundle
    from mi2rage_export.request import ExportRequest

    def make(folder: Path) -> None:
        export_bundle(folder, ExportRequest(generator=tiny_generator, feature_cache=True))

    return shared(tmp_path_factory, request, "cached", make)
