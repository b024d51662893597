"""The task's own figures on given samples: a bundle against what PyTorch made of them when it was exported."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi2rage_engines.bundle import ParityRecord, sha256_of
from mi2rage_engines.errors import DataError
from mi2rage_export import parity
from mi2rage_export.given_data import GivenData, first_equal_images
from mi2rage_export.reference import DataReference, read_answers
from mi2rage_rt.noise import seed_from

if TYPE_CHECKING:
    from mi2rage_engines.spec import Precision
    from mi2rage_rt.bundle import Bundle

__all__ = ["check_given", "precision_of"]


def precision_of(bundle: Bundle, role: str) -> Precision:
    """The lowest precision of a component's graphs."""
    return parity.lowest(getattr(bundle.manifest, role).graphs.values())


def check_given(
    bundle: Bundle, roles: Sequence[str], reference: DataReference | None, data: GivenData
) -> list[ParityRecord]:
    """F1 before and after, agreement of decisions, captions, images.

    Args:
        bundle: what is checked.
        roles: of the components.
        reference: what PyTorch made of the samples; None where there was no data.
        data: the samples.

    Raises:
        DataError: these are not the samples of the export, or fewer of them.
    """
    if reference is None:
        raise DataError(
            f"{data.file}: {bundle.folder} was exported without data, so there is nothing to compare with; "
            "export it again with --verify"
        )
    if sha256_of(data.file) != reference.sha256:
        raise DataError(
            f"{data.file}: is not the file that {bundle.folder} was exported with ({reference.file}, "
            f"SHA-256 {reference.sha256[:12]}...); give that one"
        )
    if len(data.samples) < reference.rows:
        raise DataError(
            f"{data.file}: came with its first {len(data.samples)} rows; expected {reference.rows} of them, as in the "
            f"export; give --limit {reference.rows}, or leave it out"
        )
    answers = read_answers(bundle.folder, "data")
    records: list[ParityRecord] = []
    if "classifier" in roles:
        records += _check_decisions(bundle, answers["logits"], data, reference.rows)
    if "captioner" in roles and reference.images:
        shown = list(itertools.islice((image for image in data.images if image is not None), reference.images))
        found = bundle.captioner().caption(shown)
        shares = [
            parity.common_prefix(mine.split(), theirs.split())
            for mine, theirs in zip(found, reference.captions, strict=True)
        ]
        equal = float(np.mean([mine == theirs for mine, theirs in zip(found, reference.captions, strict=True)]))
        bound = parity.BOUNDS[precision_of(bundle, "captioner")].caption_prefix
        records.append(
            parity.record("data/captioner", "caption_prefix", float(np.mean(shares)), bound, len(shown), least=True)
        )
        records.append(parity.record("data/captioner", "caption_agreement", equal, bound, len(shown), least=True))
    if "generator" in roles and reference.prompts:
        records.append(_check_images(bundle, answers["images"], data, reference))
    return records


def _check_decisions(bundle: Bundle, before: Any, data: GivenData, rows: int) -> list[ParityRecord]:
    from mi2rage_training.metrics import relation_metrics

    classifier = bundle.classifier()
    images = data.images[:rows]
    after = classifier.logits(data.samples[:rows], images, first_equal_images(images))
    bounds = parity.BOUNDS[precision_of(bundle, "classifier")]
    agree = parity.agreement(after, before)
    records = [
        parity.record("data/classifier", "decision_agreement", agree, bounds.decision_agreement, rows, least=True)
    ]
    gold = [sample.label for sample in data.samples[:rows]]
    if all(label is not None for label in gold):
        labels = np.array(classifier.labels)
        f1 = [
            100 * relation_metrics([str(label) for label in gold], labels[logits.argmax(-1)].tolist()).f1
            for logits in (before, np.nan_to_num(after))
        ]
        records += [
            parity.record("data/classifier", "f1_before", f1[0], None, rows),
            parity.record("data/classifier", "f1_after", f1[1], None, rows),
            # Few rows cannot hold a bound that is finer than two of their decisions.
            parity.record(
                "data/classifier",
                "f1_change",
                abs(f1[1] - f1[0]),
                max(bounds.f1, 200 / rows) if bounds.f1 else 0.0,
                rows,
            ),
        ]
    return records


def _check_images(bundle: Bundle, expected: Any, data: GivenData, reference: DataReference) -> ParityRecord:
    from mi2rage_rt.generator import GenerateOptions

    samples = data.samples[: reference.prompts]
    seeds = [seed_from("parity data", sample.id) for sample in samples]
    prompts = [sample.text for sample in samples]
    images = bundle.generator().generate(prompts, seeds, GenerateOptions(steps=reference.steps))
    bound = parity.BOUNDS[precision_of(bundle, "generator")].image_psnr_db
    value = parity.psnr_db(images, expected)
    return parity.record("data/generator", "image_psnr_db", value, bound, len(samples), least=True)
