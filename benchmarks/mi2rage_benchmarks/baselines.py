"""The PyTorch models that bundles are compared with: given, or found by what the bundle's manifest says of them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mi2rage_engines.bundle import Manifest
from mi2rage_engines.errors import InputError, require

if TYPE_CHECKING:
    from mi2rage_engines.spec import GeneratorSpec

__all__ = ["PRECISIONS", "ROLES", "TorchPlace", "findable", "given_sources", "load_baselines", "lowered"]

TorchPrecision = Literal["fp32", "fp16", "bf16"]

ROLES = ("generator", "captioner", "classifier")
PRECISIONS: tuple[TorchPrecision, ...] = ("fp32", "fp16", "bf16")
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_EMBEDDED = "embedded"
_RANDOM = re.compile(r"random weights (?P<name>[\w.+-]+), seed (?P<seed>\d+)")
"""What a manifest says of a model with random weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class TorchPlace:
    """Where PyTorch's sides run and in what.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        precision: of weights and activations. What answers are held against is computed in fp32 all the same.

    Raises:
        InputError: PyTorch has no such device, or there is no such precision.
    """

    device: str = "cpu"
    precision: TorchPrecision = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"PyTorch in {self.precision!r}: not known; expected one of {', '.join(PRECISIONS)}")
        if self.device != "cpu":
            from mi2rage_training.devices import device_from

            device_from(self.device)

    @property
    def dtype(self) -> Any:
        """The `torch.dtype`."""
        import torch

        return getattr(torch, _DTYPES[self.precision])

    @property
    def words(self) -> str:
        """For titles, e.g. `, PyTorch in bf16 on cuda`; nothing of fp32 on the CPU."""
        return "" if self == TorchPlace() else f", PyTorch in {self.precision} on {self.device}"


def given_sources(
    models: Mapping[str, Path | str | None], random_weights: tuple[str, ...], seed: int
) -> dict[str, str]:
    """The sources that a user named, by role, in a manifest's words.

    Args:
        models: a folder, a hub id or `embedded`, by role; None where nothing was given.
        random_weights: names of architectures.
        seed: of their weights.

    Raises:
        InputError: an architecture is not known, or a role has two models.
    """
    sources = {role: str(source) for role, source in models.items() if source is not None}
    for name in random_weights:
        role = _role_of(name)
        if role in sources:
            raise InputError(f"random weights {name!r}: there is a {role} already ({sources[role]}); give one of them")
        sources[role] = f"random weights {name}, seed {seed}"
    return sources


def _role_of(name: str) -> str:
    require("torch", "train")
    from mi2rage_training.random_weights import CAPTIONERS, CLASSIFIERS, GENERATORS, NAMES, TINY_VAE

    by_role = {"generator": GENERATORS, "captioner": CAPTIONERS, "classifier": CLASSIFIERS}
    plain = name.removesuffix(TINY_VAE)
    for role, names in by_role.items():
        if name in names or (role == "generator" and plain in names):
            return role
    raise InputError(f"random weights {name!r}: not known; expected one of {', '.join(NAMES)}")


def findable(source: str) -> bool:
    """Whether a manifest's word for a model is enough to load it without the network."""
    return source == _EMBEDDED or _RANDOM.fullmatch(source) is not None or Path(source).is_dir()


def load_baselines(
    roles: tuple[str, ...], given: Mapping[str, str], manifest: Manifest, device: str = "cpu"
) -> dict[str, Any]:
    """The models of some roles, in fp32, convolutions in PyTorch's faster layout (channels last).

    Args:
        roles: which are wanted; the bundle has them.
        given: sources that the user named; the manifest's otherwise.
        manifest: of the first bundle.
        device: PyTorch's.

    Raises:
        InputError: a model was not given, and the manifest's word for it does not lead to one.
        ModelFolderError: a model cannot be loaded.
    """
    sources = {role: given.get(role) or manifest.source.get(role, "unknown") for role in roles}
    for role, source in sources.items():
        if role not in given and not findable(source):
            raise InputError(
                f"nothing to compare with: no {role} was given, and the bundle says that its own came from {source!r}, "
                f"which is not there; expected --{role}, the model that the bundle was exported from"
            )
    models = {role: _load(role, source, manifest) for role, source in sources.items()}
    for role, model in models.items():
        for network in _networks(role, model):
            network.to(device=device)
        if role == "generator":
            _lay_out(model)
    return models


def lowered(models: Mapping[str, Any], place: TorchPlace) -> dict[str, Any]:
    """Copies of the models in a place's precision; the models themselves where that is fp32."""
    if place.precision == "fp32":
        return dict(models)
    copies = {role: copy.deepcopy(model) for role, model in models.items()}
    for role, model in copies.items():
        for network in _networks(role, model):
            network.to(dtype=place.dtype)
    return copies


def _networks(role: str, model: Any) -> list[Any]:
    if role != "generator":
        return [model.module]
    return [part for part in model.pipeline.components.values() if hasattr(part, "parameters")]


def _lay_out(generator: Any) -> None:
    import torch

    for network in (generator.pipeline.unet, generator.pipeline.vae):
        network.to(memory_format=torch.channels_last)


def _load(role: str, source: str, manifest: Manifest) -> Any:
    import torch

    if match := _RANDOM.fullmatch(source):
        from mi2rage_training.random_weights import random_model

        model = random_model(match["name"], seed=int(match["seed"]))[1]
    elif role == "generator":
        from mi2rage_training.pytorch_models import TorchGenerator

        model = TorchGenerator.from_folder(source, device="cpu", dtype=torch.float32)
    elif role == "captioner":
        from mi2rage_training.pytorch_captioner import TorchCaptioner

        return TorchCaptioner.from_folder(source, device="cpu", dtype=torch.float32)
    else:
        from mi2rage_training.classifier_model import load_classifier

        return load_classifier(source)
    if role == "generator" and manifest.generator is not None:
        _take_scheduler(model, manifest.generator)
    return model


def _take_scheduler(generator: Any, spec: GeneratorSpec) -> None:
    """Give the pipeline the sampler that the bundle was exported with, which need not be the model's own."""
    wanted, pipeline = spec.schedules[0].scheduler, generator.pipeline
    if type(pipeline.scheduler).__name__ != wanted:
        diffusers = require("diffusers", "train")
        pipeline.scheduler = getattr(diffusers, wanted).from_config(pipeline.scheduler.config)
