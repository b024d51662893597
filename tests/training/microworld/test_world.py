"""The world on disk: fixed bytes, whole rows, splits and corpus apart from each other."""

import hashlib
import itertools
import json

import pytest
from PIL import Image

from mi2rage_engines.errors import InputError
from mi2rage_rt.samples import read_samples
from mi2rage_training.microworld import CUES, LABELS, attributes_in, build_world, corpus, write_gallery
from mi2rage_training.microworld.names import stems
from mi2rage_training.microworld.relations import FAMILIES, TYPE_PAIRS, cue_weights, label_of
from mi2rage_training.microworld.words import CLOSERS, HINTS, OPENERS, SPLITS
from mi2rage_training.microworld.world import draw_post

COUNTS = {"train": 60, "validation": 20, "test": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "w"
    build_world(folder, seed=3, **COUNTS)
    return folder


def _digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_others(world, tmp_path):
    build_world(tmp_path / "again", seed=3, **COUNTS)
    build_world(tmp_path / "other", seed=4, **COUNTS)
    assert _digests(world) == _digests(tmp_path / "again")
    assert _digests(world)["train.jsonl"] != _digests(tmp_path / "other")["train.jsonl"]


def test_a_row_does_not_depend_on_how_many_are_drawn(world, tmp_path):
    build_world(tmp_path / "small", seed=3, train=5, validation=2, test=2)
    few = read_samples(tmp_path / "small" / "train.jsonl")
    assert few == read_samples(world / "train.jsonl")[:5]


def test_rows_are_whole(world):
    labels = json.loads((world / "labels.json").read_text())
    assert labels == list(LABELS) and labels[0] == "None"
    seen_ids = set()
    for split, count in COUNTS.items():
        samples = read_samples(world / f"{split}.jsonl")
        assert len(samples) == count
        for sample in samples:
            assert sample.label in labels
            with Image.open(world / sample.image) as image:
                assert image.size == (24, 24) and image.mode == "RGB"
        seen_ids |= {sample.id for sample in samples}
    assert len(seen_ids) == sum(COUNTS.values())


def test_spans_hold_the_names_and_do_not_overlap():
    for index in range(300):
        tweet = draw_post("train", 0, index).tweet
        assert tweet.head.end <= tweet.tail.start or tweet.tail.end <= tweet.head.start
        for span in (tweet.head, tweet.tail):
            mention = " ".join(tweet.tokens[span.start : span.end]).lower()
            assert any(stem in mention for stem in stems("train")), mention


def _names(split, count=300):
    names = set()
    for index in range(count):
        tweet = draw_post(split, 0, index).tweet
        for span in (tweet.head, tweet.tail):
            names.add(" ".join(tweet.tokens[span.start : span.end]))
    return names


def test_splits_and_corpus_share_no_name_frame_or_scene():
    names = {split: _names(split) for split in SPLITS}
    frames = {split: {(a, b) for a in OPENERS[split] for b in CLOSERS[split]} for split in SPLITS}
    scenes = {split: {draw_post(split, 0, index).scene.seed for index in range(100)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(stems(one)) & set(stems(other))
        assert not names[one] & names[other]
        assert not set(OPENERS[one]) & set(OPENERS[other])
        assert not set(CLOSERS[one]) & set(CLOSERS[other])
        assert not frames[one] & frames[other]
        assert not scenes[one] & scenes[other]


def test_the_corpus_carries_no_labels_and_shares_no_text_with_a_world(world):
    drawn = corpus(0, 200)
    assert not {"label", "labels"} & set(drawn.__dataclass_fields__)
    text = "\n".join(drawn.texts)
    assert not any(label in text for label in LABELS if label != "None")
    tweets = {sample.text for split in COUNTS for sample in read_samples(world / f"{split}.jsonl")}
    assert not tweets & set(drawn.texts)
    assert 0.3 < drawn.is_tweet.mean() < 0.6
    assert (corpus(0, 20).images == drawn.images[:20]).all() and corpus(0, 20).texts == drawn.texts[:20]


def test_captions_invent_nothing():
    drawn = corpus(1, 300)
    named = [attributes_in(caption) for caption in drawn.captions]
    assert all(said <= scene.attributes for said, scene in zip(named, drawn.scenes, strict=True))
    assert sum(map(len, named)) > 0.75 * sum(len(scene.attributes) for scene in drawn.scenes)


def test_a_cue_or_a_phrase_alone_leaves_the_label_open():
    for cue in CUES:
        assert len({label_of(types, family, cue) for types in TYPE_PAIRS for family in FAMILIES}) >= 3
    for types, family in itertools.product(TYPE_PAIRS[:6], FAMILIES):
        assert len({label_of(types, family, cue) for cue in CUES}) >= 2
        assert abs(sum(cue_weights(types, family)) - 1) < 1e-9
    reached = {label_of(t, f, c) for t, f, c in itertools.product(TYPE_PAIRS, FAMILIES, CUES)}
    assert reached == set(LABELS)
    hints = [hint for cue in CUES for hint in HINTS[cue]]
    assert len(hints) == len(set(hints))


def test_a_bad_count_or_a_full_folder_is_refused_and_nothing_is_left(world, tmp_path):
    with pytest.raises(InputError, match="train split of 0 rows"):
        build_world(tmp_path / "none", train=0)
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match="--force"):
        build_world(world, **COUNTS)


def test_gallery_is_one_self_contained_page(world, tmp_path):
    page = tmp_path / "page.html"
    write_gallery(world, page, each=2)
    text = page.read_text()
    assert "data:image/png;base64," in text and "http-equiv" not in text and "<script" not in text
    assert all(label in text for label in LABELS)
