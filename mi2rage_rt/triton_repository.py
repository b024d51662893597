"""A Triton model repository from a bundle: each graph a model, and the loops around them as python-backend models.

```
REPO/README.md
REPO/generator_unet/config.pbtxt, 1/model.onnx          each graph: NAME is <component>_<graph>
REPO/generator/config.pbtxt, 1/model.py, 1/component.json, 1/<tokenizers>
```
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mi2rage_engines.bundle import Manifest, open_manifest
from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.plan import PlanRecord, Present, check_plan, graph_sha256_from_manifest, read_record
from mi2rage_engines.spec import ComponentSpec, GraphSpec
from mi2rage_rt import caption_options, generator
from mi2rage_rt.files import atomic_folder, check_absent
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.triton_config import PlanFacts, TritonOptions, graph_config, service_config, text_from_config
from mi2rage_rt.triton_loops import COMPONENT_FILE, ServedComponent
from mi2rage_rt.triton_page import WrittenModel, page_from_models

logger = logging.getLogger(__name__)

__all__ = ["write_repository"]

_MODEL_PY = '''"""The {kind} of a mi2rage-rt bundle; its graphs are models of this repository, called by their names."""

from mi2rage_rt.triton_backend import BundleModel


class TritonPythonModel(BundleModel):
    pass
'''


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    path: Path
    record: PlanRecord

    @property
    def facts(self) -> PlanFacts:
        profiles = self.record.request.profiles
        batches = [profile["batch"].max for profile in profiles if "batch" in profile]
        return PlanFacts(len(profiles), max(batches, default=None))


def write_repository(
    bundle: Path | str, out: Path | str, options: TritonOptions | None = None, *, force: bool = False
) -> list[WrittenModel]:
    """Write a bundle as a Triton model repository, whole or not at all.

    Graphs and plans are linked where both folders share a file system; weights that lie beside a graph are copied.

    Args:
        bundle: the folder that `mi2rage-rt export` wrote.
        out: the repository's folder.
        options: by default ONNX Runtime on the CPU.
        force: replace a folder that is there already.

    Returns:
        The models, services first.

    Raises:
        BundleError: the bundle is not whole, lacks a model that was asked for, or has no plan that fits.
        InputError: `out` exists and `force` is off, or lies in the bundle or around it.
        OSError: the repository cannot be written.
    """
    folder, place, options = Path(bundle), Path(out), options or TritonOptions()
    _check_apart(folder, place)
    check_absent(place, force=force)
    manifest = open_manifest(folder)
    components = _components(folder, manifest, options)
    plans = _plans(folder, manifest, components, options)
    with atomic_folder(place, force=force) as draft:
        services, graphs = [], []
        for component in components:
            used = _graphs(component)
            batch_size = _batch_size(component, used, plans, options)
            services.append(_write_service(draft, folder, component, batch_size, options))
            graphs += [
                _write_graph(draft, folder, f"{component.kind}/{name}", used[name], plans, options) for name in used
            ]
        written = [*services, *graphs]
        page = page_from_models(written, options, [plan.record for plan in plans.values()], place.name)
        (draft / "README.md").write_text(page, encoding="utf-8")
    return written


def _check_apart(bundle: Path, out: Path) -> None:
    one, other = bundle.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(f"{out}: lies in the bundle {bundle} or around it; expected a folder beside it; give another")


def _components(folder: Path, manifest: Manifest, options: TritonOptions) -> list[ComponentSpec]:
    there = {component.kind: component for component in manifest.components}
    missing = [name for name in options.models if name not in there]
    if missing:
        raise BundleError(
            f"{folder}: has no {', '.join(missing)}; it has {', '.join(there) or 'nothing'}; name some of these, or "
            "export a bundle that has it"
        )
    found = [component for name, component in there.items() if not options.models or name in options.models]
    if not found:
        raise BundleError(f"{folder}: has no component; expected {', '.join(MODELS)}, or some of them; export again")
    return found


def _graphs(component: ComponentSpec) -> dict[str, GraphSpec]:
    """The graphs that the runtime calls; others need not be loaded."""
    if component.kind == "generator":
        return generator.graphs_to_load(component)
    if component.kind == "captioner":
        # A cache of fixed length is for CUDA graphs, which Triton's backends do not record for it.
        return caption_options.graphs_to_load(component, None, on_host=True)
    return {str(name): graph for name, graph in component.graphs.items()}


def _batch_size(
    component: ComponentSpec, graphs: dict[str, GraphSpec], plans: dict[str, _Plan], options: TritonOptions
) -> int:
    """Rows at most that each of the component's plans takes; guidance doubles the UNet's."""
    size = options.max_batch
    for name in graphs:
        plan = plans.get(f"{component.kind}/{name}")
        most = plan.facts.max_batch if plan else None
        if most is not None:
            size = min(size, max(1, most // 2) if name == "unet" else most)
    return size


def _write_service(
    draft: Path, bundle: Path, component: ComponentSpec, batch_size: int, options: TritonOptions
) -> WrittenModel:
    name = component.kind
    version = draft / name / str(options.version)
    version.mkdir(parents=True)
    (version / "model.py").write_text(_MODEL_PY.format(kind=name), encoding="utf-8")
    used = {graph: f"{name}_{graph}" for graph in _graphs(component)}
    served = ServedComponent(component=component, graphs=used)
    (version / COMPONENT_FILE).write_text(served.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for tokenizer in (component.tokenizer, getattr(component, "tokenizer_2", None)):
        if tokenizer is not None:
            _place(bundle / tokenizer.file, version / tokenizer.file)
    labels = len(component.labels) if component.kind == "classifier" else 0
    config = service_config(name, MODELS[name], labels, batch_size, options, on_device=options.kind == "gpu")
    (draft / name / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
    return WrittenModel(name, "python", options.max_batch, name)


def _write_graph(
    draft: Path, bundle: Path, full_name: str, graph: GraphSpec, plans: dict[str, _Plan], options: TritonOptions
) -> WrittenModel:
    name, plan = full_name.replace("/", "_"), plans.get(full_name)
    version = draft / name / str(options.version)
    config = graph_config(name, graph, options, plan.facts if plan else None)
    if plan:
        _place(plan.path, version / "model.plan")
        source = plan.path
    else:
        source = bundle / graph.file
        _place(source, version / "model.onnx")
        for data in _external_data(source):
            # onnx takes a second link to a graph's weights for an attack, and would no longer load the bundle's own.
            shutil.copyfile(data, version / data.name)
    (draft / name / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
    runs_on = "tensorrt" if plan else "onnxruntime"
    return WrittenModel(name, runs_on, config["max_batch_size"], source.relative_to(bundle).as_posix())


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _external_data(graph: Path) -> Iterator[Path]:
    """The files beside a graph that it names as the place of its weights.

    One may be another graph's: a generator's `denoise_step` shares the UNet's weights.
    """
    others = [file for file in sorted(graph.parent.iterdir()) if file.is_file() and file != graph]
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for other in others:
            # A StringStringEntryProto: field 1 "location", field 2 the name with its length before it.
            name = other.name.encode()
            if len(name) < 128 and content.find(b"\x0a\x08location\x12" + bytes([len(name)]) + name) >= 0:
                yield other


def _plans(
    folder: Path, manifest: Manifest, components: list[ComponentSpec], options: TritonOptions
) -> dict[str, _Plan]:
    """The plan of each graph that has a fitting one."""
    if options.platform != "tensorrt":
        return {}
    target = folder / "plans" / _target(folder, options.target)
    found: dict[str, _Plan] = {}
    for component in components:
        for name, graph in _graphs(component).items():
            path = target / f"{component.kind}-{name}.plan"
            if not path.is_file():
                continue
            if not all(tensor.shape for tensor in (*graph.inputs, *graph.outputs)):
                logger.warning(
                    "%s/%s stays on ONNX Runtime: it has a scalar input, which Triton's TensorRT backend does not take",
                    component.kind,
                    name,
                )
                continue
            record = read_record(path)
            sha256 = graph_sha256_from_manifest(manifest, graph.file)
            check_plan(path, record, Present("tensorrt", record.request.version, graph_sha256=sha256))
            found[f"{component.kind}/{name}"] = _Plan(path, record)
    versions = {plan.record.request.version for plan in found.values()}
    if len(versions) > 1:
        raise BundleError(
            f"{target}: plans of TensorRT {' and '.join(sorted(versions))}; expected one version, for a server has "
            "one; build them again with --force"
        )
    if not found:
        raise BundleError(
            f"{target}: no plan of a graph that is needed; expected some made by 'mi2rage-rt build {folder} --backend "
            "tensorrt'; build them, or leave --platform tensorrt out"
        )
    return found


def _target(folder: Path, wanted: str | None) -> str:
    plans = folder / "plans"
    there = sorted(path.name for path in plans.iterdir() if path.is_dir()) if plans.is_dir() else []
    if wanted in there or (wanted is None and len(there) == 1):
        return wanted or there[0]
    raise BundleError(
        f"{folder}: plans for {', '.join(there) or 'no target'}; expected "
        f"{wanted or 'those of one target'}; name one with --target, or make them with 'mi2rage-rt build {folder} "
        "--backend tensorrt'"
    )
