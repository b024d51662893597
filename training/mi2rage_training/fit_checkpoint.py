"""Checkpoints of a fit: one file, written beside its place and renamed, tied to the settings and data it was made with.

No generator's state is in it: order, hidden rows and dropout of a step are drawn from (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mi2rage_engines.errors import InputError
from mi2rage_rt.samples import json_from_sample
from mi2rage_training.fit_config import FitConfig
from mi2rage_training.fit_targets import Targets
from mi2rage_training.pairs import Pair

__all__ = ["CheckpointFile", "FitState", "discard_checkpoint", "fingerprint_of"]

FILE_NAME = "fit.pt"
_SCHEMA = 1
_FREE_SETTINGS = ("checkpoint_steps",)  # they change nothing in the weights


@dataclasses.dataclass(slots=True)
class FitState:
    """How far a fit has come.

    Attributes:
        step: optimiser steps done.
        loss_sum: of the running epoch, of this process's rows; in a checkpoint, of all processes.
        loss_rows: of the running epoch, of all processes.
        losses, scores: mean loss and validation F1 of each epoch that is over.
        best: the trained weights of the best epoch, empty without validation.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_rows: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _pair_bytes(pairs: Sequence[Pair]) -> Iterable[bytes]:
    for pair in pairs:
        yield json_from_sample(pair.sample).encode("utf-8")
        yield b"" if pair.image is None else pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes()


def _tensor_bytes(tensors: Iterable[Tensor]) -> Iterable[bytes]:
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint_of(
    config: FitConfig, module: nn.Module, pairs: Sequence[Pair], validation: Sequence[Pair], targets: Targets
) -> dict[str, str]:
    """All that the weights of a fit depend on, by name: settings as text, data and initial weights as digests.

    Args:
        module: with its initial weights.
    """
    settings = {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name not in _FREE_SETTINGS} | {
        "training pairs": _digest(_pair_bytes(pairs)),
        "validation pairs": _digest(_pair_bytes(validation)),
        "labels, weights and soft targets": _digest(_tensor_bytes((targets.shares, targets.weights, targets.shift))),
        "initial weights": _digest(_tensor_bytes(module.state_dict().values())),
    }


class CheckpointFile:
    """The checkpoint in a folder.

    Args:
        folder: made where it is not there yet.
        fingerprint: of the fit that writes or goes on.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str]) -> None:
        self.path = folder / FILE_NAME
        self.fingerprint = fingerprint

    def read(self) -> dict[str, Any] | None:
        """What `write` was given last, or None where nothing was; the folder is there afterwards.

        Raises:
            InputError: it is of other settings or data, or no checkpoint.
        """
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; expected a folder for checkpoints; give the name of one")
        folder.mkdir(parents=True, exist_ok=True)  # now: not after an epoch of work
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            known = content["schema"] == _SCHEMA
            there = dict(content["fingerprint"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise self._unreadable(type(error).__name__) from error
        if not known:
            raise self._unreadable(f"schema {content['schema']!r}, not {_SCHEMA}")
        names = [*self.fingerprint, *(name for name in there if name not in self.fingerprint)]
        differences = [
            f"{name}: was {there.get(name)}, came {self.fingerprint.get(name)}"
            for name in names
            if there.get(name) != self.fingerprint.get(name)
        ]
        if differences:
            raise InputError(
                f"{self.path.parent}: holds the checkpoint of another fit ({'; '.join(differences)}); expected the "
                "same settings and data; give them again, or another checkpoint folder"
            )
        state: dict[str, Any] = content["state"]
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by `state`; after a crash at any moment the old or the new one is there, whole."""
        draft = self.path.with_name(f".{FILE_NAME}.draft")  # one name: what a kill leaves is overwritten
        with draft.open("wb") as file:
            torch.save({"schema": _SCHEMA, "fingerprint": self.fingerprint, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)

    def _unreadable(self, reason: str) -> InputError:
        return InputError(
            f"{self.path}: cannot be read as a checkpoint ({reason}); expected one that this version wrote; "
            "delete it to start anew, or give another checkpoint folder"
        )


def discard_checkpoint(folder: Path) -> None:
    """Delete the checkpoint in `folder`, and the folder where nothing else is in it."""
    for path in (folder / FILE_NAME, folder / f".{FILE_NAME}.draft"):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
