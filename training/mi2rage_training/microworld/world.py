"""The labelled micro-world (three splits on disk) and the unlabelled corpus that models are pretrained on."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.files import atomic_folder
from mi2rage_rt.noise import rng as keyed_rng
from mi2rage_rt.noise import seed_from
from mi2rage_rt.samples import Sample, write_samples
from mi2rage_training.chain_config import label_words
from mi2rage_training.microworld.relations import (
    CUES,
    FAMILIES,
    FAMILY_WEIGHTS,
    LABELS,
    TYPE_PAIR_WEIGHTS,
    TYPE_PAIRS,
    cue_weights,
    label_of,
)
from mi2rage_training.microworld.scenes import IMAGE_PX, Scene, draw_scene, render
from mi2rage_training.microworld.sentences import HINT_RATE, HINT_RIGHT, Tweet, draw_caption, draw_tweet

__all__ = [
    "CUE_MISSING",
    "LABEL_NOISE",
    "VERSION",
    "Corpus",
    "Facts",
    "Post",
    "WorldSummary",
    "build_world",
    "corpus",
    "draw_post",
    "read_facts",
]

VERSION = 2
CUE_MISSING = 0.08
"""Share of pictures without their cue."""
LABEL_NOISE = 0.03
"""Share of labels replaced by a random other one."""
TWEET_SHARE = 0.45
"""Share of the corpus that is tweets; the rest is captions."""
STATED_SHARE = 0.3
"""Share of the related pairs in the corpus whose text names the relation, as captions on the web now and then do."""

_PEOPLE = {"per": (0.10, 0.55, 0.35), "other": (0.35, 0.45, 0.20), "both": (0.08, 0.27, 0.65)}


@dataclasses.dataclass(frozen=True, slots=True)
class Post:
    """A tweet, its picture, and the relation between its entities before label noise."""

    tweet: Tweet
    scene: Scene
    types: tuple[str, str]
    family: str
    cue: str
    label: str


@dataclasses.dataclass(frozen=True, slots=True)
class WorldSummary:
    """What `build_world` wrote: the folder, rows by split, rows by label (all splits), the seed."""

    folder: Path
    seed: int
    splits: dict[str, int]
    labels: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Pictures with one text each, and no label; the texts of some name the relation in words.

    Attributes:
        images: uint8 `(N, 24, 24, 3)`.
        texts: N captions or tweets, after the words of the relation and a colon where it is named.
        stated: N words of the relation, empty where the text does not name it.
        captions: N captions, also where the text is a tweet.
        is_tweet: bool `(N,)`.
        scenes: what is in the pictures; to measure with, never to train on.
        tweets: the tweets with their spans, None where the text is a caption.
    """

    images: NDArray[np.uint8]
    texts: list[str]
    stated: list[str]
    captions: list[str]
    is_tweet: NDArray[np.bool_]
    scenes: list[Scene]
    tweets: list[Tweet | None]


def draw_post(split: str, seed: int, index: int) -> Post:
    """Post `index` of `split`: the same for the same key, whatever else was drawn."""
    key = seed_from("microworld", VERSION, split, seed, index)
    rng = keyed_rng(key)
    types = TYPE_PAIRS[int(rng.choice(len(TYPE_PAIRS), p=TYPE_PAIR_WEIGHTS))]
    family = FAMILIES[int(rng.choice(len(FAMILIES), p=FAMILY_WEIGHTS))]
    cue = CUES[int(rng.choice(len(CUES), p=cue_weights(types, family)))]
    tweet = draw_tweet(rng, split, types, family, cue)
    people = _PEOPLE["both" if types == ("per", "per") else "per" if types[0] == "per" else "other"]
    scene = draw_scene(rng, cue if rng.random() >= CUE_MISSING else None, key, people)
    return Post(tweet, scene, types, family, cue, label_of(types, family, cue))


def _noisy(label: str, rng: np.random.Generator) -> str:
    if rng.random() >= LABEL_NOISE:
        return label
    return str(rng.choice([other for other in LABELS if other != label]))


def corpus(seed: int, count: int) -> Corpus:
    """`count` pictures with captions or tweet-like posts, in names and frames that no split of any world has."""
    posts = [draw_post("corpus", seed, index) for index in range(count)]
    captions, stated, is_tweet = [], [], np.zeros(count, dtype=bool)
    for index, post in enumerate(posts):
        rng = keyed_rng(seed_from("microworld-caption", seed, index))
        is_tweet[index] = rng.random() < TWEET_SHARE
        captions.append(draw_caption(rng, post.scene))
        stated.append(label_words(post.label, {}) if rng.random() < STATED_SHARE else "")
    images = (
        np.stack([render(post.scene) for post in posts]) if posts else np.zeros((0, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    )
    texts = [
        f"{words} : {text}" if words else text
        for words, text in zip(
            stated,
            (
                " ".join(post.tweet.tokens) if tweeted else caption
                for post, caption, tweeted in zip(posts, captions, is_tweet, strict=True)
            ),
            strict=True,
        )
    ]
    tweets = [post.tweet if tweeted else None for post, tweeted in zip(posts, is_tweet, strict=True)]
    return Corpus(images, texts, stated, captions, is_tweet, [post.scene for post in posts], tweets)


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_split(folder: Path, split: str, seed: int, count: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    (folder / "images" / split).mkdir(parents=True)
    samples, facts = [], []
    for index in range(count):
        post = draw_post(split, seed, index)
        name = f"{split}-{index:05d}"
        image = f"images/{split}/{name}.png"
        (folder / image).write_bytes(_png(render(post.scene)))
        label = _noisy(post.label, keyed_rng(seed_from("microworld-noise", split, seed, index)))
        samples.append(Sample(name, post.tweet.tokens, post.tweet.head, post.tweet.tail, label, image))
        facts.append(
            {
                "id": name,
                "types": post.types,
                "family": post.family,
                "cue": post.cue,
                "attributes": sorted(post.scene.attributes),
                "true_label": post.label,
            }
        )
        tick()
    write_samples(folder / f"{split}.jsonl", samples)
    return facts


def build_world(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 900,
    validation: int = 300,
    test: int = 600,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WorldSummary:
    """Write a labelled world: `{train,validation,test}.jsonl`, `images/<split>/`, `labels.json`, `world.json`.

    `facts.jsonl` beside them says what is in each picture (attributes, entity types, the label before noise): to
    measure with, never to train on. Image paths in the rows are relative to `folder`.

    Args:
        folder: where to write; appears whole or not at all.
        seed: the same seed and counts give the same bytes.
        train, validation, test: rows of each split.
        force: replace a folder that is there.
        progress: called with (rows done, rows in all).

    Raises:
        InputError: a count below 1, or `folder` is not empty and `force` is off.
    """
    counts = {"train": train, "validation": validation, "test": test}
    for split, count in counts.items():
        if not 1 <= count <= 100_000:
            raise InputError(f"{split} split of {count} rows: expected 1 to 100000; give another --{split}")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, sum(counts.values()))

    with atomic_folder(Path(folder), force=force) as draft:
        facts = [row for split, count in counts.items() for row in _write_split(draft, split, seed, count, tick)]
        labels = _label_counts(draft, counts)
        (draft / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts), encoding="utf-8")
        (draft / "labels.json").write_text(json.dumps(list(LABELS), indent=1) + "\n", encoding="utf-8")
        described = {
            "schema": "mi2rage-microworld",
            "version": VERSION,
            "seed": seed,
            "splits": counts,
            "labels": labels,
            "image_px": IMAGE_PX,
            "cue_missing": CUE_MISSING,
            "label_noise": LABEL_NOISE,
            "hint_rate": HINT_RATE,
            "hint_right": HINT_RIGHT,
        }
        (draft / "world.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return WorldSummary(Path(folder), seed, counts, labels)


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is true of one row: to measure with, never to train on.

    Attributes:
        id: the row's.
        types: entity types of head and tail.
        family: of the linking phrase.
        cue: the object that the label was decided by, whether the picture shows it or not.
        attributes: what the picture shows, e.g. `cue:heart`, `setting:park`, `shirt:red`.
        true_label: the label before noise.
    """

    id: str
    types: tuple[str, str]
    family: str
    cue: str
    attributes: frozenset[str]
    true_label: str


def read_facts(folder: Path | str) -> dict[str, Facts]:
    """The facts of all rows of a world, by id.

    Raises:
        DataError: `folder` holds no readable `facts.jsonl`.
    """
    path = Path(folder) / "facts.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        facts = [
            Facts(**row | {"types": tuple(row["types"]), "attributes": frozenset(row["attributes"])}) for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as the facts of a micro-world ({error}); expected what `mi2rage-rt world` writes"
        ) from error
    return {fact.id: fact for fact in facts}


def _label_counts(folder: Path, splits: dict[str, int]) -> dict[str, int]:
    from mi2rage_rt.samples import read_samples

    counted = collections.Counter(
        sample.label for split in splits for sample in read_samples(folder / f"{split}.jsonl")
    )
    return {label: counted[label] for label in LABELS}
