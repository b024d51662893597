"""Where the workers of a Ray cluster are, what each has, and the connection to it."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from typing import Any

from mi2rage_engines.errors import InputError, require
from mi2rage_engines.ort_engine import usable_cores

__all__ = ["LOCAL", "PoolOptions", "connected", "gpus_each", "resources", "room"]

LOCAL = "local"
_OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a local cluster; items and results are small."""


_LEAST_SHARE = 0.0001
"""The finest part that Ray counts with."""


def _is_no_share(gpus: float) -> bool:
    return 0 < gpus < _LEAST_SHARE or (gpus > 1 and gpus % 1 != 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolOptions:
    """Where the workers are, and what each has.

    Attributes:
        address: `local` starts a cluster on this machine for the time of the run; else that of a running cluster, e.g.
            `auto` or `10.0.0.1:6379`.
        workers: the most at a time, 1 or more; None takes as many as the cluster has room for at the start.
        gpus_per_worker: of each, 0 or more; a part of 1 has several workers share a GPU. None is 1 where the cluster
            has GPUs, else 0.
        cpus_per_worker: of each, above 0: what Ray keeps free for it, and (rounded, at least 1) the threads that its
            models use on a CPU.
        tries: workers that an item may kill before it counts as lost, 1 or more.
    """

    address: str = LOCAL
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    tries: int = 3

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(
                f"workers: came {self.workers}; expected 1 or more, or none for all that there is room for"
            )
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise InputError(
                f"GPUs per worker: came {self.gpus_per_worker}; expected 0 (a CPU), a part of 1 (a GPU is shared), or "
                "whole ones"
            )
        if self.gpus_per_worker is not None and _is_no_share(self.gpus_per_worker):
            raise InputError(
                f"GPUs per worker: came {self.gpus_per_worker}; expected 0, a part of 1 down to {_LEAST_SHARE}, or "
                "whole ones, which is what Ray gives out"
            )
        if not self.cpus_per_worker >= _LEAST_SHARE:
            raise InputError(
                f"CPUs per worker: came {self.cpus_per_worker}; expected a number from {_LEAST_SHARE} on, e.g. 1"
            )
        if self.tries < 1:
            raise InputError(f"tries: came {self.tries}; expected 1 or more")

    @property
    def threads(self) -> int:
        """CPU threads of each worker's models."""
        return max(1, round(self.cpus_per_worker))


def resources(ray: Any) -> str:
    """What a cluster has, in words."""
    has = ray.cluster_resources()
    return f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs"


def connected(options: PoolOptions) -> Any:
    """Ray, started on this machine or connected to its cluster; it prints nothing."""
    # Read when ray is imported: it prints what happens to workers on stdout, where our results go.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    ray: Any = require("ray", "scale")
    manners = {"log_to_driver": False, "logging_level": logging.ERROR}
    if options.address == LOCAL:
        cores = max(usable_cores(), math.ceil((options.workers or 0) * options.cpus_per_worker))
        ray.init(
            address=LOCAL, num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **manners
        )
        return ray
    try:
        ray.init(address=options.address, **manners)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--ray {options.address}: no Ray cluster answers ({reason}); expected 'local', 'auto', or HOST:PORT of "
            "one; start one ('ray start --head'), or check the address"
        ) from error
    return ray


def gpus_each(options: PoolOptions, ray: Any) -> float:
    """What a worker gets of a GPU, or how many.

    Raises:
        InputError: this machine has not as many.
    """
    wanted, there = options.gpus_per_worker, ray.cluster_resources().get("GPU", 0.0)
    if wanted is None:
        return 1.0 if there else 0.0
    if options.address == LOCAL and wanted > there:
        raise InputError(
            f"GPUs per worker: came {wanted:g}, and Ray finds {there:g} GPUs on this machine; expected no more; "
            "give less, or 0 to run on the CPU"
        )
    return wanted


def room(options: PoolOptions, ray: Any, gpus: float) -> int:
    """How many workers of so many GPUs each a cluster has room for now, at least 1."""
    has = ray.cluster_resources()
    workers = _whole(has.get("CPU", 0.0) / options.cpus_per_worker)
    if gpus:
        there = has.get("GPU", 0.0)
        workers = min(workers, _whole(there / gpus) if gpus >= 1 else int(there) * _whole(1 / gpus))
    return max(1, workers)


def _whole(share: float) -> int:
    """How many fit; 1 / 0.2 is 5, whatever binary fractions make of it."""
    return math.floor(share + 1e-6)
