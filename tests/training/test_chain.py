"""The chain's order, its determinism, and what survives an interruption."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.images import decode_image, encode_image
from mi2rage_rt.noise import rng
from mi2rage_rt.protocols import Image
from mi2rage_rt.samples import Sample, Span
from mi2rage_training.chain import ChainConfig, Decoding, Given, ImageFormat, children_not_made, synthesize
from mi2rage_training.chain_links import Links
from mi2rage_training.pairs import Pair
from mi2rage_training.slots import HEAD_SLOT, TAIL_SLOT, compose, with_slots
from mi2rage_training.store import Candidate, read_manifest, read_store
from tests.training.fakes import MeanCaptioner, NoiseGenerator
from tests.training.fakes import samples as sentences

CONFIG = ChainConfig(links=3, width=2, seed=5, shard_size=4)


def samples(count: int) -> list[Pair]:
    """Sentences without images."""
    return [Pair(sample) for sample in sentences(count)]


def made(pairs: Sequence[Pair], config: ChainConfig = CONFIG, **models: Any) -> list[Candidate]:
    """The candidates of some real samples by the fake models."""
    return Links(NoiseGenerator(), models.pop("captioner", MeanCaptioner()), config, **models).make(pairs)


def test_each_link_is_made_from_the_caption_before() -> None:
    rows = made(samples(2))
    assert len(rows) == 2 * 3 * 2
    for _, group in itertools.groupby(rows, key=lambda row: (row.provenance.parent, row.provenance.child)):
        first, second, third = group
        assert first.prompt == first.sample.text
        assert second.prompt == first.caption
        assert third.prompt == second.caption
        assert third.caption
        assert first.provenance.made_from == first.provenance.parent
        assert third.provenance.made_from == second.sample.id
        assert {row.sample.tokens for row in (first, second, third)} == {first.sample.tokens}
        assert [row.provenance.link for row in (first, second, third)] == [1, 2, 3]
    assert len({row.sample.id for row in rows}) == len(rows)
    assert len({row.provenance.seed for row in rows}) == len(rows)


def test_a_child_does_not_depend_on_its_neighbours() -> None:
    alone = made(samples(9)[8:])
    together = made(samples(9))
    assert alone == together[-len(alone) :]


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        synthesize(samples(10), tmp_path / name, NoiseGenerator(), MeanCaptioner(), CONFIG)
    one, two = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert one.rows == 60
    assert len(one.shards) == 3
    assert one == two


class _Stops(NoiseGenerator):
    """Breaks off in the second shard, as Ctrl-C would."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if len(self.calls) == CONFIG.links + 1:
            raise KeyboardInterrupt
        return super().generate(prompts, seeds)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    synthesize(samples(10), tmp_path / "whole", NoiseGenerator(), MeanCaptioner(), CONFIG)
    with pytest.raises(KeyboardInterrupt):
        synthesize(samples(10), tmp_path / "broken", _Stops(), MeanCaptioner(), CONFIG)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["settings.json", "shard-00000.parquet"]
    with pytest.raises(DataError, match="not finished"):
        list(read_store(tmp_path / "broken"))
    rest = NoiseGenerator()
    synthesize(samples(10), tmp_path / "broken", rest, MeanCaptioner(), CONFIG)
    assert len(rest.calls) == 2 * CONFIG.links  # the first shard is not made again
    assert read_manifest(tmp_path / "broken") == read_manifest(tmp_path / "whole")


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    synthesize(samples(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)
    with pytest.raises(InputError, match=r"chain\.links: was 3, is 1"):
        synthesize(samples(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), ChainConfig(links=1))
    with pytest.raises(InputError, match="samples_fingerprint"):
        synthesize(samples(4)[1:], tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)


def test_unlabelled_sentences_are_refused(tmp_path: Path) -> None:
    bare = [Pair(Sample("s", ("a", "b"), Span(0, 1), Span(1, 2)))]
    with pytest.raises(DataError, match="no label"):
        synthesize(bare, tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)
    assert not (tmp_path / "store").exists()


def test_the_store_is_plain_parquet(tmp_path: Path) -> None:
    synthesize(samples(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)
    frame = pq.read_table(tmp_path / "store" / "shard-00000.parquet")
    row = frame.slice(0, 1).to_pylist()[0]
    assert row["text"] == "Ana Lo0 meets Bo Tan !"
    assert decode_image(row["image"]["bytes"]).shape == (8, 8, 3)
    assert b"Image" in frame.schema.metadata[b"huggingface"]


def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    synthesize(samples(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)
    shard = tmp_path / "store" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"shard-00000\.parquet: is missing or was changed"):
        list(read_store(tmp_path / "store"))


@pytest.mark.parametrize("name", ["links", "width", "shard_size"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        ChainConfig(**{name: 0})


class _Repeats(MeanCaptioner):
    """Says the same of every image, unless it is asked again: then it draws."""

    def __init__(self, *, stubborn: bool = False) -> None:
        self.stubborn = stubborn
        self.calls: list[int] = []

    def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
        self.calls.append(len(images))
        if len(self.calls) == 1 or self.stubborn:
            return ["a house"] * len(images)
        return super().caption(images, *args, **kwargs)


def test_captions_that_repeat_a_sibling_are_drawn_again() -> None:
    captioner = _Repeats()
    rows = made(samples(3), ChainConfig(links=1, width=3), captioner=captioner)
    assert captioner.calls == [9, 6]  # the first of each three siblings keeps its caption
    for _, group in itertools.groupby(rows, key=lambda row: row.provenance.parent):
        captions = [row.caption for row in group]
        assert captions[0] == "a house"
        assert len(set(captions)) == 3


@pytest.mark.parametrize(("drop", "left"), [(False, 9), (True, 3)])
def test_captions_that_stay_the_same_are_kept_or_dropped(drop: bool, left: int) -> None:
    captioner = _Repeats(stubborn=True)
    rows = made(samples(3), ChainConfig(links=1, width=3, attempts=2, drop_duplicates=drop), captioner=captioner)
    assert len(rows) == left
    assert captioner.calls == [9, 6, 6]


def test_a_dropped_child_has_no_children_and_its_place_starts_again() -> None:
    config = ChainConfig(links=2, width=2, attempts=0, drop_duplicates=True)
    rows = made(samples(1), config, captioner=_Repeats(stubborn=True))
    assert [(row.provenance.link, row.provenance.child, row.prompt) for row in rows] == [
        (1, 0, "Ana Lo0 meets Bo Tan !"),
        (2, 0, "a house"),
    ]


@pytest.mark.parametrize("decoding", [Decoding.GREEDY, Decoding.BEAM])
def test_greedy_and_beam_search_draw_nothing(decoding: Decoding) -> None:
    rows = made(samples(2), ChainConfig(links=1, decoding=decoding))
    assert all(row.caption == f"mean {decode_image(row.image).mean():.0f}" for row in rows)


def test_templates_carry_mentions_and_label_words_along_the_chain() -> None:
    config = ChainConfig(links=2, next_prompt="{head} {label} {tail} : {caption}", label_words={"None": "beside"})
    first, second = made(samples(1), config)
    assert second.prompt == f"Ana Lo0 beside Bo Tan : {first.caption}"
    assert made(samples(3)[2:], config)[1].prompt.startswith("Ana Lo2 member of Bo Tan : ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"next_prompt": "{capton}"}, "unknown field 'capton'; expected some of {caption}"),
        ({"first_prompt": "{caption}"}, "unknown field 'caption'"),
        ({"next_prompt": "{caption"}, "expected a template"),
        ({"given": Given.IMAGE, "prefixes": ("{head} :",)}, "both mentions"),
        ({"attempts": -1}, "attempts"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"jpeg_quality": 96, "image_format": ImageFormat.JPEG}, "jpeg quality: came 96; expected 1 to 95"),
        ({"jpeg_quality": 80}, "jpeg quality: came with the image format png"),
        ({"png_level": 10}, "png level: came 10"),
        ({"png_level": 1, "image_format": ImageFormat.JPEG}, "png level: came with the image format jpeg"),
        ({"least_added_nats": float("nan")}, "least added nats: came nan"),
        ({"least_added_nats": 0.0, "sharpness": 2.0}, "sharpness: came 2.0 with least added nats"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChainConfig(**settings)


def pictures(count: int) -> list[Pair]:
    """Sentences with an image of one grey each; the sentences are not to be looked at."""
    grey = [np.full((8, 8, 3), 20 + i, np.uint8) for i in range(count)]
    return [Pair(sample, encode_image(image)) for sample, image in zip(sentences(count), grey, strict=True)]


IMAGE_CONFIG = ChainConfig(given=Given.IMAGE, links=3, width=2, prefixes=("{head} and {tail} :", "see {tail} , {head}"))


def test_images_given_every_text_holds_both_mentions_and_the_real_image() -> None:
    pairs = pictures(2)
    rows = made(pairs, IMAGE_CONFIG)
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        sample = row.sample
        assert sample.mention(sample.head) == f"Ana Lo{row.provenance.parent[1:]}"
        assert sample.mention(sample.tail) == "Bo Tan"
        assert row.image == pairs[int(row.provenance.parent[1:])].image
        assert (row.via is None) == (row.provenance.link == 1)
        assert row.made == "text"
    assert [rows[i].sample.tokens[0] for i in range(4)] == ["Ana", "see", "Ana", "see"]  # prefixes in turn
    assert len({row.sample.text for row in rows}) == len(rows)
    assert rows[0].sample.text.startswith("Ana Lo0 and Bo Tan : mean 20 ")  # of the real image
    assert rows[1].provenance.made_from == rows[0].sample.id


class _Posts(MeanCaptioner):
    """Writes slots, one of them too few the first time."""

    def __init__(self) -> None:
        self.calls = 0

    def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
        self.calls += 1
        return [f"RT {TAIL_SLOT}" if self.calls == 1 else f"RT {TAIL_SLOT} thanks {HEAD_SLOT} {self.calls}"] * len(
            images
        )


def test_slots_are_filled_and_a_text_that_lacks_a_mention_is_drawn_again() -> None:
    captioner = _Posts()
    (row,) = made(pictures(1), ChainConfig(given=Given.IMAGE, links=1), captioner=captioner)
    assert row.sample.text == "RT Bo Tan thanks Ana Lo0 2"
    assert (row.sample.head, row.sample.tail) == (Span(4, 6), Span(1, 3))
    assert made(pictures(1), ChainConfig(given=Given.IMAGE, links=1, attempts=0), captioner=_Posts()) == []


def test_slots_of_mentions_that_overlap() -> None:
    assert with_slots(("a", "b", "c", "d"), Span(1, 2), Span(2, 4)) == ["a", HEAD_SLOT, TAIL_SLOT]
    assert with_slots(("a", "b", "c"), Span(0, 2), Span(1, 3)) == [HEAD_SLOT, "c"]
    assert compose("{head} and {tail}", "", sentences(1)[0]) is None


def test_images_given_but_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample s0: has no image"):
        synthesize(samples(2), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), IMAGE_CONFIG)


def test_a_store_of_made_texts_reads_back(tmp_path: Path) -> None:
    synthesize(pictures(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), IMAGE_CONFIG)
    assert list(read_store(tmp_path / "store")) == made(pictures(3), IMAGE_CONFIG)


class _Likes:
    """A judge that wants children at even places."""

    name = "likes"

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        return np.array([50.0 if row.provenance.child % 2 == 0 else -50.0 for row in candidates])


class _Dislikes(_Likes):
    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        return np.full(len(candidates), -50.0)


def test_a_judge_gives_the_places_of_bad_children_to_good_siblings() -> None:
    rows = made(samples(5), ChainConfig(links=2, width=4), judge=_Likes())
    sources = [row.provenance.made_from for row in rows if row.provenance.link == 2]
    assert len(sources) == 20
    assert all(source is not None and source[-3:] in ("0.1", "2.1") for source in sources)
    assert len(set(sources)) > 5
    assert rows[0].provenance.models["judge"] == "likes"


def test_where_no_child_is_good_the_chain_starts_again_from_the_sentence() -> None:
    rows = made(samples(3), ChainConfig(links=2, width=2), judge=_Dislikes())
    assert {row.provenance.made_from for row in rows} == {"s0", "s1", "s2"}
    assert len({row.image for row in rows}) == len(rows)


class _Ramps(NoiseGenerator):
    """Images that can be packed, unlike noise."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        rows = np.arange(64, dtype=np.uint8)
        return np.stack([np.tile(rows[:, None, None] + np.uint8(seed % 100), (1, 64, 3)) for seed in seeds])


def test_images_are_encoded_as_asked_for() -> None:
    def images(**settings: Any) -> list[Candidate]:
        return Links(_Ramps(), MeanCaptioner(), ChainConfig(links=1, **settings)).make(samples(2))

    usual, large = images(), images(png_level=0)
    fine, coarse = (images(image_format=ImageFormat.JPEG, jpeg_quality=quality) for quality in (95, 5))
    for row, unpacked, good, bad in zip(usual, large, fine, coarse, strict=True):
        pixels = decode_image(row.image)
        assert row.image == encode_image(pixels)
        assert len(unpacked.image) > pixels.size > len(row.image)
        np.testing.assert_array_equal(decode_image(unpacked.image), pixels)
        assert good.image == encode_image(pixels, "jpeg", 95)
        assert bad.image == encode_image(pixels, "jpeg", 5)
        assert good.sample.image == f"{row.sample.id.replace('/', '-')}.jpeg"


class _ById:
    """A judge with an opinion on every candidate, keyed by its id; some are liked, whatever their parents."""

    name = "by id"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def added_nats(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        self.asked += [row.sample.id for row in candidates]
        return np.array([_opinion(row) for row in candidates])


def _opinion(row: Candidate) -> float:
    return float(rng(sum(row.sample.id.encode()), row.provenance.link).normal())


def without_names(rows: Sequence[Candidate]) -> list[Candidate]:
    """The rows as runs with and without a judge share them."""
    plain = [dataclasses.replace(row.provenance, models={**row.provenance.models, "judge": ""}) for row in rows]
    return [
        dataclasses.replace(row, added_nats=None, sample=dataclasses.replace(row.sample, provenance=origin))
        for row, origin in zip(rows, plain, strict=True)
    ]


@pytest.mark.parametrize("given", [Given.TEXT, Given.IMAGE])
@pytest.mark.parametrize("least", [-0.5, 0.3])
def test_with_selection_along_only_children_whose_forebears_stay_are_made(
    given: Given, least: float, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, given=given, links=4, width=3)
    pairs = samples(10) if given is Given.TEXT else pictures(10)
    every = {row.sample.id: row for row in made(pairs, config)}  # the slow way: make all, and leave out afterwards

    def stays(row: Candidate) -> bool:
        before = every.get(str(row.provenance.made_from))
        return before is None or (_opinion(before) >= least and stays(before))

    judge, online = _ById(), dataclasses.replace(config, least_added_nats=least)
    generator = NoiseGenerator()
    synthesize(pairs, tmp_path / "store", generator, MeanCaptioner(), online, judge=judge)
    rows = list(read_store(tmp_path / "store"))
    expected = [row for row in every.values() if stays(row)]
    assert 0 < len(expected) < len(every)
    assert without_names(rows) == without_names(expected)
    assert children_not_made(tmp_path / "store", online) == len(every) - len(rows)
    drawn = sum(row.via is not None or given is Given.TEXT for row in rows)
    assert sum(len(prompts) for prompts, _ in generator.calls) == drawn  # nothing was made to be thrown away
    judged = [row.sample.id for row in rows if row.provenance.link < config.links]
    assert sorted(judge.asked) == sorted(judged)  # what has no children anyway is not asked about
    for row in rows:
        assert row.added_nats == (_opinion(row) if row.provenance.link < config.links else None)


def test_selection_along_ends_every_chain_or_none(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, least_added_nats=0.0)
    rows = made(samples(5), config, judge=_Dislikes())
    assert [row.provenance.link for row in rows] == [1] * 10
    strict = dataclasses.replace(CONFIG, least_added_nats=-100.0)
    rows = made(samples(5), strict, judge=_Dislikes())
    assert without_names(rows) == without_names(made(samples(5)))
    synthesize(samples(5), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)
    assert children_not_made(tmp_path / "store", CONFIG) == 0


def test_selection_along_needs_a_judge(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, least_added_nats=0.0)
    with pytest.raises(InputError, match=r"least added nats: came 0\.0 without a judge"):
        synthesize(samples(1), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), config)
    assert not (tmp_path / "store").exists()


def test_unfinished_stores_of_earlier_releases_are_gone_on_with() -> None:
    settings = set(ChainConfig().described())
    assert not settings & {"jpeg_quality", "png_level", "least_added_nats"}
    jpeg = ChainConfig(image_format=ImageFormat.JPEG, jpeg_quality=80, least_added_nats=0.5).described()
    assert (jpeg["jpeg_quality"], jpeg["least_added_nats"]) == (80, 0.5)
    assert "png_level" not in jpeg
    assert ChainConfig(png_level=1).described()["png_level"] == 1
