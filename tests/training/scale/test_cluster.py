"""Workers on a Ray cluster of this machine: every item once, whatever dies, and the same store as one process makes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mi2rage_engines.errors import DataError, InputError, Mi2rageError, MissingExtraError
from mi2rage_rt.jobs import Skipped, predict_samples
from mi2rage_rt.pool_option import pool_options
from mi2rage_rt.predict_cluster import ClassifierChoice, predict_on_cluster
from mi2rage_rt.ray_cluster import PoolOptions
from mi2rage_rt.samples import Sample, Span
from mi2rage_rt.worker_pool import WorkerPool
from mi2rage_training.budget import Budget
from mi2rage_training.chain import ChainConfig, synthesize
from mi2rage_training.chain_cluster import make_on_cluster
from mi2rage_training.chain_run import RunOptions, make_here
from mi2rage_training.fit import FitConfig
from mi2rage_training.pairs import Pair
from mi2rage_training.policies import Policy, PolicyConfig
from mi2rage_training.selection import SelectionConfig, select
from mi2rage_training.store import read_manifest
from mi2rage_training.teacher import TeacherConfig
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import MeanCaptioner, NoiseGenerator, samples
from tests.training.scale import duties
from tests.training.scale.duties import Count, FakeChoice, Once, Poisoned

pytest.importorskip("ray")

CONFIG = ChainConfig(links=2, seed=5, shard_size=4)
PAIRS = [Pair(sample) for sample in samples(18)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PoolOptions]:
    """A cluster with room for two workers, each test connects to it anew."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 1024**2}
    running = Cluster(initialize_head=True, head_node_args=head)
    yield PoolOptions(running.address, workers=2)
    running.shutdown()


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The store that one process makes."""
    synthesize(PAIRS, tmp_path / "alone", NoiseGenerator(), MeanCaptioner(), CONFIG)
    return tmp_path / "alone"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_item_is_done_once_and_models_are_loaded_once_a_worker(cluster: PoolOptions, tmp_path: Path) -> None:
    with WorkerPool(cluster, Count(tmp_path)) as pool:
        assert pool.ask(int) in {int(path.name.split("-")[1]) for path in tmp_path.iterdir()}
        done = list(pool.done(range(30), duties.doubled))
        assert sorted(item.item for item in done) == list(range(30))
        assert all(item.result == 2 * item.item and not item.lost for item in done)
        assert sorted(item.item for item in pool.done(range(3), duties.doubled)) == [0, 1, 2]
        assert list(pool.done([], duties.doubled)) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_items_are_taken_as_workers_become_free(cluster: PoolOptions, tmp_path: Path) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(12):
            taken.append(item)
            yield item

    with WorkerPool(cluster, Count(tmp_path)) as pool:
        for count, _ in enumerate(pool.done(items(), duties.doubled), 1):
            assert len(taken) <= count + cluster.workers  # type: ignore[operator]
    assert taken == list(range(12))


def test_an_item_whose_worker_dies_is_made_by_another(cluster: PoolOptions, tmp_path: Path) -> None:
    with WorkerPool(cluster, Count(tmp_path)) as pool:
        done = list(pool.done(range(6), Once(tmp_path, 2)))
    assert sorted(item.result for item in done if item.result is not None) == list(range(6))
    assert (tmp_path / "given").exists()


def test_an_item_that_kills_every_worker_comes_back_as_lost(cluster: PoolOptions, tmp_path: Path) -> None:
    with WorkerPool(dataclasses.replace(cluster, tries=2), Count(tmp_path)) as pool:
        done = {item.item: item for item in pool.done(range(6), duties.deadly)}
    assert {item for item, found in done.items() if found.lost} == {3}
    assert [found.result for _, found in sorted(done.items())] == [0, 2, 4, None, 8, 10]


def test_an_item_that_takes_long_is_made_by_an_idle_worker_too(cluster: PoolOptions, tmp_path: Path) -> None:
    with WorkerPool(cluster, Count(tmp_path)) as pool:
        done = list(pool.done(range(6), Once(tmp_path, 2, hang_s=60.0)))
    assert sorted(item.item for item in done) == list(range(6))


def test_errors_are_raised_as_they_are(cluster: PoolOptions, tmp_path: Path) -> None:
    with WorkerPool(cluster, Count(tmp_path)) as pool, pytest.raises(ValueError, match=r"^five$"):
        list(pool.done(range(9), duties.failing))
    one = dataclasses.replace(cluster, workers=1, tries=1)
    with WorkerPool(one, duties.refuse) as pool, pytest.raises(MissingExtraError, match=r"mi2rage-rt\[cpu\]"):
        pool.ask(repr)
    with WorkerPool(one, duties.die) as pool, pytest.raises(Mi2rageError, match="1 died while they started"):
        pool.ask(repr)


def test_the_store_is_that_of_one_process(cluster: PoolOptions, alone: Path, tmp_path: Path) -> None:
    outcome = make_on_cluster(PAIRS, tmp_path / "two", FakeChoice(), CONFIG, cluster)
    assert contents(tmp_path / "two") == contents(alone)
    assert (outcome.tally.rows, outcome.left_out, outcome.stopped) == (36, (), None)


def test_a_store_is_gone_on_with_by_either(cluster: PoolOptions, alone: Path, tmp_path: Path) -> None:
    out, one_shard = tmp_path / "two", RunOptions(budget=Budget(kept=1))
    outcome = make_on_cluster(PAIRS, out, FakeChoice(), CONFIG, dataclasses.replace(cluster, workers=1), one_shard)
    assert outcome.manifest is not None
    assert len(outcome.manifest.shards) == 1
    outcome = make_here(
        PAIRS, out, NoiseGenerator(), MeanCaptioner(), CONFIG, options=RunOptions(budget=Budget(kept=9))
    )
    assert outcome.manifest is not None
    assert (len(outcome.manifest.shards), outcome.stopped) == (2, "16 candidates are kept, 9 were asked for")
    make_on_cluster(PAIRS, out, FakeChoice(), CONFIG, cluster)
    assert contents(out) == contents(alone)


def test_samples_that_raise_or_kill_are_left_out(
    cluster: PoolOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, cluster = FakeChoice(raises="Lo5", kills="Lo10"), dataclasses.replace(cluster, tries=1)
    with caplog.at_level(logging.WARNING, "mi2rage_training"):
        outcome = make_on_cluster(PAIRS, tmp_path / "two", bad, CONFIG, cluster, RunOptions(tries=2))
    assert [sample.id for sample in outcome.left_out] == ["s5", "s10"]
    assert "cannot draw Lo5" in outcome.left_out[0].reason
    assert outcome.tally.rows == 2 * 16
    rest = [pair for pair in PAIRS if pair.sample.id != "s10"]
    alone = make_here(rest, tmp_path / "one", Poisoned("Lo5"), MeanCaptioner(), CONFIG, options=RunOptions(tries=1))
    assert [sample.id for sample in alone.left_out] == ["s5"]
    shard = "shard-00001.parquet"
    assert (tmp_path / "two" / shard).read_bytes() == (tmp_path / "one" / shard).read_bytes()
    again = make_on_cluster(PAIRS, tmp_path / "two", bad, CONFIG, cluster, RunOptions(tries=2))
    assert again.left_out == outcome.left_out
    assert read_manifest(tmp_path / "two").rows == 32


def test_models_that_kill_whatever_they_make_are_no_fault_of_the_samples(cluster: PoolOptions, tmp_path: Path) -> None:
    deadly, once = FakeChoice(kills="Ana"), dataclasses.replace(cluster, workers=1, tries=1)
    with pytest.raises(Mi2rageError, match="every worker that made shard 0 died; nothing was ever made"):
        make_on_cluster(PAIRS[:1], tmp_path / "two", deadly, CONFIG, once, RunOptions(tries=1))
    with pytest.raises(Mi2rageError, match="every worker that made shard 0 died; expected"):
        make_on_cluster(PAIRS[:1], tmp_path / "two", deadly, CONFIG, once)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["settings.json"]


def test_predictions_are_those_of_one_process(cluster: PoolOptions, tmp_path: Path) -> None:
    bundle, spans = build_bundle(tmp_path / "bundle"), (Span(0, 2), Span(3, 4))
    rows = [Sample(f"s{i}", ("Tim", "Cook", "leads", "Apple" if i % 3 else "Rome"), *spans) for i in range(1100)]
    rows[40] = dataclasses.replace(rows[40], label="/no/such")
    options: list[list[Skipped]] = [[], []]
    choice = ClassifierChoice(bundle, threads=1)
    one = predict_samples(choice.load(), rows, None, skip_bad=True, skipped=options[0])
    two = predict_on_cluster(choice, rows, None, cluster, skip_bad=True, skipped=options[1])
    assert len(two) == 1099
    assert two == one
    assert options[0] == options[1]
    with pytest.raises(DataError, match="all 1 samples were skipped"):
        predict_on_cluster(choice, rows[40:41], None, dataclasses.replace(cluster, workers=1), skip_bad=True)


def test_a_selection_is_that_of_one_process(cluster: PoolOptions, tmp_path: Path) -> None:
    import torch

    synthesize([Pair(sample) for sample in samples(24)], tmp_path / "all", NoiseGenerator(), MeanCaptioner(), CONFIG)
    teacher = TeacherConfig(2, FitConfig(epochs=1))
    config = SelectionConfig(PolicyConfig(Policy.ADDED, per_parent=1), teacher, fit_on=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(cluster.threads)  # as the workers have
    try:
        one = select(tmp_path / "all", tmp_path / "one", config)
        two = select(tmp_path / "all", tmp_path / "two", config, cluster)
    finally:
        torch.set_num_threads(threads)
    assert one.kept.sum() == 24
    assert two.manifest == one.manifest
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    with pytest.raises(InputError, match="--ray: came without --fit-on"):
        select(tmp_path / "all", tmp_path / "three", dataclasses.replace(config, fit_on=None), cluster)
    assert not (tmp_path / "three").exists()


def test_bad_options_are_refused() -> None:
    for wrong in ({"workers": 0}, {"gpus_per_worker": -1.0}, {"cpus_per_worker": 0.0}, {"tries": 0}):
        with pytest.raises(InputError, match="expected"):
            PoolOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--workers 2: came without --ray"):
        pool_options(None, 2, None, None)
    with pytest.raises(InputError, match=r"--cpus-per-worker 0\.5: came without --ray"):
        pool_options(None, None, None, 0.5)
    assert pool_options(None, None, None, None) is None
    assert pool_options("local", None, 0.5, None, tries=0) == PoolOptions(gpus_per_worker=0.5, tries=1)
