"""Reference cases: what the PyTorch module behind a graph answered to inputs that anybody can draw again.

They are written while the module is still unpatched and in fp32, and travel with the bundle in `parity/`: what was
exported can be checked in another process, in another precision, or on another machine without PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.errors import BundleError
from mi2rage_engines.spec import TensorSpec
from mi2rage_engines.validation import first_problem

__all__ = [
    "FOLDER",
    "CaptionerReference",
    "Case",
    "ClassifierReference",
    "DataReference",
    "Draw",
    "GeneratorReference",
    "GraphReference",
    "References",
    "Sizes",
    "draw_inputs",
    "picked",
    "read_answers",
    "read_references",
    "sha256_of_arrays",
    "write_answers",
]

Array = NDArray[Any]
Sizes = Mapping[str, int]

FOLDER = "parity"
PICKED = 1 << 16
"""Elements of an output that are kept; a larger one is sampled at even distances."""

_DRAWN_AT_ONCE = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Draw(_Record):
    """How an input's test values are drawn.

    `normal`: standard normal. `below`: whole numbers from 0 to `limit` - 1. `in_sequence`, `in_images`: the same
    below the size of the axis `sequence` or `images`. `padding`: 1 for the first so many places of a row, 0 behind.
    """

    kind: Literal["normal", "below", "in_sequence", "in_images", "padding"]
    limit: int | None = None

    def array(self, rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Array:
        """Values for one input."""
        if self.kind == "normal":
            return _standard_normal(rng, shape)
        if self.kind == "padding":
            lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
            return np.arange(shape[1]) < lengths
        limit = sizes[self.kind.removeprefix("in_")] if self.kind.startswith("in_") else self.limit
        return rng.integers(0, limit, shape)


def _standard_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Drawn in float64 and rounded, a piece at a time: a decoder's cross keys are large."""
    values = np.empty(shape, dtype=np.float32)
    flat = values.reshape(-1)
    for start in range(0, flat.size, _DRAWN_AT_ONCE):
        piece = flat[start : start + _DRAWN_AT_ONCE]
        piece[:] = rng.standard_normal(piece.size)
    return values


class Case(_Record):
    """One set of inputs: the sizes of the dynamic axes, the seed, and the SHA-256 of what was drawn from it."""

    sizes: dict[str, int]
    seed: int
    inputs_sha256: str


class GraphReference(_Record):
    """The cases of one graph; `outputs` in the graph's order, answers in a file of their own."""

    graph: str
    inputs: dict[str, Draw]
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]


def draw_inputs(specs: Sequence[TensorSpec], draws: Mapping[str, Draw], sizes: Sizes, seed: int) -> dict[str, Array]:
    """Arrays for a graph's inputs, float32 where they are floating, the same for the same seed.

    Args:
        specs: name, dtype and shape of each, in the graph's order.
        draws: by input name.
        sizes: of the dynamic axes.
        seed: 0 to 2^64 - 1.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
    arrays = {}
    for spec in specs:
        shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)
        # A graph in a lower precision is given what the module was given: fp32, rounded at its border.
        dtype = np.float32 if spec.dtype.startswith(("float", "bfloat")) else np.dtype(spec.dtype)
        arrays[spec.name] = np.asarray(draws[spec.name].array(rng, shape, sizes), dtype=dtype)
    return arrays


def sha256_of_arrays(arrays: Mapping[str, Array]) -> str:
    """Hex SHA-256 of arrays' bytes, in order."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def picked(array: Array) -> NDArray[np.float32]:
    """The elements of an output that are kept, float32 `(<= PICKED,)`."""
    flat = np.asarray(array).reshape(-1)
    if flat.size > PICKED:
        flat = flat[np.linspace(0, flat.size - 1, PICKED).astype(np.int64)]
    return flat.astype(np.float32)


def write_answers(folder: Path, name: str, arrays: Mapping[str, Array]) -> None:
    """Write `parity/<name>.npz`; the same arrays give the same bytes."""
    path = folder / FOLDER / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_answers(folder: Path, name: str) -> dict[str, Array]:
    """What `write_answers` wrote.

    Raises:
        BundleError: the file is missing or damaged.
    """
    path = folder / FOLDER / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path}: cannot be read ({error}); expected the answers of the PyTorch model; export the bundle again"
        ) from error


class GeneratorReference(_Record):
    """Images of the PyTorch pipeline, in `parity/generator.npz`, uint8 `images` (B, H, W, 3)."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    height: int
    width: int


class CaptionerReference(_Record):
    """Greedy captions of the PyTorch model for images that `parity.random_images` draws.

    Attributes:
        seed, images: of the images.
        prefixes: what captions began with; every image was captioned after each.
        ids: for each prefix and each image the ids that were written, prefix included.
    """

    seed: int
    images: int
    prefixes: tuple[str, ...]
    ids: tuple[tuple[tuple[int, ...], ...], ...]


class ClassifierReference(_Record):
    """Logits of the PyTorch model for samples that `parity.random_samples` draws, in `parity/classifier.npz`."""

    seed: int
    samples: int


class DataReference(_Record):
    """What the PyTorch models made of given data; the data themselves are not kept.

    Attributes:
        file: the name of the samples' file; sha256: of its bytes.
        rows: samples used; images: of them captioned; prompts: of them drawn, in `steps`.
        captions: greedy, one for each captioned image.
    """

    file: str
    sha256: str
    rows: int
    images: int = 0
    prompts: int = 0
    steps: int = 1
    captions: tuple[str, ...] = ()


class References(_Record):
    """`parity/references.json`: all cases of a bundle; `data` where it was exported with `--verify`."""

    schema_version: Literal[1] = 1
    graphs: dict[str, GraphReference] = {}
    generator: GeneratorReference | None = None
    captioner: CaptionerReference | None = None
    classifier: ClassifierReference | None = None
    data: DataReference | None = None

    def write(self, folder: Path) -> None:
        """Write `parity/references.json`."""
        path = folder / FOLDER / "references.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_references(folder: Path) -> References:
    """A bundle's reference cases.

    Raises:
        BundleError: there are none, or the file is damaged.
    """
    path = folder / FOLDER / "references.json"
    try:
        return References.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{folder}: holds no reference cases ({FOLDER}/references.json); it was exported by a release that kept "
            "none; export it again"
        ) from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; the file is damaged; export the bundle again") from error
