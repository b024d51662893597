"""The optional extras: what each needs, what of it is missing, and how to add it. Reads metadata only."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re

__all__ = ["EXTRA_BY_IMPORT", "Extra", "extras", "version_of"]

DISTRIBUTION = "mi2rage-rt"

EXTRA_BY_IMPORT = {
    "accelerate": "train",
    "diffusers": "train",
    "fsspec": "scale",
    "jinja2": "bench",
    "kserve": "serve",
    "matplotlib": "bench",
    "mlperf_loadgen": "bench",
    "onnx": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "ray": "scale",
    "s3fs": "scale",
    "sklearn": "train",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "train",
    "transformers": "train",
}
"""Import names and the extra that brings them."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclasses.dataclass(frozen=True, slots=True)
class Extra:
    """One extra: its distributions, those not installed, and the command that adds them."""

    name: str
    packages: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install '{DISTRIBUTION}[{self.name}]'"


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> tuple[Extra, ...]:
    """Every extra of the installed distribution, as its own metadata lists them."""
    try:
        metadata = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ()
    direct: dict[str, list[str]] = {}
    for requirement in metadata.requires or ():
        name, _, marker = requirement.partition(";")
        extra = _EXTRA.search(marker)
        if extra:
            direct.setdefault(extra.group(1), []).append(name.strip())
    return tuple(_extra(name, direct) for name in direct)


def _extra(name: str, direct: dict[str, list[str]]) -> Extra:
    packages = tuple(dict.fromkeys(_packages(name, direct)))
    return Extra(name, packages, tuple(package for package in packages if version_of(package) is None))


def _packages(name: str, direct: dict[str, list[str]]) -> list[str]:
    packages = []
    for requirement in direct.get(name, []):
        match = _REQUIREMENT.match(requirement)
        if match is None:
            continue
        package, inner = match.groups()
        if package == DISTRIBUTION:  # an extra that contains another one
            for other in (inner or "").split(","):
                packages += _packages(other.strip(), direct)
        else:
            packages.append(package)
    return packages
