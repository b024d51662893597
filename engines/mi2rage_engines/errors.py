"""The one tree of exceptions of the project.

```
Mi2rageError                  exit code 1: the work could not be done
├── InputError                exit code 2: what the user gave cannot be used
│   ├── DataError             a row, a span, a label, an image or a data set
│   ├── ModelFolderError      a model folder or hub id that cannot be loaded
│   ├── BundleError           a bundle that is not whole or does not fit
│   └── MissingExtraError     a package that an optional extra would install
├── EngineError               a graph that cannot be loaded or run
│   └── OutsideProfileError   sizes that a plan was not built for
└── ParityError               an export that differs too much from PyTorch
```

A message says four things: the subject, what came, what was expected, and what to do next.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "BundleError",
    "DataError",
    "EngineError",
    "InputError",
    "Mi2rageError",
    "MissingExtraError",
    "ModelFolderError",
    "OutsideProfileError",
    "ParityError",
    "require",
]


class Mi2rageError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(Mi2rageError):
    """The user's input or arguments cannot be used."""

    exit_code = 2


class DataError(InputError):
    """A row, a span, a label, an image or a whole data set is unusable."""


class ModelFolderError(InputError):
    """A model folder or hub id cannot be loaded as what it should be."""


class BundleError(InputError):
    """A bundle is not whole, was changed, or does not fit the request."""


class MissingExtraError(InputError):
    """A package is not installed that one of the optional extras brings.

    Args:
        package: the import name that is missing.
        extra: the extra of `mi2rage-rt` that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package '{package}' is not installed; this command needs the extra '{extra}': "
            f"pip install 'mi2rage-rt[{extra}]'"
        )
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)  # errors pass between processes


class EngineError(Mi2rageError):
    """A graph cannot be loaded, or does not take what it was given."""


class OutsideProfileError(EngineError):
    """Inputs are of sizes that a plan was not built for."""


class ParityError(Mi2rageError):
    """An exported graph answers differently from the PyTorch module it came from."""


def require(package: str, extra: str) -> ModuleType:
    """Import `package`, or say which extra installs it.

    Args:
        package: dotted import name.
        extra: the extra of `mi2rage-rt` that installs it.

    Raises:
        MissingExtraError: the package (or its parent) is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and package.partition(".")[0] == error.name.partition(".")[0]:
            raise MissingExtraError(package, extra) from error
        raise
