"""The options of commands that may run on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mi2rage_rt.ray_cluster import PoolOptions

__all__ = ["CpusOption", "GpusOption", "RayOption", "WorkersOption", "pool_options"]

RayOption = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Work on a Ray cluster: local (started here), auto, or HOST:PORT."),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Of --ray, the most at a time; by default all there is room for.")
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker", help="Of --ray; a part of 1 has workers share a GPU; by default 1, or 0 without GPUs."
    ),
]
CpusOption = Annotated[
    float | None,
    typer.Option("--cpus-per-worker", help="Of --ray, by default 1; on a CPU the threads of each worker as well."),
]


def pool_options(
    address: str | None, workers: int | None, gpus: float | None, cpus: float | None, tries: int = 3
) -> PoolOptions | None:
    """The options of the workers; None where there is no address.

    Raises:
        InputError: one came without an address, or is out of its range.
    """
    from mi2rage_engines.errors import InputError
    from mi2rage_rt.ray_cluster import PoolOptions

    if address is not None:
        return PoolOptions(address, workers, gpus, 1.0 if cpus is None else cpus, max(tries, 1))
    names = {"--workers": workers, "--gpus-per-worker": gpus, "--cpus-per-worker": cpus}
    alone = [f"{name} {value:g}" for name, value in names.items() if value is not None]
    if alone:
        raise InputError(
            f"{alone[0]}: came without --ray; expected the cluster that has the workers; give --ray local for this "
            "machine, or leave it out"
        )
    return None
