"""The commands of the training package on candidates and classifiers: select, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mi2rage_rt.pool_option import CpusOption, GpusOption, RayOption, WorkersOption

__all__ = ["evaluate", "select", "train"]

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing the file.")]
_Images = Annotated[Path | None, typer.Option("--images", help="Folder of the images; by default the file's own.")]
_Modality = Annotated[str, typer.Option("--modality", help="both, text (no image), or image (mentions, no sentence).")]
_Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """Print a command's summary, for people (figures alone) or as one JSON document."""
    import json

    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            continue
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        typer.echo(f"{name.replace('_', ' '):>20}  {shown}")


def select(
    store: Annotated[str, typer.Argument(help="Store of candidates, from 'synthesize': a folder or an address.")],
    out: Annotated[str, typer.Argument(help="Store to write the kept candidates to.")],
    policy: Annotated[
        str,
        typer.Option(
            help="added (what the made modality adds), information, posterior (drawn by it), similarity, "
            "diversity, k-centre, random, direct (first link) or all."
        ),
    ] = "added",
    per_parent: Annotated[
        int | None,
        typer.Option(help="The most candidates kept of one real sample; by default 2, with direct and all no limit."),
    ] = None,
    per_label: Annotated[int | None, typer.Option(help="The most candidates kept of one label.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the candidates kept, after the limit for each sample.")] = 1.0,
    quota: Annotated[str, typer.Option(help="That share by label: proportional, balanced, or none.")] = "proportional",
    diversity: Annotated[float, typer.Option(help="Weight (0 to 1) of coverage against the policy's score.")] = 0.0,
    similarity_model: Annotated[
        str | None, typer.Option(help="A CLIP folder or hub id, for similarity; by default captions are compared.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="HTML file to show what was kept and dropped, and why.")] = None,
    weighted: Annotated[
        bool,
        typer.Option("--weighted", help="Weigh siblings by their likelihood in training; limits only if asked for."),
    ] = False,
    teachers: Annotated[
        Path | None, typer.Option(help="Folder to keep the teachers in, for 'synthesize --judge'.")
    ] = None,
    fit_on: Annotated[
        int | None,
        typer.Option(help="Real samples whose candidates teachers are fitted on at most; for stores beyond memory."),
    ] = None,
    folds: Annotated[int, typer.Option(help="Teachers of the cross-fitting.")] = 4,
    members: Annotated[int, typer.Option(help="Classifiers of each teacher's ensemble.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds of expectation maximisation.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each teacher.")] = 8,
    text_encoder: Annotated[str, typer.Option(help="embedded, a folder, or a hub id.")] = "embedded",
    image_encoder: Annotated[str, typer.Option(help="embedded, a CLIP folder, or a hub id.")] = "embedded",
    ray: RayOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    device: _Device = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Keep the candidates that a policy ranks first; by default those that add most about the label."""
    from mi2rage_rt.pool_option import pool_options
    from mi2rage_training.choices import choice
    from mi2rage_training.devices import device_from
    from mi2rage_training.fit import FitConfig
    from mi2rage_training.policies import Policy, PolicyConfig, Quota
    from mi2rage_training.selection import SelectionConfig
    from mi2rage_training.selection import select as run
    from mi2rage_training.selection_page import check_page, write_selection_page
    from mi2rage_training.store import StoredCandidates
    from mi2rage_training.teacher import TeacherConfig

    ranking = choice(Policy, policy, "policy")
    limits = PolicyConfig(
        policy=ranking,
        per_parent=2 if per_parent is None and not (weighted or ranking in {Policy.ALL, Policy.DIRECT}) else per_parent,
        per_label=per_label,
        keep=keep,
        quota=choice(Quota, quota, "quota"),
        diversity=diversity,
        seed=seed,
    )
    fit = FitConfig(text_encoder=text_encoder, image_encoder=image_encoder, epochs=epochs, seed=seed)
    teacher = TeacherConfig(folds, fit, members, rounds, device=device_from(device))
    check_page(page)
    pool = pool_options(ray, workers, gpus_per_worker, cpus_per_worker)
    result = run(store, out, SelectionConfig(limits, teacher, similarity_model, teachers, weighted, fit_on), pool)
    summary: dict[str, Any] = {
        "store": out,
        "policy": ranking.value,
        "candidates": len(result.kept),
        "kept": int(result.kept.sum()),
    }
    if result.scores is not None:
        names = ("label_entropy_nats", "bound_nats", "real_bound_nats", "calibration_error_before", "calibration_error")
        summary |= {name: getattr(result.scores, name) for name in names}
    if page is not None:
        write_selection_page(page, StoredCandidates(store), result, seed=seed)
        summary["page"] = str(page)
    print_summary(summary, as_json)


def train(
    data: Annotated[str, typer.Argument(help="A store (folder or address), or labelled samples (JSONL, MNRE rows).")],
    out: Annotated[Path, typer.Argument(help="Folder to write the classifier to.")],
    validation: Annotated[str | None, typer.Option(help="Samples or store that choose the best epoch.")] = None,
    images: _Images = None,
    validation_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    modality: _Modality = "both",
    text_encoder: Annotated[str, typer.Option(help="embedded, a folder, or a hub id.")] = "embedded",
    image_encoder: Annotated[str, typer.Option(help="embedded, a CLIP or SigLIP folder, or a hub id.")] = "embedded",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Rows a step, over all processes.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of AdamW; by default by model size.")] = None,
    max_length: Annotated[int, typer.Option(help="Word pieces a sentence may hold.")] = 64,
    width: Annotated[int, typer.Option(help="Of the fusion.")] = 256,
    text_dropout: Annotated[
        float, typer.Option(help="Share of rows whose sentence is reduced to its mentions in a step.")
    ] = 0.4,
    image_dropout: Annotated[float, typer.Option(help="Share of rows whose image is hidden in a step.")] = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N epochs without a better validation F1; needs --validation.")
    ] = None,
    class_balance: Annotated[float, typer.Option(help="0 off; 1 gives all labels the same weight in the loss.")] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 (needs a GPU) or bf16.")] = "no",
    gradient_accumulation: Annotated[int, typer.Option(help="Parts a step is computed in, to save memory.")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints: what was stopped goes on; deleted once OUT is written.")
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; by default one an epoch.")
    ] = None,
    skip_bad: _SkipBad = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    device: _Device = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Fit the relation classifier on a store of synthetic pairs, or on labelled samples.

    Several processes: accelerate launch --multi_gpu --num_processes N -m mi2rage_rt.cli train ...
    """
    import dataclasses

    from mi2rage_rt.files import atomic_folder, check_absent
    from mi2rage_rt.samples import BadRow
    from mi2rage_training import fit
    from mi2rage_training.choices import choice
    from mi2rage_training.devices import device_from
    from mi2rage_training.pairs import Modality, load_pairs

    check_absent(out, force=force)
    shown = choice(Modality, modality, "modality")
    config = fit.FitConfig(
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        width=width,
        text_dropout=text_dropout,
        image_dropout=image_dropout,
        seed=seed,
        patience=patience,
        class_balance=class_balance,
        mixed_precision=choice(fit.MixedPrecision, mixed_precision, "mixed precision"),
        gradient_accumulation=gradient_accumulation,
        checkpoint_steps=checkpoint_steps,
    )
    bad_rows: list[BadRow] = []
    reading: dict[str, Any] = {"modality": shown, "skip_bad": skip_bad, "bad_rows": bad_rows}
    pairs = load_pairs(data, images=images, **reading)
    held_out = load_pairs(validation, images=validation_images, **reading) if validation else []
    fitted = fit.fit_classifier(
        pairs,
        config,
        validation=held_out,
        device=device_from(device),
        checkpoint=checkpoint,
        weights=[pair.weight for pair in pairs] if any(pair.weight != 1 for pair in pairs) else None,
    )
    if not fit.is_main_process():
        return
    with atomic_folder(out, force=force) as folder:
        fitted.classifier.save(folder)
    if checkpoint is not None:
        fit.discard_checkpoint(checkpoint)
    summary: dict[str, Any] = {
        "classifier": str(out),
        "pairs": len(pairs),
        "skipped_rows": len(bad_rows),
        "with_image": sum(pair.image is not None for pair in pairs),
        "labels": len(fitted.classifier.labels),
        "best_epoch": fitted.best_epoch,
        "steps": fitted.steps,
        "resumed_at_step": fitted.resumed_at,
        "loss_nats": fitted.losses[-1],
    }
    if held_out:
        metrics = dataclasses.asdict(fit.score_pairs(fitted.classifier, held_out))
        summary |= {f"validation_{name}": metrics[name] for name in ("precision", "recall", "f1", "accuracy")}
    print_summary(summary, as_json)


def evaluate(
    classifier: Annotated[Path, typer.Argument(help="A classifier folder, from 'train', or a bundle.")],
    data: Annotated[str, typer.Argument(help="Labelled samples (JSONL or MNRE rows), or a store.")],
    images: _Images = None,
    modality: _Modality = "both",
    skip_bad: _SkipBad = False,
    as_json: _Json = False,
) -> None:
    """Measure micro precision, recall and F1 over the relations, and accuracy over all rows."""
    import dataclasses

    from mi2rage_rt.samples import BadRow
    from mi2rage_training.choices import choice
    from mi2rage_training.evaluation import classifier_from, evaluate_pairs
    from mi2rage_training.pairs import Modality, load_pairs

    bad_rows: list[BadRow] = []
    shown = choice(Modality, modality, "modality")
    pairs = load_pairs(data, images=images, modality=shown, skip_bad=skip_bad, bad_rows=bad_rows)
    metrics = evaluate_pairs(classifier_from(classifier), pairs)
    summary = {"classifier": str(classifier), "data": data, "skipped_rows": len(bad_rows)}
    summary |= dataclasses.asdict(metrics)
    print_summary(summary, as_json)
    if not as_json:
        for label, score in metrics.by_label.items():
            typer.echo(f"{label:>28}  P {score.precision:.3f}  R {score.recall:.3f}  F1 {score.f1:.3f}  n {score.gold}")
