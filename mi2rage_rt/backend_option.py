"""The option `--backend` of every command that runs a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["BackendOption"]

BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="auto (the best that can run each graph; --verbose says which and why), ort-cpu, ort-cuda, ort-tensorrt, "
        "or the bundle's plans on tensorrt or tensorrt-rtx.",
    ),
]
"""Default `"auto"`, given on to `Bundle.open`."""
