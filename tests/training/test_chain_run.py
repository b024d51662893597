"""A run in one process: samples that cannot be made are left out, budgets stop it between shards, and it is counted."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mi2rage_rt.protocols import Image
from mi2rage_training.budget import Budget
from mi2rage_training.chain import ChainConfig, Given, Overlap, synthesize
from mi2rage_training.chain_places import Place, _draw_sources
from mi2rage_training.chain_run import Outcome, RunOptions, make_here
from mi2rage_training.pairs import Pair
from mi2rage_training.shard_work import LeftOut, explain_left_out, left_out_of, write_left_out
from mi2rage_training.store import read_manifest, read_store
from mi2rage_training.store_files import files_at
from mi2rage_training.tally import Tally
from tests.training.fakes import LABELS, MeanCaptioner, NoiseGenerator, candidates, samples

CONFIG = ChainConfig(links=2, width=2, seed=5, shard_size=4)
PAIRS = [Pair(sample) for sample in samples(14)]
OVERLAPS = [Overlap(), Overlap(3), Overlap(3, models_apart=True), Overlap(3, models_free=True)]


class _Fails(NoiseGenerator):
    """Raises at prompts that hold one of some words, each so many times; for ever by default."""

    def __init__(self, *words: str, times: int = 10**9) -> None:
        super().__init__()
        self.left = dict.fromkeys(words, times)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        for word in {word for prompt in prompts for word in prompt.split()} & self.left.keys():
            if self.left[word]:
                self.left[word] -= 1
                raise RuntimeError(f"cannot draw {word}")
        return super().generate(prompts, seeds)


def run(out: Path, generator: NoiseGenerator | None = None, **options: Any) -> Outcome:
    overlap = options.pop("overlap", Overlap())
    config = options.pop("config", CONFIG)
    models = generator or NoiseGenerator(), MeanCaptioner()
    return make_here(PAIRS, out, *models, config, overlap=overlap, options=RunOptions(**options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_samples_that_cannot_be_made_are_left_out_and_named(overlap: Overlap, tmp_path: Path) -> None:
    outcome = run(tmp_path / "store", _Fails("Lo5", "Lo6", "Lo13"), tries=2, overlap=overlap)
    assert [(sample.id, sample.reason) for sample in outcome.left_out] == [
        (name, f"RuntimeError: cannot draw {name.replace('s', 'Lo')}") for name in ("s5", "s6", "s13")
    ]
    parents = {row.provenance.parent for row in read_store(tmp_path / "store")}
    assert parents == {pair.sample.id for pair in PAIRS} - {"s5", "s6", "s13"}
    assert outcome.tally.samples == 11
    assert outcome.figures(CONFIG, 0) == {"candidates": 44, "dropped": 0, "shards": 4, "left_out": 3}
    assert "s5, s6, s13 (RuntimeError: cannot draw Lo5)" in explain_left_out("store", outcome.left_out)
    before = contents(tmp_path / "store")
    again = run(tmp_path / "store", _Fails("Lo5", "Lo6", "Lo13"), tries=2)
    assert again.left_out == outcome.left_out  # a run that has nothing to do says so too
    assert contents(tmp_path / "store") == before


def test_notes_are_read_whatever_stands_in_them(tmp_path: Path) -> None:
    files = files_at(tmp_path)
    noted = [LeftOut("a\u2028b\x85", "broke\nat \u2029 once"), LeftOut("c", "x")]
    write_left_out(files, 0, noted)
    assert left_out_of(files) == noted


def test_scores_of_any_size_can_be_drawn_by() -> None:
    """exp of a large score is more than a float holds."""
    made = [row for row in candidates(3) if row.provenance.link == 1]
    parents = [dataclasses.replace(row.sample, id=row.provenance.parent) for row in made]
    places = [Place(Pair(parent), 0, parent.id) for parent in parents]
    _draw_sources(places, made, {row.sample.id: 50.0 for row in made}, 1, ChainConfig(sharpness=100.0))
    assert [place.source for place in places] == [row.sample.id for row in made]


def test_the_rest_of_a_shard_is_one_batch_without_the_sample(tmp_path: Path) -> None:
    generator = _Fails("Lo5")
    run(tmp_path / "store", generator, tries=1)
    batches = [len(prompts) for prompts, _ in generator.calls]
    # The first shard's links, those of the samples 4, 6 and 7 tried alone, the shard without 5, and the other shards.
    assert batches == [8, 8, *[2] * 6, 6, 6, 8, 8, 4, 4]


def test_a_shard_that_fails_for_a_time_is_made_whole(tmp_path: Path) -> None:
    assert run(tmp_path / "store", _Fails("Lo5", "Lo9", times=2), tries=3).left_out == ()
    synthesize(PAIRS, tmp_path / "whole", NoiseGenerator(), MeanCaptioner(), CONFIG)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_note_goes_when_its_shard_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "store", _Fails("Lo5"), tries=1)
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    assert run(tmp_path / "store", tries=1).left_out == ()
    synthesize(PAIRS, tmp_path / "whole", NoiseGenerator(), MeanCaptioner(), CONFIG)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_models_that_make_nothing_at_all_are_no_fault_of_the_samples(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot draw"):
        run(tmp_path / "store", _Fails("Ana"), tries=2)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["settings.json"]
    outcome = run(tmp_path / "later", _Fails("Lo12", "Lo13"), tries=1)  # all of the last shard, after others were made
    assert [sample.id for sample in outcome.left_out] == ["s12", "s13"]
    assert read_manifest(tmp_path / "later").rows == 48


class _FullBatch(NoiseGenerator):
    """Has memory for three prompts."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if len(prompts) > 3:
            raise MemoryError
        return super().generate(prompts, seeds)


def test_a_shard_that_fails_by_its_size_is_no_fault_of_a_sample(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        run(tmp_path / "store", _FullBatch(), tries=1)
    assert not list((tmp_path / "store").glob("shard-*"))


def test_without_tries_the_first_error_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot draw Lo5"):
        run(tmp_path / "store", _Fails("Lo5"))
    assert (tmp_path / "store" / "shard-00000.parquet").exists()


class _Interrupted(NoiseGenerator):
    """Ctrl-C in the caller's thread, while other shards are in the making."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if len(self.calls) == 5:
            raise KeyboardInterrupt
        return super().generate(prompts, seeds)


class _SlowCaptioner(MeanCaptioner):
    def caption(self, images: Sequence[Image], *args: Any, **kwargs: Any) -> list[str]:
        time.sleep(0.01)
        return super().caption(images, *args, **kwargs)


@pytest.mark.parametrize("given", [Given.TEXT, Given.IMAGE])
def test_an_interruption_is_taken_for_no_sample_s_fault(given: Given, tmp_path: Path) -> None:
    from mi2rage_rt.images import encode_image

    image = encode_image(np.zeros((8, 8, 3), np.uint8))
    pairs = [dataclasses.replace(pair, image=image) for pair in PAIRS]
    config = dataclasses.replace(CONFIG, given=given, links=3)
    options, overlap = RunOptions(tries=3), Overlap(3, models_apart=True)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        make_here(pairs, tmp_path / "s", _Interrupted(), _SlowCaptioner(), config, overlap=overlap, options=options)
    assert set(threading.enumerate()) == before
    assert not list((tmp_path / "s").glob("*.left-out.jsonl"))
    make_here(pairs, tmp_path / "s", NoiseGenerator(), MeanCaptioner(), config, options=options)
    synthesize(pairs, tmp_path / "whole", NoiseGenerator(), MeanCaptioner(), config)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_run_stops_between_shards_and_its_store_can_be_used_and_gone_on_with(
    overlap: Overlap, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, shard_size=2)
    outcome = run(tmp_path / "store", budget=Budget(kept=10), overlap=overlap, config=config)
    made = len(outcome.manifest.shards) if outcome.manifest else 0
    assert 2 <= made <= 2 + overlap.in_flight  # 8 candidates a shard; those in the making are finished
    assert outcome.stopped is not None
    assert f"{made} of 7 shards are made and can be used" in outcome.explain_stop()
    assert len(list(read_store(tmp_path / "store"))) == read_manifest(tmp_path / "store").rows
    same = run(tmp_path / "store", budget=Budget(kept=10), overlap=overlap, config=config)
    assert same.manifest == outcome.manifest  # what was kept before counts
    assert same.tally == Tally()
    assert run(tmp_path / "store", config=config).stopped is None
    synthesize(PAIRS, tmp_path / "whole", NoiseGenerator(), MeanCaptioner(), config)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_time_and_cost_end_a_run(tmp_path: Path) -> None:
    hour_ago = time.monotonic() - 3600
    outcome = run(tmp_path / "store", budget=Budget(seconds=3600), begun_s=hour_ago)
    assert (outcome.manifest, outcome.stopped) == (None, "1h are over")
    assert "0 of 4 shards are made; give the same command again" in outcome.explain_stop()
    outcome = run(tmp_path / "store", budget=Budget(cost=10, cost_per_hour=10), begun_s=hour_ago)
    assert outcome.stopped == "10 are spent, at 10 an hour"
    assert run(tmp_path / "store", budget=Budget(seconds=7200, cost=100, cost_per_hour=10)).stopped is None


def test_a_tally_counts_what_is_kept_by_label_and_what_is_missing() -> None:
    config = ChainConfig(links=3, width=1, least_added_nats=0.0)
    seen = [(LABELS[0], 1, -0.5), (LABELS[1], 1, 0.5), (LABELS[1], 2, 0.1), (LABELS[1], 3, None), (LABELS[2], 1, 0.2)]
    tally = Tally.of_scores(seen, 3, config)
    labels = {"None": (0, 1), "/per/per/peer": (3, 3), "/per/org/member_of": (1, 1)}
    assert tally == Tally(samples=3, rows=5, kept=4, dropped=2, not_made=2, by_label=labels)
    assert (tally + tally).by_label["/per/per/peer"] == (6, 6)
    assert tally + Tally() == tally
    assert tally.described(judged=True) == "kept 80% (None 0%, member_of 100%, peer 100%) 2 given up"
    assert Tally().described(judged=True) == ""
