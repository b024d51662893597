"""The commands of the training package: synthesize, select, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["evaluate", "select", "synthesize", "train"]

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing the file.")]
_Images = Annotated[Path | None, typer.Option("--images", help="Folder of the images; by default the file's own.")]
_Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def _print(summary: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            continue
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        typer.echo(f"{name.replace('_', ' '):>20}  {shown}")


def synthesize(
    samples: Annotated[Path, typer.Argument(help="Labelled sentences: JSONL, or MNRE rows.")],
    out: Annotated[Path, typer.Argument(help="Store to write; an unfinished one of the same settings goes on.")],
    generator: Annotated[str, typer.Option(help="embedded, a diffusers folder, or a hub id.")] = "embedded",
    captioner: Annotated[str, typer.Option(help="embedded, a BLIP folder, or a hub id.")] = "embedded",
    links: Annotated[int, typer.Option(help="Images made one after the other from each sentence.")] = 3,
    width: Annotated[int, typer.Option(help="Independent chains a sentence.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N sentences.")] = None,
    shard_size: Annotated[int, typer.Option(help="Sentences a shard; the unit of commit and resume.")] = 32,
    image_format: Annotated[str, typer.Option(help="png (lossless) or jpeg.")] = "png",
    skip_bad: _SkipBad = False,
    device: _Device = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Make images for labelled sentences by Chained Cross-modal Generation (text setting)."""
    import dataclasses

    from mi2rage_rt.samples import BadRow, read_samples
    from mi2rage_training.chain import ChainConfig, ImageFormat
    from mi2rage_training.chain import synthesize as run
    from mi2rage_training.choices import choice
    from mi2rage_training.devices import device_from
    from mi2rage_training.pytorch_models import TorchCaptioner, TorchGenerator

    bad_rows: list[BadRow] = []
    config = ChainConfig(
        links=links,
        width=width,
        seed=seed,
        shard_size=shard_size,
        image_format=choice(ImageFormat, image_format, "image format"),
    )
    rows = read_samples(samples, skip_bad=skip_bad, bad_rows=bad_rows)[:limit]
    place = device_from(device)
    text_to_image = TorchGenerator.from_folder(generator, device=place, steps=steps, guidance_scale=guidance)
    image_to_text = TorchCaptioner.from_folder(captioner, device=place)
    models = {"generator": generator, "captioner": captioner, **dataclasses.asdict(text_to_image.settings)}
    manifest = run(rows, out, text_to_image, image_to_text, config, models)
    summary = {"store": str(out), "sentences": len(rows), "skipped_rows": len(bad_rows), "candidates": manifest.rows}
    _print(summary | {"shards": len(manifest.shards)}, as_json)


def select(
    store: Annotated[Path, typer.Argument(help="Store of candidates, from 'synthesize'.")],
    out: Annotated[Path, typer.Argument(help="Store to write the kept candidates to.")],
    score: Annotated[str, typer.Option(help="added (what the image adds to the text) or information.")] = "added",
    per_parent: Annotated[int, typer.Option(help="The most candidates kept of one real sentence.")] = 2,
    keep: Annotated[float, typer.Option(help="Share of each label's candidates kept, after that limit.")] = 1.0,
    folds: Annotated[int, typer.Option(help="Teachers of the cross-fitting.")] = 4,
    epochs: Annotated[int, typer.Option(help="Epochs of each teacher.")] = 8,
    text_encoder: Annotated[str, typer.Option(help="embedded, a folder, or a hub id.")] = "embedded",
    image_encoder: Annotated[str, typer.Option(help="embedded, a CLIP folder, or a hub id.")] = "embedded",
    device: _Device = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Keep the candidates that carry most information about the label, by a cross-fitted teacher."""
    from mi2rage_training.choices import choice
    from mi2rage_training.devices import device_from
    from mi2rage_training.fit import FitConfig
    from mi2rage_training.selection import Score, SelectionConfig
    from mi2rage_training.selection import select as run
    from mi2rage_training.teacher import TeacherConfig

    fit = FitConfig(text_encoder=text_encoder, image_encoder=image_encoder, epochs=epochs, image_dropout=0.3, seed=seed)
    teacher = TeacherConfig(folds=folds, fit=fit, device=device_from(device))
    config = SelectionConfig(score=choice(Score, score, "score"), per_parent=per_parent, keep=keep, teacher=teacher)
    result = run(store, out, config)
    summary = {
        "store": str(out),
        "candidates": len(result.kept),
        "kept": int(result.kept.sum()),
        "label_entropy_nats": result.scores.label_entropy_nats,
        "bound_nats": result.scores.bound_nats,
        "text_bound_nats": result.scores.text_bound_nats,
    }
    _print(summary, as_json)


def train(
    data: Annotated[Path, typer.Argument(help="A store, or labelled samples (JSONL or MNRE rows).")],
    out: Annotated[Path, typer.Argument(help="Folder to write the classifier to.")],
    validation: Annotated[Path | None, typer.Option(help="Samples or store that choose the best epoch.")] = None,
    images: _Images = None,
    validation_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    modality: Annotated[str, typer.Option(help="both, or text (no image is shown).")] = "both",
    text_encoder: Annotated[str, typer.Option(help="embedded, a folder, or a hub id.")] = "embedded",
    image_encoder: Annotated[str, typer.Option(help="embedded, a CLIP folder, or a hub id.")] = "embedded",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of AdamW; by default by model size.")] = None,
    max_length: Annotated[int, typer.Option(help="Word pieces a sentence may hold.")] = 64,
    skip_bad: _SkipBad = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    device: _Device = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Fit the relation classifier on a store of synthetic pairs, or on labelled samples."""
    import dataclasses

    from mi2rage_rt.files import atomic_folder, check_absent
    from mi2rage_training.choices import choice
    from mi2rage_training.devices import device_from
    from mi2rage_training.fit import FitConfig, fit_classifier, score_pairs
    from mi2rage_training.pairs import Modality, load_pairs

    check_absent(out, force=force)
    shown = choice(Modality, modality, "modality")
    config = FitConfig(
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
    )
    pairs = load_pairs(data, images=images, modality=shown, skip_bad=skip_bad)
    held_out = load_pairs(validation, images=validation_images, modality=shown, skip_bad=skip_bad) if validation else []
    fitted = fit_classifier(pairs, config, validation=held_out, device=device_from(device))
    with atomic_folder(out, force=force) as folder:
        fitted.classifier.save(folder)
    summary: dict[str, Any] = {
        "classifier": str(out),
        "pairs": len(pairs),
        "with_image": sum(pair.image is not None for pair in pairs),
        "labels": len(fitted.classifier.labels),
        "best_epoch": fitted.best_epoch,
        "loss_nats": fitted.losses[-1],
    }
    if held_out:
        metrics = dataclasses.asdict(score_pairs(fitted.classifier, held_out))
        summary |= {f"validation_{name}": metrics[name] for name in ("precision", "recall", "f1", "accuracy")}
    _print(summary, as_json)


def evaluate(
    classifier: Annotated[Path, typer.Argument(help="A classifier folder, from 'train', or a bundle.")],
    data: Annotated[Path, typer.Argument(help="Labelled samples (JSONL or MNRE rows), or a store.")],
    images: _Images = None,
    modality: Annotated[str, typer.Option(help="both, or text (no image is shown).")] = "both",
    skip_bad: _SkipBad = False,
    as_json: _Json = False,
) -> None:
    """Measure micro precision, recall and F1 over the relations, and accuracy over all rows."""
    import dataclasses

    from mi2rage_training.choices import choice
    from mi2rage_training.evaluation import classifier_from, evaluate_pairs
    from mi2rage_training.pairs import Modality, load_pairs

    pairs = load_pairs(data, images=images, modality=choice(Modality, modality, "modality"), skip_bad=skip_bad)
    metrics = evaluate_pairs(classifier_from(classifier), pairs)
    summary = {"classifier": str(classifier), "data": str(data), **dataclasses.asdict(metrics)}
    _print(summary, as_json)
    if not as_json:
        for label, score in metrics.by_label.items():
            typer.echo(f"{label:>28}  P {score.precision:.3f}  R {score.recall:.3f}  F1 {score.f1:.3f}  n {score.gold}")
