"""What can be exported: one module for each family of models, each with a `FAMILY`.

A new family is a new module here, with its name in `_MODULES`.
"""

from __future__ import annotations

import importlib
from typing import Any

from mi2rage_engines.errors import ModelFolderError
from mi2rage_export.families.family import Family, Role

__all__ = ["Family", "Role", "families", "family_of"]

_MODULES = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "latent_consistency",
    "blip",
    "vision_encoder_decoder",
    "relation_classifier",
)


def families() -> tuple[Family, ...]:
    """All families, in the order in which they are asked."""
    return tuple(importlib.import_module(f"{__name__}.{module}").FAMILY for module in _MODULES)


def family_of(role: Role, model: Any) -> Family:
    """The family of a loaded model.

    Raises:
        ModelFolderError: no family fits.
    """
    known = [family for family in families() if family.role == role]
    for family in known:
        if family.fits(model):
            return family
    raise ModelFolderError(
        f"{model.name}: no {role} of its kind can be exported; expected one of the families "
        f"{', '.join(family.name for family in known)}; give another {role}"
    )
