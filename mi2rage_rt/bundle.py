"""A bundle, opened: its components as the three protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.engine import Engine
from mi2rage_engines.errors import BundleError
from mi2rage_engines.open_engine import EngineOpener
from mi2rage_engines.ort_engine import OrtEngine
from mi2rage_engines.spec import GraphSpec

if TYPE_CHECKING:
    from mi2rage_rt.captioner import CaptionOptions, RuntimeCaptioner
    from mi2rage_rt.classifier import RuntimeClassifier
    from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator

__all__ = ["Bundle"]

S = TypeVar("S")


class Bundle:
    """A whole bundle; graphs are loaded when their component is asked for, and belong to the caller then.

    Use `Bundle.open`, with or without a `with` block. One object may be used from several threads at once: nothing in
    it changes, and each call loads a component of its own.

    Args:
        folder: the bundle.
        manifest: as `open_manifest` gave it.
        open_engine: what loads a graph's file.
    """

    def __init__(self, folder: Path, manifest: Manifest, open_engine: Callable[[Path], Engine] = OrtEngine) -> None:
        self.folder = folder
        self.manifest = manifest
        self.open_engine = open_engine

    @classmethod
    def open(
        cls,
        path: Path | str,
        backend: str = "auto",
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        device_memory_limit_bytes: int | None = None,
    ) -> Bundle:
        """Check a bundle's manifest and every file of it.

        Args:
            path: the folder that `mi2rage-rt export` wrote.
            backend: what runs the graphs, see `mi2rage_engines.backend.BackendName`; `auto` takes the best that can run
                each, and logs at level INFO which that is and why.
            providers: ONNX Runtime's, in order of preference, in place of a backend.
            threads: CPU threads of one operator; by default the cores this process may use.
            device_memory_limit_bytes: what each graph on ONNX Runtime's CUDA may take.

        Raises:
            BundleError: the bundle is not whole, was changed, or is of another schema version.
            InputError: the backend is unknown, lacks a package or a GPU, or came with providers.
        """
        folder = Path(path)
        manifest = open_manifest(folder)
        opener = EngineOpener(
            folder,
            manifest,
            backend,
            providers=providers,
            threads=threads,
            device_memory_limit_bytes=device_memory_limit_bytes,
        )
        return cls(folder, manifest, opener)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components that are in the bundle."""
        return tuple(name for name in ("generator", "captioner", "classifier") if getattr(self.manifest, name))

    def generator(self, options: GenerateOptions | None = None) -> RuntimeGenerator:
        """Text to image.

        Raises:
            BundleError: the bundle has no generator.
            InputError: nothing here can run a graph, or not what was asked for; the message says what is missing.
            EngineError: a graph cannot be loaded.
        """
        from mi2rage_rt.generator import RuntimeGenerator, graphs_to_load
        from mi2rage_rt.text import PlainTokenizer

        spec = self._component("generator", self.manifest.generator)
        tokenizer = PlainTokenizer(spec.tokenizer, self.folder)
        second = None if spec.tokenizer_2 is None else PlainTokenizer(spec.tokenizer_2, self.folder)
        return RuntimeGenerator(spec, self._engines(graphs_to_load(spec, options)), tokenizer, options, second)

    def captioner(self, options: CaptionOptions | None = None) -> RuntimeCaptioner:
        """Image to text. Raises as `generator`."""
        from mi2rage_rt.caption_options import graphs_to_load
        from mi2rage_rt.captioner import RuntimeCaptioner
        from mi2rage_rt.decoder_state import is_on_host
        from mi2rage_rt.text import PlainTokenizer

        spec = self._component("captioner", self.manifest.captioner)
        tokenizer = PlainTokenizer(spec.tokenizer, self.folder)
        engines = self._engines({"vision": spec.graphs["vision"]})
        graphs = graphs_to_load(spec, options, on_host=is_on_host(engines["vision"]))
        engines |= self._engines({name: graph for name, graph in graphs.items() if name not in engines})
        return RuntimeCaptioner(spec, engines, tokenizer, options)

    def classifier(self, batch_size: int = 32) -> RuntimeClassifier:
        """The relation classifier. Raises as `generator`."""
        from mi2rage_rt.classifier import RuntimeClassifier
        from mi2rage_rt.text import EntityMarkedTokenizer

        spec = self._component("classifier", self.manifest.classifier)
        tokenizer = EntityMarkedTokenizer.from_spec(spec.tokenizer, self.folder)
        return RuntimeClassifier(spec, self._engines(spec.graphs), tokenizer, batch_size)

    def _component(self, name: str, spec: S | None) -> S:
        if spec is None:
            raise BundleError(
                f"{self.folder}: this bundle has no {name}; it has {', '.join(self.components) or 'nothing'}; "
                "export one that has it"
            )
        return spec

    def _engines(self, graphs: Mapping[Any, GraphSpec]) -> dict[str, Engine]:
        return {str(name): self.open_engine(self.folder / graph.file) for name, graph in graphs.items()}
