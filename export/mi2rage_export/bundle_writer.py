"""The bundle: graphs, tokenizers, configurations, reference cases and the manifest, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.bundle import MANIFEST_NAME, SCHEMA_VERSION, Manifest, ParityRecord, record_files
from mi2rage_engines.errors import require
from mi2rage_engines.spec import CaptionerSpec, ClassifierSpec, GeneratorSpec, GraphSpec
from mi2rage_export import parity
from mi2rage_export.families import Family, family_of
from mi2rage_export.memory import give_back
from mi2rage_export.reference import References
from mi2rage_export.request import ExportRequest
from mi2rage_export.verify import check_in_process
from mi2rage_rt import progress
from mi2rage_rt.files import atomic_folder

if TYPE_CHECKING:
    from mi2rage_export.given_data import GivenData
    from mi2rage_export.graphs import Graph

__all__ = ["export_bundle"]

_PACKAGES = ("mi2rage-rt", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy")
_SPECS: dict[str, Any] = {"generator": GeneratorSpec, "captioner": CaptionerSpec, "classifier": ClassifierSpec}


@dataclasses.dataclass(slots=True)
class _Part:
    """A component on its way into the bundle; the model is let go of once its graphs are written."""

    role: str
    family: Family
    model: Any
    graphs: tuple[Graph, ...]


def export_bundle(out: Path | str, request: ExportRequest, *, force: bool = False) -> Manifest:
    """Export models to ONNX, check each against PyTorch, and write them as one bundle.

    Args:
        out: the bundle's folder; it appears when everything is exported and checked.
        request: what to export, and how.
        force: replace a bundle that is there already.

    Raises:
        InputError: `out` exists and `force` is off, a precision names no graph, or a static cache was asked for and
            there is no captioner, or feature caching and there is no generator.
        ModelFolderError: a model cannot be loaded, or is of a kind that cannot be exported.
        DataError: the samples to verify or to calibrate with cannot be read.
        MissingExtraError: a package of the extra `export` or `cpu` is missing.
        ParityError: an export differs too much from its model, or gives NaN or infinity.
    """
    for package, extra in (("torch", "export"), ("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "cpu")):
        require(package, extra)
    with atomic_folder(Path(out), force=force) as folder:
        return _Writer(folder, request).write()


def _release(part: _Part) -> None:
    """Give a model's memory back to the system: the process that checks its graphs needs as much again."""
    for graph in part.graphs:
        for tensor in (*graph.module.parameters(), *graph.module.buffers()):
            tensor.data = tensor.data.new_empty(0)  # caches of PyTorch's exporter hold on to the modules they have seen
    gc.collect()
    give_back()


class _Writer:
    """Fills one draft."""

    def __init__(self, folder: Path, request: ExportRequest) -> None:
        self.folder = folder
        self.request = request
        self.references = References()
        self.records: list[ParityRecord] = []
        self.specs: dict[str, Any] = {}

    def write(self) -> Manifest:
        from mi2rage_export.sources import load_models

        with progress.steps("loading models"):
            models = load_models(self.request)
            data = self._data(self.request.verify)
        sources, licences = dict(models.sources), dict(models.licences)
        parts = [self._part(role, model) for role, model in models.by_role.items()]
        del models
        self.request.check_names([graph.name for part in parts for graph in part.graphs])
        with progress.steps("exporting", 2 * sum(len(part.graphs) for part in parts) + 2 * len(parts)) as bar:
            # What needs no tracing first: an unsupported scheduler or tokenizer shows at once.
            fields = {part.role: self._fields(part) for part in parts}
            if data is not None:
                self._record_data(parts, data)
            while parts:
                part = parts.pop(0)
                self._record(part, bar)
                graphs = {graph.name.rpartition("/")[2]: self._export(graph, bar) for graph in part.graphs}
                self.specs[part.role] = _SPECS[part.role](graphs=graphs, **fields[part.role])
                role = part.role
                _release(part)
                del part, graphs
                self._quantize(role, sources, licences)
                self._add_denoise_steps(role)
                self._check(role, sources, licences, bar)
        return self._manifest(sources, licences)

    def _data(self, file: Path | None) -> GivenData | None:
        if file is None:
            return None
        from mi2rage_export.given_data import read_data

        return read_data(file, self.request.images, self.request.limit)

    def _part(self, role: str, model: Any) -> _Part:
        family = family_of(role, model)  # type: ignore[arg-type]
        graphs = family.graphs(model)
        if self.request.preprocess_in_graph and role == "captioner":
            from mi2rage_export.resampling import with_preprocessing

            graphs = (with_preprocessing(graphs[0], model.preprocessing), *graphs[1:])
        if self.request.static_cache and family.static_cache is not None:
            graphs = (*graphs, family.static_cache(model))
        if self.request.feature_cache and role == "generator":
            from mi2rage_export.feature_cache import refuse_uncuttable

            refuse_uncuttable(model)
        return _Part(role, family, model, graphs)

    def _fields(self, part: _Part) -> dict[str, Any]:
        (self.folder / part.role).mkdir()
        return part.family.write(self.folder / part.role, part.model)

    def _record_data(self, parts: list[_Part], data: GivenData) -> None:
        from mi2rage_export.recording import record_data

        found = record_data({part.role: part.model for part in parts}, data, self.folder)
        self.references = self.references.model_copy(update={"data": found})

    def _record(self, part: _Part, bar: progress.Steps) -> None:
        """Everything that is asked of the model while it is in fp32 and as it was."""
        from mi2rage_export.recording import record_component, record_graph

        bar.note(f"{part.role}, PyTorch's answers")
        self.references = record_component(self.references, part.role, part.model, self.folder, self.request.seed)
        give_back()
        bar.advance()
        for graph in part.graphs:
            found = record_graph(graph, self.folder, self.request.seed)
            self.references.graphs[graph.name] = found
            give_back()
            bar.advance()
            if graph.name == "generator/unet":
                from mi2rage_export.denoise_steps import denoise_step_graphs

                for step in denoise_step_graphs(graph, with_feature_cache=self.request.feature_cache):
                    self.references.graphs[step.name] = record_graph(step, self.folder, self.request.seed)
        self.references.write(self.folder)

    def _export(self, graph: Graph, bar: progress.Steps) -> GraphSpec:
        from mi2rage_export.in_precision import export_in_precision

        bar.note(graph.name)
        component, name = graph.name.split("/")
        # A generator's parts have folders of their own, as in optimum's layout.
        file = f"{component}/{name}/model.onnx" if component == "generator" else f"{component}/{name}.onnx"
        if self.request.feature_cache and graph.name == "generator/unet":
            from mi2rage_export.feature_cache import with_feature

            graph = with_feature(graph)
        spec = export_in_precision(graph, self.folder / file, file, self.request)
        give_back()
        bar.advance()
        return spec

    def _quantize(self, role: str, sources: dict[str, str], licences: dict[str, str]) -> None:
        """Put those graphs of a component into int8 that are to be, once all of it can be run in fp32."""
        spec = self.specs[role]
        wanted = {name: self.request.precision_of(f"{role}/{name}") for name in spec.graphs}
        wanted = {name: precision for name, precision in wanted.items() if precision.startswith("int8")}
        if not wanted:
            return
        from mi2rage_export.calibration import inputs_of_graphs
        from mi2rage_export.in_precision import quantized

        data = self._data(self.request.calibration)
        manifest = self._manifest(sources, licences)
        calls = inputs_of_graphs(self.folder, manifest, role, data) if data is not None else {}
        graphs = dict(spec.graphs)
        for name, precision in wanted.items():
            keep = self.request.kept_parts(f"{role}/{name}")
            path = self.folder / graphs[name].file
            graphs[name] = quantized(path, graphs[name], precision, calls.get(name, []), keep)
        self.specs[role] = spec.model_copy(update={"graphs": graphs})

    def _add_denoise_steps(self, role: str) -> None:
        """Put the sampler around a generator's UNet, which is in its precision by now."""
        unet = self.specs[role].graphs.get("unet")
        if unet is None:
            return
        from mi2rage_export.denoise_steps import write_denoise_steps

        graphs = {**self.specs[role].graphs, **write_denoise_steps(self.folder, unet)}
        self.specs[role] = self.specs[role].model_copy(update={"graphs": graphs})

    def _check(self, role: str, sources: dict[str, str], licences: dict[str, str], bar: progress.Steps) -> None:
        bar.note(f"{role}, checking")
        self._manifest(sources, licences)
        self.records += check_in_process(
            self.folder,
            components=(role,),
            providers=("CPUExecutionProvider",),
            data=self.request.verify,
            images=self.request.images,
            limit=self.request.limit,
        ).records
        parity.demand(self.records)
        bar.advance()

    def _manifest(self, sources: dict[str, str], licences: dict[str, str]) -> Manifest:
        """Write the manifest of what is there so far."""
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            source={role: source for role, source in sources.items() if role in self.specs},
            licences={role: licence for role, licence in licences.items() if role in self.specs},
            tool_versions=versions,
            parity=tuple(self.records),
            files=record_files(self.folder),
            **self.specs,
        )
        (self.folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return manifest
