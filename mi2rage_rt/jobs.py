"""The work behind the commands: whole lists through a bundle's components, results written as they are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mi2rage_engines.errors import DataError, InputError
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_engines.spec import CaptionerSpec, ClassifierSpec, GraphSpec
from mi2rage_rt import noise
from mi2rage_rt.captioner import RuntimeCaptioner
from mi2rage_rt.classifier import RuntimeClassifier
from mi2rage_rt.files import atomic_bytes, atomic_text
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.image_folder import find_image
from mi2rage_rt.images import encode_image, fitted, load_image
from mi2rage_rt.prefetch import Loaded, prefetch
from mi2rage_rt.progress import steps
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample

logger = logging.getLogger(__name__)

__all__ = [
    "IMAGES_MANIFEST",
    "ROWS_AT_ONCE",
    "Skipped",
    "caption_files",
    "generate_files",
    "nothing_left",
    "predict_samples",
    "predict_some",
    "read_prompts",
]

IMAGES_MANIFEST = "manifest.jsonl"
ROWS_AT_ONCE = 64
"""Samples that are sorted into batches together, at least."""
_AHEAD = 64
"""Images that are decoded in advance."""
_REDUCING_GAP = 2
"""What is decoded smaller is still so many times as large as the model wants it: resizing then does the rest."""

T = TypeVar("T")


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    if size < 1:
        raise InputError(f"batch size {size}: expected 1 or more")
    for start in range(0, len(items), size):
        yield items[start : start + size]


def read_prompts(path: Path) -> list[str]:
    """The prompts in a UTF-8 text file, one a line; blank lines are passed over.

    Raises:
        DataError: the file cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a UTF-8 text file, one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path}: no prompts in it; expected one a line")
    return prompts


def generate_files(
    generator: RuntimeGenerator, prompts: Sequence[str], out: Path, *, seed: int, options: GenerateOptions, force: bool
) -> list[dict[str, Any]]:
    """Make one PNG a prompt and a manifest, JSON lines of file, prompt, seed, settings and SHA-256.

    An interruption leaves the images made so far, whole, and a manifest of just these.

    Args:
        generator: a bundle's.
        prompts: the k-th prompt's noise is keyed by `(seed, k)`.
        out: the folder; made with the first image.
        seed: of the run.
        options: sizes, steps, guidance.
        force: write into a folder that holds files already.

    Raises:
        InputError: `out` is in the way, or the options do not fit the generator.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected the name of a folder to write")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out}: exists and is not empty; give another folder, or --force to write into it")
    rows: list[dict[str, Any]] = []
    numbered = list(enumerate(prompts))
    try:
        with steps("generate", len(prompts)) as bar:
            for chunk in _chunks(numbered, generator.batch_size(len(prompts), options)):
                seeds = [noise.seed_from(seed, index) for index, _ in chunk]
                images = generator.generate([prompt for _, prompt in chunk], seeds, options)
                for (index, prompt), row_seed, image in zip(chunk, seeds, images, strict=True):
                    name = f"{index:06d}.png"
                    content = encode_image(image)
                    atomic_bytes(out / name, content)
                    rows.append(_image_row(name, prompt, row_seed, content, image, generator, options))
                bar.advance(len(chunk))
    finally:
        if rows:
            with atomic_text(out / IMAGES_MANIFEST) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows


def _image_row(
    name: str,
    prompt: str,
    seed: int,
    content: bytes,
    image: Image,
    generator: RuntimeGenerator,
    options: GenerateOptions,
) -> dict[str, Any]:
    spec = generator.spec
    guidance = spec.guidance_scale if options.guidance_scale is None else options.guidance_scale
    whole = options.guidance_interval == (0.0, 1.0)
    return {
        "file": name,
        "prompt": prompt,
        "seed": seed,
        "height": image.shape[0],
        "width": image.shape[1],
        "steps": options.steps or spec.steps,
        "guidance_scale": guidance,
        **({} if whole else {"guidance_interval": list(options.guidance_interval)}),
        **({} if options.feature_cache == 1 else {"feature_cache": options.feature_cache}),
        "model": generator.name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def caption_files(
    captioner: RuntimeCaptioner,
    paths: Sequence[Path],
    *,
    prefix: str = "",
    seed: int | None = None,
    fast_jpeg: bool = False,
) -> list[dict[str, str]]:
    """Caption image files: `{"image": .., "caption": ..}` in the order given; files are decoded ahead in threads.

    Args:
        captioner: a bundle's, with its options.
        paths: the files.
        prefix: what every caption begins with.
        seed: of nucleus sampling, the k-th image's draws keyed by `(seed, k)`; None decodes greedily, or with
            the captioner's beams.
        fast_jpeg: decode large JPEGs smaller, see `load_image`; pixels, and so captions, may differ.

    Raises:
        DataError: an image cannot be read.
    """
    rows: list[dict[str, str]] = []
    load = _loader(captioner.spec, "vision", fast_jpeg)
    with (
        steps("caption", len(paths)) as bar,
        prefetch(paths, load, ahead=_AHEAD, workers=usable_cores()) as loaded,
    ):
        for chunk in _chunks(list(enumerate(paths)), captioner.options.batch_size):
            captions = captioner.caption(
                [next(loaded).get() for _ in chunk],
                [prefix] * len(chunk),
                None if seed is None else [noise.seed_from(seed, index) for index, _ in chunk],
            )
            rows += [{"image": str(path), "caption": text} for (_, path), text in zip(chunk, captions, strict=True)]
            bar.advance(len(chunk))
    return rows


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that was left out, and why."""

    id: str
    reason: str


def predict_samples(
    classifier: RuntimeClassifier,
    samples: Sequence[Sample],
    images: Path | None,
    *,
    skip_bad: bool = False,
    skipped: list[Skipped] | None = None,
    fast_jpeg: bool = False,
) -> list[dict[str, Any]]:
    """Predict the relation of samples: id, head, tail, relation, probability, and the label where it is known.

    Args:
        classifier: a bundle's.
        samples: with or without labels and images.
        images: the folder their images are looked for in, see `find_image`; None leaves the images out.
        skip_bad: leave out (and log) samples whose image or label is unusable, instead of refusing all.
        skipped: a list that those are appended to.
        fast_jpeg: decode large JPEGs smaller, see `load_image`; pixels, and so answers, may differ.

    Raises:
        DataError: an image is missing or unreadable, or a label unknown to the classifier.
    """
    rows = predict_some(classifier, samples, images, skip_bad=skip_bad, skipped=skipped, fast_jpeg=fast_jpeg)
    if not rows:
        raise nothing_left(len(samples))
    return rows


def nothing_left(count: int) -> DataError:
    """The error where all samples were skipped."""
    return DataError(f"all {count} samples were skipped; expected at least one usable; see the warnings")


def predict_some(
    classifier: RuntimeClassifier,
    samples: Sequence[Sample],
    images: Path | None,
    *,
    skip_bad: bool = False,
    skipped: list[Skipped] | None = None,
    fast_jpeg: bool = False,
) -> list[dict[str, Any]]:
    """As `predict_samples`, but for a part of the samples, all of which may be skipped."""
    rows: list[dict[str, Any]] = []
    read = _loader(classifier.spec, "image" if "image" in classifier.spec.graphs else "classifier", fast_jpeg)

    def load(name: str | None) -> Image | None:
        return None if name is None or images is None else read(find_image(images, name))

    with (
        steps("predict", len(samples)) as bar,
        prefetch((sample.image for sample in samples), load, ahead=_AHEAD, workers=usable_cores()) as loaded,
    ):
        for chunk in _chunks(samples, max(ROWS_AT_ONCE, classifier.batch_size)):
            kept: list[tuple[Sample, Image | None]] = []
            for sample, image in zip(chunk, loaded, strict=False):  # the chunk first: none is taken beyond it
                try:
                    _check_label(sample, classifier.labels)
                    kept.append((sample, _image_of(sample, image)))
                except DataError as error:
                    if not skip_bad:
                        raise
                    logger.warning("skipped: %s", error)
                    if skipped is not None:
                        skipped.append(Skipped(sample.id, str(error)))
            predictions = classifier.predict([sample for sample, _ in kept], [image for _, image in kept])
            for (sample, _), prediction in zip(kept, predictions, strict=True):
                rows.append(_prediction_row(sample, prediction.relation, prediction.probability))
            bar.advance(len(chunk))
    return rows


def _check_label(sample: Sample, labels: Sequence[str]) -> None:
    if sample.label is not None and sample.label not in labels:
        raise DataError(
            f"sample {sample.id}: its label is {sample.label!r}, which the classifier does not know; "
            f"expected one of {', '.join(labels)}; correct the file, or use a classifier trained on these labels"
        )


def _loader(spec: CaptionerSpec | ClassifierSpec, graph: str, fast_jpeg: bool) -> Callable[[Path], Image]:
    """What reads an image file for a model, resized to what its graph takes unless the graph resizes by itself."""
    size = spec.preprocessing
    graphs: Mapping[Any, GraphSpec] = spec.graphs
    resizes = any(tensor.name == "image" for tensor in graphs[graph].inputs)
    longest = max(size.height, size.width, size.shortest_edge or 0)
    at_least = (_REDUCING_GAP * longest, _REDUCING_GAP * longest) if fast_jpeg else None

    def load(path: Path) -> Image:
        image = load_image(path, at_least)
        return image if resizes else fitted(image, size)

    return load


def _image_of(sample: Sample, loaded: Loaded[str | None, Image | None]) -> Image | None:
    try:
        return loaded.get()
    except DataError as error:
        raise DataError(f"sample {sample.id}: {error}") from error


def _prediction_row(sample: Sample, relation: str, probability: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": sample.id,
        "head": sample.mention(sample.head),
        "tail": sample.mention(sample.tail),
        "relation": relation,
        "probability": round(probability, 6),
    }
    if sample.label is not None:
        row["label"] = sample.label
    return row
