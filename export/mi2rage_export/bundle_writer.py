"""The bundle: graphs, tokenizers, configurations and the manifest, written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.bundle import MANIFEST_NAME, SCHEMA_VERSION, Manifest, ParityRecord, record_files
from mi2rage_engines.errors import InputError, ModelFolderError, require
from mi2rage_engines.spec import CaptionerSpec, ClassifierSpec, GeneratorSpec, GraphSpec, LatentSpec, TokenizerSpec
from mi2rage_rt import progress
from mi2rage_rt.files import atomic_folder
from mi2rage_training.pytorch_captioner import TorchCaptioner
from mi2rage_training.pytorch_models import TorchGenerator
from mi2rage_training.pytorch_sources import quiet_loading

if TYPE_CHECKING:
    from mi2rage_export.graphs import Graph
    from mi2rage_training.classifier_model import LoadedClassifier

__all__ = ["export_bundle"]

_PACKAGES = ("mi2rage-rt", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy")


def export_bundle(
    out: Path | str,
    *,
    generator: str | Path | None = None,
    captioner: str | Path | None = None,
    classifier: str | Path | None = None,
    scheduler: str | None = None,
    force: bool = False,
    seed: int = 0,
) -> Manifest:
    """Export models to ONNX, check each against PyTorch, and write them as one bundle.

    Args:
        out: the bundle's folder; it appears when everything is exported and checked.
        generator: Stable Diffusion folder, hub id, or `embedded`.
        captioner: BLIP folder, hub id, or `embedded`.
        classifier: a folder written by `mi2rage-rt train`.
        scheduler: a sampler in place of the generator's own, one of `samplers.SCHEDULERS`.
        force: replace a bundle that is there already.
        seed: of the inputs that the parity checks draw.

    Raises:
        InputError: no model was given, or `out` exists and `force` is off.
        ModelFolderError: a model cannot be loaded, or is of a kind that cannot be exported.
        MissingExtraError: a package of the extra `export` or `cpu` is missing.
        ParityError: an export differs too much from its model.
    """
    if generator is None and captioner is None and classifier is None:
        raise InputError(
            "nothing to export: no model was given; expected at least one of --generator, --captioner, --classifier"
        )
    for package, extra in (("torch", "export"), ("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "cpu")):
        require(package, extra)
    with atomic_folder(Path(out), force=force) as folder:
        models = _load(generator, captioner, classifier, scheduler)
        sources = {"generator": generator, "captioner": captioner, "classifier": classifier}
        return _fill(folder, models, {role: str(name) for role, name in sources.items() if name is not None}, seed)


def _load(
    generator: str | Path | None, captioner: str | Path | None, classifier: str | Path | None, scheduler: str | None
) -> dict[str, Any]:
    """The models by role, all in float32 on the CPU: a wrong folder is found before anything is exported."""
    import torch

    models: dict[str, Any] = {}
    with progress.steps("loading models"):
        if generator is not None:
            models["generator"] = TorchGenerator.from_folder(
                generator, device="cpu", dtype=torch.float32, scheduler=scheduler
            )
        if captioner is not None:
            models["captioner"] = TorchCaptioner.from_folder(captioner, device="cpu", dtype=torch.float32)
        if classifier is not None:
            from mi2rage_training.classifier_model import load_classifier

            models["classifier"] = load_classifier(classifier)
    return models


def _fill(folder: Path, models: dict[str, Any], sources: dict[str, str], seed: int) -> Manifest:
    from mi2rage_export.components import captioner_graphs, classifier_graphs, generator_graphs

    graphs_of: dict[str, Callable[[Any], tuple[Graph, ...]]] = {
        "generator": generator_graphs,
        "captioner": captioner_graphs,
        "classifier": classifier_graphs,
    }
    graphs = {role: graphs_of[role](model) for role, model in models.items()}
    specs: dict[str, Any] = {}
    records: list[ParityRecord] = []
    with progress.steps("exporting", 2 * sum(map(len, graphs.values())) + len(graphs)) as bar:
        for role, model in models.items():
            (folder / role).mkdir()
            # What needs no tracing first: an unsupported scheduler or tokenizer shows at once.
            fields = _WRITERS[role](folder / role, model)
            exported = {}
            for graph in graphs[role]:
                bar.note(graph.name)
                exported[graph.name.rpartition("/")[2]] = _export(folder, graph, records, bar, seed)
            specs[role] = _SPECS[role](graphs=exported, **fields)
        manifest = _manifest(folder, specs, sources, records)
        records += _compare(folder, manifest, models, bar, seed)
    manifest = manifest.model_copy(update={"parity": tuple(records)})
    _write(folder, manifest)
    return manifest


def _export(folder: Path, graph: Graph, records: list[ParityRecord], bar: progress.Steps, seed: int) -> GraphSpec:
    from mi2rage_export.parity import check_graph, demand
    from mi2rage_export.to_onnx import export_graph

    component, name = graph.name.split("/")
    # A generator's parts have folders of their own, as in optimum's layout.
    file = f"{component}/{name}/model.onnx" if component == "generator" else f"{component}/{name}.onnx"
    spec = export_graph(graph, folder / file, file)
    bar.advance()
    records.append(demand(check_graph(graph, folder / file, seed=seed)))
    bar.advance()
    return spec


def _compare(
    folder: Path, manifest: Manifest, models: dict[str, Any], bar: progress.Steps, seed: int
) -> Iterator[ParityRecord]:
    """The finished draft, opened by the runtime, against the PyTorch models: one record a component."""
    from mi2rage_export import parity
    from mi2rage_rt.bundle import Bundle

    _write(folder, manifest)
    bundle = Bundle.open(folder, providers=("CPUExecutionProvider",))
    for role, model in models.items():
        bar.note(f"{role}, end to end")
        check = getattr(parity, f"check_{role}")
        yield parity.demand(check(getattr(bundle, role)(), model, seed=seed))
        bar.advance()


def _manifest(folder: Path, specs: dict[str, Any], sources: dict[str, str], records: list[ParityRecord]) -> Manifest:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        precision="float32",
        source=sources,
        tool_versions=versions,
        parity=tuple(records),
        files=record_files(folder),
        **specs,
    )


def _write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_generator(folder: Path, generator: TorchGenerator) -> dict[str, Any]:
    """Everything but the graphs, as diffusers and optimum lay it out; returns the manifest's fields."""
    from mi2rage_export.schedules import STEP_COUNTS, schedule_tables

    pipeline, settings = generator.pipeline, generator.settings
    schedules = schedule_tables(pipeline.scheduler, (*STEP_COUNTS, settings.steps))
    if settings.steps not in {table.steps for table in schedules}:
        raise ModelFolderError(
            f"{generator.name}: its scheduler {type(pipeline.scheduler).__name__} cannot do the {settings.steps} steps "
            f"that it is set to; expected one of {[table.steps for table in schedules]}"
        )
    with quiet_loading():
        pipeline.save_config(folder)
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.tokenizer.save_pretrained(folder / "tokenizer")
        pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
        pipeline.unet.save_config(folder / "unet")
        pipeline.vae.save_config(folder / "vae_decoder")
    # Older transformers, which optimum still wants, read CLIP's vocabulary from vocab.json and merges.txt.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    _drop_local_paths(folder)
    tokenizer = TokenizerSpec(
        file="generator/tokenizer/tokenizer.json",
        max_length=int(pipeline.tokenizer.model_max_length),
        pad_id=int(pipeline.tokenizer.pad_token_id),
    )
    _check_tokenizer(generator, tokenizer, folder.parent)
    latents = LatentSpec(
        channels=int(pipeline.unet.config.in_channels),
        downsampling=int(pipeline.vae_scale_factor),
        multiple=2 ** (len(pipeline.unet.config.block_out_channels) - 1),
        scaling_factor=float(pipeline.vae.config.scaling_factor),
    )
    return {
        "name": generator.name,
        "tokenizer": tokenizer,
        "schedules": schedules,
        "latents": latents,
        "height": settings.height,
        "width": settings.width,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }


def _drop_local_paths(folder: Path) -> None:
    """diffusers notes in its configs where a model was loaded from; the same model must give the same bundle."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("model_index.json", "config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_tokenizer(generator: TorchGenerator, spec: TokenizerSpec, folder: Path) -> None:
    """The runtime reads `tokenizer.json` alone; its ids must be those of the pipeline's tokenizer."""
    from mi2rage_rt.text import PlainTokenizer

    texts = [
        "",
        "A photo of a cat, 2 dogs & the Eiffel tower!",
        "RT @user: caf\u00e9 \u2615 #Paris http://t.co/x " * 20,
    ]
    tokenizer = generator.pipeline.tokenizer
    expected = tokenizer(texts, padding="max_length", max_length=spec.max_length, truncation=True).input_ids
    if PlainTokenizer(spec, folder).encode(texts).tolist() != expected:
        raise ModelFolderError(
            f"{generator.name}: its tokenizer.json gives other ids than its {type(tokenizer).__name__}; expected a "
            "fast tokenizer; save it anew with transformers and export again"
        )


def _write_captioner(folder: Path, captioner: TorchCaptioner) -> dict[str, Any]:
    """The tokenizer; returns the manifest's fields."""
    shutil.copyfile(captioner.tokenizer_file, folder / "tokenizer.json")
    text = captioner.module.config.text_config
    return {
        "name": captioner.name,
        "tokenizer": TokenizerSpec(
            file="captioner/tokenizer.json", max_length=captioner.max_length, pad_id=captioner.pad_id
        ),
        "preprocessing": captioner.preprocessing,
        "bos_id": captioner.bos_id,
        "eos_id": captioner.eos_id,
        "layers": int(text.num_hidden_layers),
        "heads": int(text.num_attention_heads),
        "head_size": int(text.hidden_size) // int(text.num_attention_heads),
        "max_new_tokens": captioner.max_new_tokens,
    }


def _write_classifier(folder: Path, classifier: LoadedClassifier) -> dict[str, Any]:
    """The tokenizer; returns the manifest's fields."""
    classifier.tokenizer.save(folder / "tokenizer.json")
    return {
        "name": classifier.name,
        "tokenizer": TokenizerSpec(
            file="classifier/tokenizer.json", max_length=classifier.max_length, pad_id=classifier.pad_id
        ),
        "preprocessing": classifier.preprocessing,
        "labels": classifier.labels,
    }


_SPECS: dict[str, Any] = {"generator": GeneratorSpec, "captioner": CaptionerSpec, "classifier": ClassifierSpec}
_WRITERS: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "generator": _write_generator,
    "captioner": _write_captioner,
    "classifier": _write_classifier,
}
