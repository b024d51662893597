"""The models of an export, loaded in fp32 on the CPU: a wrong folder is found before anything is exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import InputError
from mi2rage_export.licences import UNKNOWN, licence_of

if TYPE_CHECKING:
    from mi2rage_export.request import ExportRequest

__all__ = ["Models", "load_models"]


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """Loaded models, where they came from, and their licences, by role."""

    by_role: dict[str, Any]
    sources: dict[str, str]
    licences: dict[str, str]


def load_models(request: ExportRequest) -> Models:
    """Load what is to be exported.

    Raises:
        InputError: two models for one role.
        ModelFolderError: a folder or hub id that cannot be loaded.
    """
    sources = dict(request.sources)
    models = {role: _load(role, source, request) for role, source in sources.items()}
    licences = {role: _licence(role, source, models[role]) for role, source in sources.items()}
    for name in request.random_weights:
        from mi2rage_training.random_weights import random_model

        role, model = random_model(name, seed=request.seed, scheduler=request.scheduler)
        if role in models:
            raise InputError(f"random weights {name!r}: there is a {role} already ({sources[role]}); give one of them")
        models[role], sources[role], licences[role] = model, f"random weights {name}, seed {request.seed}", "none"
    order = [role for role in ("generator", "captioner", "classifier") if role in models]
    return Models({role: models[role] for role in order}, sources, licences)


def _load(role: str, source: str, request: ExportRequest) -> Any:
    import torch

    if role == "generator":
        from mi2rage_training.pytorch_models import TorchGenerator

        return TorchGenerator.from_folder(source, device="cpu", dtype=torch.float32, scheduler=request.scheduler)
    if role == "captioner":
        from mi2rage_training.pytorch_captioner import TorchCaptioner

        return TorchCaptioner.from_folder(source, device="cpu", dtype=torch.float32)
    from mi2rage_training.classifier_model import load_classifier

    return load_classifier(source)


def _licence(role: str, source: str, model: Any) -> str:
    """Of a classifier, the licences of the two towers it was made of."""
    if role != "classifier":
        return licence_of(_card_folder(source, fetch=True))
    towers = {licence_of(_card_folder(name, fetch=False)) for name in model.config.sources.values()}
    return ", ".join(sorted(towers)) or UNKNOWN


def _card_folder(source: str, *, fetch: bool) -> Path | None:
    """Where a model's card lies: in its folder, in the hub's cache, or fetched from the hub.

    A model that was just loaded from the hub is worth a request for its card; the towers of a classifier, which were
    loaded when it was trained, are not.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    from mi2rage_training.pytorch_sources import EMBEDDED

    if source == EMBEDDED:
        from mi2rage_training.microworld import models_folder

        return Path(models_folder())
    if Path(source).is_dir():
        return Path(source)
    try:
        if fetch:
            return Path(huggingface_hub.hf_hub_download(source, "README.md")).parent
        cached = huggingface_hub.try_to_load_from_cache(source, "README.md")
    except (OSError, HFValidationError):  # the hub's own errors are OSErrors
        return None
    return Path(cached).parent if isinstance(cached, str) else None
