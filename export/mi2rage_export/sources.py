"""The models of an export, loaded in fp32 on the CPU: what cannot be exported is found before anything is traced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import InputError, ModelFolderError
from mi2rage_export.given_data import check_files, check_labels
from mi2rage_export.licences import UNKNOWN, licence_of
from mi2rage_export.memory import is_lack_of_memory

if TYPE_CHECKING:
    from mi2rage_export.request import ExportRequest

__all__ = ["Models", "load_models"]

_WORDS = "a photo of a dog and two men"


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """Loaded models, where they came from, and their licences, by role."""

    by_role: dict[str, Any]
    sources: dict[str, str]
    licences: dict[str, str]


def load_models(request: ExportRequest) -> Models:
    """Load what is to be exported, and see that the samples given with it can be used.

    Raises:
        InputError: two models for one role, a static cache or preprocessing for no captioner, or feature caching for no
            generator.
        DataError: samples that cannot be read, or do not fit the models.
        ModelFolderError: a folder or hub id that cannot be loaded, or whose files do not belong together.
    """
    random = _random_by_role(request)
    roles = {*request.sources, *random}
    if request.static_cache and "captioner" not in roles:
        raise InputError(
            f"static cache: came with {', '.join(sorted(roles))} alone; expected a captioner, whose decoder it is for; "
            "give --captioner, or leave --static-cache out"
        )
    if request.preprocess_in_graph and "captioner" not in roles:
        raise InputError(
            f"preprocess in graph: came with {', '.join(sorted(roles))} alone; expected a captioner, whose images it "
            "is for; give --captioner, or leave --preprocess-in-graph out"
        )
    if request.feature_cache and "generator" not in roles:
        raise InputError(
            f"feature cache: came with {', '.join(sorted(roles))} alone; expected a generator, whose UNet it is for; "
            "give --generator, or leave --feature-cache out"
        )
    check_files(request, roles)
    sources = dict(request.sources)
    for role, source in sources.items():
        _check_hub(role, source)
    models = {role: _load(role, source, request) for role, source in sources.items()}
    licences = {role: _licence(role, source, models[role]) for role, source in sources.items()}
    for role, name in random.items():
        from mi2rage_training.random_weights import random_model

        models[role] = random_model(name, seed=request.seed, scheduler=request.scheduler)[1]
        sources[role], licences[role] = f"random weights {name}, seed {request.seed}", "none"
    if "classifier" in models:
        check_labels(request, models["classifier"].labels)
    order = [role for role in ("generator", "captioner", "classifier") if role in models]
    return Models({role: models[role] for role in order}, sources, licences)


def _random_by_role(request: ExportRequest) -> dict[str, str]:
    """Names of random weights by role, before gigabytes of them are drawn."""
    found: dict[str, str] = {}
    for name in request.random_weights:
        from mi2rage_training.random_weights import CAPTIONERS, CLASSIFIERS

        role = "captioner" if name in CAPTIONERS else "classifier" if name in CLASSIFIERS else "generator"
        other = request.sources.get(role) or found.get(role)
        if other is not None:
            raise InputError(
                f"random weights {name!r}: there is a {role} already ({other}); expected one a role; give one of them"
            )
        found[role] = name
    return found


_HUB_FILES = {"generator": "model_index.json", "captioner": "config.json"}


def _check_hub(role: str, source: str) -> None:
    """Ask the hub once whether a model is there: the libraries repeat themselves for half a minute, and say less."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, which it does not list

    from mi2rage_training.pytorch_sources import EMBEDDED, resolve

    if role not in _HUB_FILES or source == EMBEDDED or Path(resolve(source, role)).is_dir():
        return
    file = _HUB_FILES[role]
    advice = "check the id, or give a folder that holds the model"
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(source, file), str):
            return
        is_there = huggingface_hub.file_exists(source, file)
    except (HTTPError, OSError, ValueError) as error:
        raise ModelFolderError(
            f"{source}: is no folder here, and not in the hub's cache; the hub cannot be asked for it "
            f"({_first_line(error)}); expected a {role}; {advice}"
        ) from error
    if not is_there:
        raise ModelFolderError(
            f"{source}: is no folder here, and the hub has no such {role} with a {file} that you may read; expected "
            f"one; {advice}, or log in with 'hf auth login'"
        )


def _load(role: str, source: str, request: ExportRequest) -> Any:
    from mi2rage_training.pytorch_sources import loading

    with loading(source, f"the files of one {role}"):
        model = _opened(role, source, request)
    try:
        _ask(role, model)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        raise ModelFolderError(
            f"{source}: PyTorch cannot run it ({type(error).__name__}: {_first_line(error)}); expected tokenizer, "
            f"preprocessor, configuration and weights of one {role}; get its files again, all from one place"
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _ask(role: str, model: Any) -> None:
    """Ask for one answer: files that do not belong together show here, not in the middle of the export."""
    import numpy as np

    if role == "generator":
        from mi2rage_training.pytorch_models import TorchGenerator

        # One step at 8 x 8 latents, which any UNet of the families can halve as often as it does.
        side = 8 * int(model.pipeline.vae_scale_factor)
        small = dataclasses.replace(model.settings, steps=1, height=side, width=side)
        TorchGenerator(model.name, model.pipeline, small).generate([_WORDS], [0])
        return
    image = np.zeros((model.preprocessing.height, model.preprocessing.width, 3), np.uint8)
    if role == "captioner":
        model.caption([image], [_WORDS])
        return
    from mi2rage_rt.samples import Sample, Span

    words = tuple(_WORDS.split())
    long = words * model.max_length
    model.logits([Sample("0", long, Span(1, 2), Span(3, 4))], [image])


def _opened(role: str, source: str, request: ExportRequest) -> Any:
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
