"""Where PyTorch models come from: a folder, the hub, or the package; and how they are loaded without chatter."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mi2rage_engines.errors import DataError, ModelFolderError, require

if TYPE_CHECKING:
    import torch

__all__ = [
    "EMBEDDED",
    "default_device",
    "dtype_for",
    "loading",
    "quiet_loading",
    "resolve",
    "same_length",
    "small_files",
]

EMBEDDED = "embedded"
"""The name that stands for the package's own micro-world models."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name_or_folder: str | Path, role: str) -> str:
    """The local folder or hub id that a model's name stands for.

    Args:
        name_or_folder: `embedded`, a folder, or a hub id (`owner/name`).
        role: what the model is for, `generator` or `captioner`; the embedded models lie in folders of these names.

    Raises:
        ModelFolderError: it is no folder and cannot be a hub id either, or the embedded models are missing.
    """
    name = str(name_or_folder)
    if name == EMBEDDED:
        from mi2rage_training.microworld import models_folder

        folder = Path(models_folder()) / role
        if not folder.is_dir():
            raise ModelFolderError(f"{folder}: the embedded {role} is missing; make it with 'mi2rage-rt pretrain'")
        return str(folder)
    # `models/missing` beside a folder `models` is a mistyped path: the hub is not asked for it.
    is_hub_id = _HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir()
    if Path(name).is_dir() or is_hub_id:
        return name
    raise ModelFolderError(
        f"{name}: no such {role} folder; expected a folder, a hub id like owner/name, or '{EMBEDDED}'; check the path"
    )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the progress bars and notices that transformers and diffusers print while they load and run."""
    diffusers_logging = require("diffusers.utils.logging", "train")
    transformers_logging = require("transformers.utils.logging", "train")
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


@contextlib.contextmanager
def loading(name: str, expected: str) -> Iterator[None]:
    """Turn what the libraries raise on a bad folder into one message."""
    from safetensors import SafetensorError

    with quiet_loading():
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise ModelFolderError(
                f"{name}: cannot be loaded ({type(error).__name__}: {reason}); expected {expected}; "
                "check the folder or hub id, and that its files are whole"
            ) from error


def default_device() -> str:
    torch_module = require("torch", "train")
    return "cuda" if torch_module.cuda.is_available() else "cpu"


def dtype_for(device: str) -> torch.dtype:
    import torch

    return torch.float32 if device == "cpu" else torch.float16


def small_files(source: str) -> Path:
    """A local folder with the tokenizer's and the processor's files of a folder or hub id."""
    if Path(source).is_dir():
        return Path(source)
    hub = require("huggingface_hub", "train")
    return Path(hub.snapshot_download(source, allow_patterns=["*.json", "*.txt"]))


def same_length(first: str, a: Sequence[object], second: str, b: Sequence[object]) -> None:
    """Refuse two lists of different lengths; `first` and `second` are what they hold.

    Raises:
        DataError: they differ in length.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} {first} but {len(b)} {second}; expected one of each for every row")
