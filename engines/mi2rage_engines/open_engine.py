"""From a bundle's graph to an engine: what is here is looked at, a backend chosen, the graph or its plan loaded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from mi2rage_engines.backend import (
    BackendName,
    Choice,
    Findings,
    FoundPlan,
    backend_from_text,
    choose,
    refuse_what_cannot_run,
)
from mi2rage_engines.bundle import Manifest
from mi2rage_engines.cuda import default_cuda
from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import EngineError, InputError, MissingExtraError, require
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.plan import Present, find_plan, graph_sha256_from_manifest
from mi2rage_engines.trt_api import Backend, TrtApi, find_device, installed_backends, open_api
from mi2rage_engines.trt_engine import TrtEngine

logger = logging.getLogger(__name__)

__all__ = ["EngineOpener", "look_around"]


def look_around() -> Findings:
    """What is installed here, and the GPU."""
    try:
        providers = tuple(require("onnxruntime", "cpu").get_available_providers())
    except (MissingExtraError, ImportError):  # the second: a build whose libraries do not load
        providers = ()
    return Findings(providers, find_device(), installed_backends())


class EngineOpener:
    """Loads a bundle's graphs, each on the backend that is asked for, or on the best that can run it.

    Args:
        folder, manifest: the bundle.
        backend: see `BackendName`.
        providers: ONNX Runtime's, in order of preference, in place of a backend.
        threads: CPU threads of one operator.
        device_memory_limit_bytes: what each graph on ONNX Runtime's CUDA may take; plans take what they were built for.
        frugal: see `OrtEngine`.
        is_strict: refuse too that the first of `providers` does not start; by default the next one runs the graph.

    Raises:
        InputError: the backend lacks a package or a GPU, or came with providers.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        backend: str = BackendName.AUTO,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        device_memory_limit_bytes: int | None = None,
        frugal: bool = False,
        is_strict: bool = False,
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._backend = backend_from_text(backend)
        self._providers, self._threads = tuple(providers or ()), threads
        self._device_memory_limit_bytes = device_memory_limit_bytes
        self._frugal, self._is_strict = frugal, is_strict
        if self._providers and self._backend is not BackendName.AUTO:
            raise InputError(
                f"backend {backend}: came with the providers {', '.join(self._providers)}; expected one of the two, "
                "for the backend names its providers itself; leave one out"
            )
        if not self._providers:
            refuse_what_cannot_run(self._backend, self._found)
        elif self._found.providers and (unknown := sorted(set(self._providers) - set(self._found.providers))):
            raise InputError(
                f"provider {', '.join(unknown)}: is not in this onnxruntime; expected some of "
                f"{', '.join(self._found.providers)}; name one, or see 'mi2rage-rt doctor'"
            )

    @functools.cached_property
    def _found(self) -> Findings:
        return look_around()

    def choice(self, name: str) -> Choice:
        """The backend for a graph, e.g. `generator/unet`.

        Raises:
            InputError: see `choose`.
        """
        if self._providers:
            why = f"onnxruntime with {', '.join(self._providers)}, because these providers were asked for"
            return Choice(None, self._providers, None, why)
        return choose(self._backend, self._found, self._plans(name), name)

    def __call__(self, file: Path) -> Engine:
        """Load the graph that lies in `file`.

        Raises:
            InputError: see `choose`.
            BundleError: the plan is damaged.
            EngineError: the graph or plan cannot be loaded.
        """
        relative = file.relative_to(self._folder).as_posix()
        name = next(name for name, graph in self._manifest.graphs.items() if graph.file == relative)
        choice = self.choice(name)
        logger.info("%s: %s", name, choice.sentence)
        if choice.plan is None:
            return self.on_onnxruntime(file, choice)
        api = self._apis[Backend(str(choice.backend))]
        graph, present = self._manifest.graphs[name], self._present(name, api)
        return TrtEngine(choice.plan, graph, api, default_cuda(), present=present)

    def on_onnxruntime(self, file: Path, choice: Choice) -> OrtEngine:
        """Load an ONNX file, of the bundle or made from it, with the providers of a choice.

        Raises:
            EngineError: it cannot be loaded, or what was asked for could not start.
        """
        engine = OrtEngine(
            file,
            providers=choice.providers,
            threads=self._threads,
            device_memory_limit_bytes=self._device_memory_limit_bytes,
            frugal=self._frugal,
        )
        is_named = choice.backend is self._backend or (self._is_strict and bool(self._providers))
        if is_named and engine.providers[0] != choice.providers[0]:
            asked = f"backend {choice.backend}" if choice.backend else f"provider {choice.providers[0]}"
            raise EngineError(
                f"{asked}: {choice.providers[0]} could not start, and onnxruntime went to "
                f"{engine.providers[0]}; expected CUDA's libraries as this onnxruntime wants them; "
                "pip install --force-reinstall 'mi2rage-rt[gpu]', or give --backend auto"
            )
        return engine

    @functools.cached_property
    def _apis(self) -> dict[Backend, TrtApi]:
        return {}

    def _plans(self, name: str) -> dict[Backend, FoundPlan]:
        # Importing a library takes its time and memory: only where there is a GPU, and a plan that may fit.
        if self._found.device is None or not (self._folder / "plans").is_dir():
            return dict.fromkeys(self._found.installed, FoundPlan(None, "the bundle has no plans"))
        return {backend: self._plan(name, backend) for backend in self._found.installed}

    def _plan(self, name: str, backend: Backend) -> FoundPlan:
        try:
            if backend not in self._apis:
                self._apis[backend] = open_api(backend)
        except EngineError as error:
            return FoundPlan(None, str(error))
        return FoundPlan(*find_plan(self._folder, name, self._present(name, self._apis[backend])))

    def _present(self, name: str, api: TrtApi) -> Present:
        capability = None if self._found.device is None else self._found.device.capability
        sha256 = graph_sha256_from_manifest(self._manifest, self._manifest.graphs[name].file)
        return Present(str(api.backend), api.version, capability, sha256)
