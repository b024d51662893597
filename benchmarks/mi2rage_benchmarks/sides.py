"""The sides of a comparison: PyTorch as it is, PyTorch compiled, and bundles whose engines carry a clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mi2rage_engines.bundle import Manifest
from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import InputError
from mi2rage_export import parity
from mi2rage_rt.bundle import Bundle

if TYPE_CHECKING:
    from mi2rage_engines.spec import GraphSpec, Precision

__all__ = ["AGAIN", "BundleSide", "Clocked", "EngineClock", "bundle_sides", "compiled"]

T = TypeVar("T")

AGAIN = ", again"
"""Behind the name of a side that is an earlier one once more."""


class EngineClock:
    """Seconds spent in the engines of a bundle, by engine; of one thread's calls.

    An engine whose `call` returns before its work is done has a method `mark`, see `TrtEngine.mark`: what such a call
    took is the time between the marks before and behind it, on the GPU's own clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, Any, Any]] = []

    def timed(self, name: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `call` answers, its time added to that of engine `name`."""
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._add(name, time.perf_counter() - start)

    def marked(self, name: str, mark: Callable[[], Any], call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `call` answers, the time between a mark before and one behind it added to that of engine `name`."""
        before = mark()
        answer = call(*args, **kwargs)
        self._marks.append((name, before, mark()))
        return answer

    def by_engine(self) -> dict[str, float]:
        """Seconds so far, by engine, once all that was asked for is done."""
        marks, self._marks = self._marks, []
        for name, before, behind in marks:
            self._add(name, behind.ms_since(before) / 1000)
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class _ClockedEngine:
    """An engine that reports its runs and calls to a clock, and is the engine itself in all else."""

    def __init__(self, engine: Engine, clock: EngineClock, stage: str) -> None:
        self._engine = engine
        self._clock = clock
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.timed(self._stage, self._engine.run, *args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        engine: Any = self._engine
        mark = getattr(engine, "mark", None)
        if mark is None:
            return self._clock.timed(self._stage, engine.call, *args, **kwargs)
        return self._clock.marked(self._stage, mark, engine.call, *args, **kwargs)


class Clocked:
    """A call that keeps, of each time it was made, the milliseconds in all, in each engine, and outside the engines."""

    def __init__(self, call: Callable[[], object], clock: EngineClock) -> None:
        self._call = call
        self._clock = clock
        self.total_ms: list[float] = []
        self.outside_ms: list[float] = []
        self.stages_ms: list[dict[str, float]] = []

    def __call__(self) -> object:
        before, start = self._clock.by_engine(), time.perf_counter()
        answer = self._call()
        total = time.perf_counter() - start
        stages = {name: 1000 * (taken - before.get(name, 0.0)) for name, taken in self._clock.by_engine().items()}
        self.stages_ms.append({name: taken for name, taken in stages.items() if taken > 0})
        self.total_ms.append(1000 * total)
        self.outside_ms.append(1000 * total - sum(stages.values()))
        return answer


class BundleSide:
    """A bundle on a backend; graphs are loaded when they are first asked for, and kept.

    Args:
        folder: the bundle.
        threads: CPU threads of one operator.
        backend: see `mi2rage_engines.backend.BackendName`.

    Raises:
        BundleError: the bundle is not whole.
        InputError: the backend is unknown, or lacks a package or a GPU.
    """

    def __init__(self, folder: Path, threads: int | None, backend: str = "ort-cpu") -> None:
        self.folder = folder
        self.backend = backend
        self.threads = threads
        self.name = ""
        self.clock = EngineClock()
        self._bundle = Bundle.open(folder, backend, threads=threads)
        open_engine = self._bundle.open_engine
        stages = {folder / graph.file: name.partition("/")[2] for name, graph in self._bundle.manifest.graphs.items()}

        def clocked(file: Path, *args: Any, **kwargs: Any) -> Engine:
            stage = stages.get(file, file.stem)
            return cast("Engine", _ClockedEngine(open_engine(file, *args, **kwargs), self.clock, stage))

        self._bundle.open_engine = clocked
        self._kept: dict[Any, Any] = {}

    @property
    def manifest(self) -> Manifest:
        """What is in the bundle."""
        return self._bundle.manifest

    def engine(self, graph: str) -> Engine:
        """The engine of a graph, e.g. `generator/unet`."""
        file = self.folder / self.manifest.graphs[graph].file
        return self._keep(graph, lambda: self._bundle.open_engine(file))

    def component(self, role: str, options: Any = None) -> Any:
        """The runtime's generator, captioner or classifier, its defaults set by `options` where there are some."""
        make = getattr(self._bundle, role)
        return self._keep((role, options), make if options is None else lambda: make(options))

    def _keep(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return cast("T", self._kept[key])

    def release(self) -> None:
        """Let go of what was loaded."""
        self._kept.clear()

    def precision(self, graphs: Iterable[str]) -> Precision:
        """The lowest precision among graphs."""
        return parity.lowest(self.manifest.graphs[name] for name in graphs)

    def weights_bytes(self, graphs: Iterable[str]) -> int:
        """Sizes of the files that hold graphs and their weights, each once."""
        specs: list[GraphSpec] = [self.manifest.graphs[name] for name in graphs]
        files = {file for spec in specs for file in self.manifest.files if _belongs(file, spec.file)}
        return sum(self.manifest.files[file].bytes for file in files)


def _belongs(file: str, graph: str) -> bool:
    # Weights too large to embed lie beside the graph, under its name with something behind it.
    return file == graph or file.startswith((f"{graph}_", f"{graph}."))


_RUNTIMES = {
    "auto": "best backend",
    "ort-cpu": "ONNX Runtime",
    "ort-cuda": "ONNX Runtime CUDA",
    "ort-tensorrt": "ONNX Runtime TensorRT",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}


def bundle_sides(
    folders: Sequence[Path], threads: int | None, *, backends: Sequence[str] = ("ort-cpu",), again: bool = False
) -> list[BundleSide]:
    """Each bundle on each backend, named by backend and precision, and by the folder too where that tells not enough.

    Args:
        again: whether the first is a side twice, to see what a difference is that is none.

    Raises:
        InputError: a bundle or a backend is named twice.
    """
    for kind, given in (("bundle", [str(folder.resolve()) for folder in folders]), ("backend", list(backends))):
        if twice := [item for item in given if given.count(item) > 1]:
            raise InputError(
                f"{kind} {twice[0]}: came twice; expected each once; give it once, and --against-itself to compare a "
                "bundle with itself"
            )
    sides = [BundleSide(folder, threads, backend) for folder in folders for backend in backends]
    plain = [f"{_RUNTIMES[side.backend]} {side.manifest.precision}" for side in sides]
    names = [
        (name, f"{name} ({side.folder.name})", f"{name} ({side.folder})")
        for name, side in zip(plain, sides, strict=True)
    ]
    for side, forms in zip(sides, names, strict=True):
        side.name = next(form for form in forms if sum(form in others for others in names) == 1)
    if again:
        sides.append(BundleSide(folders[0], threads, backends[0]))
        sides[-1].name = f"{sides[0].name}{AGAIN}"
    return sides


def compiled(models: Mapping[str, Any]) -> dict[str, Any]:
    """The same models, weights shared, the forward of every network compiled; nothing is compiled before it is called.

    Args:
        models: `TorchGenerator`, `TorchCaptioner` and `LoadedClassifier` by role.
    """
    return {role: _COMPILED[role](model) for role, model in models.items()}


def _compiled_module(module: Any) -> Any:
    import torch

    # A copy has attributes of its own and shares submodules and weights; torch's `OptimizedModule` would not do, since
    # a captioner's `generate` leads back to the module inside.
    clone = copy.copy(module)
    clone.forward = torch.compile(module.forward)
    return clone


def _compiled_generator(generator: Any) -> Any:
    import torch

    pipeline = copy.copy(generator.pipeline)
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    # Past the pipeline's own attribute setter, which would write into the configuration that both share.
    vars(pipeline).update({name: _compiled_module(getattr(pipeline, name)) for name in parts})
    vae = copy.copy(pipeline.vae)
    vae.decode = torch.compile(vae.decode)
    vars(pipeline)["vae"] = vae
    return type(generator)(generator.name, pipeline, generator.settings)


def _compiled_captioner(captioner: Any) -> Any:
    clone, module = copy.copy(captioner), copy.copy(captioner.module)
    parts = ("vision_model", "text_decoder", "encoder", "decoder")
    # An attribute set the usual way would replace the submodule in the original too: both share one registry.
    vars(module).update({name: _compiled_module(getattr(module, name)) for name in parts if hasattr(module, name)})
    clone.module = module
    return clone


def _compiled_classifier(classifier: Any) -> Any:
    clone = copy.copy(classifier)
    clone.module = _compiled_module(classifier.module)
    return clone


_COMPILED: dict[str, Callable[[Any], Any]] = {
    "generator": _compiled_generator,
    "captioner": _compiled_captioner,
    "classifier": _compiled_classifier,
}
