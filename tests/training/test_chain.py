"""The chain's order, its determinism, and what survives an interruption."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.images import decode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_training.chain import ChainConfig, candidates_from_samples, synthesize
from mi2rage_training.store import read_manifest, read_store
from tests.training.fakes import MeanCaptioner, NoiseGenerator, samples

CONFIG = ChainConfig(links=3, width=2, seed=5, shard_size=4)


def test_each_link_is_made_from_the_caption_before() -> None:
    rows = candidates_from_samples(samples(2), NoiseGenerator(), MeanCaptioner(), CONFIG)
    assert len(rows) == 2 * 3 * 2
    for _, group in itertools.groupby(rows, key=lambda row: (row.provenance.parent, row.provenance.child)):
        first, second, third = group
        assert first.prompt == first.sample.text
        assert second.prompt == first.caption
        assert third.prompt == second.caption
        assert third.caption is None
        assert {row.sample.tokens for row in (first, second, third)} == {first.sample.tokens}
        assert [row.provenance.link for row in (first, second, third)] == [1, 2, 3]
    assert len({row.sample.id for row in rows}) == len(rows)
    assert len({row.provenance.seed for row in rows}) == len(rows)


def test_a_child_does_not_depend_on_its_neighbours() -> None:
    alone = candidates_from_samples(samples(9)[8:], NoiseGenerator(), MeanCaptioner(), CONFIG)
    together = candidates_from_samples(samples(9), NoiseGenerator(), MeanCaptioner(), CONFIG)
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
    with pytest.raises(InputError, match="chain: was"):
        synthesize(samples(3), tmp_path / "store", NoiseGenerator(), MeanCaptioner(), ChainConfig(links=1))
    with pytest.raises(InputError, match="samples_fingerprint"):
        synthesize(samples(4)[1:], tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG)


def test_unlabelled_sentences_are_refused(tmp_path: Path) -> None:
    bare = [Sample("s", ("a", "b"), Span(0, 1), Span(1, 2))]
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
