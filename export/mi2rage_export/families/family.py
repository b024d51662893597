"""What a family of models has to say of itself to be exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph

__all__ = ["Family", "Role"]

Role = Literal["generator", "captioner", "classifier"]


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """Models that are exported alike.

    Attributes:
        name: e.g. `stable-diffusion`, for messages and tests; it stands in no file.
        role: which of the three protocols its members fulfil.
        fits: whether a loaded model (`TorchGenerator`, `TorchCaptioner`, `LoadedClassifier`) is of the family.
        graphs: its graphs; refuses a member that the runtime could not run, before anything is traced.
        write: writes everything but the graphs into the component's folder, and returns the manifest's fields.
        static_cache: a captioner's `decoder_static`, on demand.
    """

    name: str
    role: Role
    fits: Callable[[Any], bool]
    graphs: Callable[[Any], tuple[Graph, ...]]
    write: Callable[[Path, Any], dict[str, Any]]
    static_cache: Callable[[Any], Graph] | None = None
