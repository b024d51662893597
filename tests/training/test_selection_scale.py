"""Selecting from stores that are larger than memory: what is held, and teachers fitted on a part."""

import contextlib
import dataclasses
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.images import encode_image
from mi2rage_training import selection, teacher_sample
from mi2rage_training.folds import fold_of
from mi2rage_training.policies import Policy, PolicyConfig
from mi2rage_training.selection import SelectionConfig, select, table_from_candidates
from mi2rage_training.selection_page import write_selection_page
from mi2rage_training.store import Candidate, StoredCandidates, StoreWriter, read_store
from mi2rage_training.teacher import TeacherConfig, fit_teachers
from mi2rage_training.teacher_sample import chosen_parents, fit_teachers_on_some
from tests.training.fakes import candidates
from tests.training.test_teacher import stub_fit

__all__ = ["stub_fit"]

SHARD_ROWS = 6
IMAGE_BYTES = 100_000


def stored(folder: Path, rows: list[Candidate]) -> Path:
    """A finished store of small shards."""
    writer = StoreWriter(folder, {"step": "test"})
    starts = range(0, len(rows), SHARD_ROWS)
    for index, start in enumerate(starts):
        writer.write(index, rows[start : start + SHARD_ROWS])
    writer.finish(len(starts))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 600 candidates with 60 MB of images: PNGs of one colour with a long tail, which decoders ignore."""
    rng = np.random.default_rng(0)
    rows = [
        dataclasses.replace(
            row,
            image=encode_image(np.full((24, 24, 3), rng.integers(0, 255, 3), np.uint8)) + rng.bytes(IMAGE_BYTES),
            caption=f"a man with {i} balls",
        )
        for i, row in enumerate(candidates(200, links=3))
    ]
    return stored(tmp_path_factory.mktemp("large") / "store", rows)


class Peak:
    """The most bytes that Python's and Arrow's allocators held in the block."""

    total = 0


@contextlib.contextmanager
def peak_bytes() -> Iterator[Peak]:
    usual, found = pa.default_memory_pool(), Peak()
    counted = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counted)
    tracemalloc.start()
    try:
        yield found
    finally:
        found.total = tracemalloc.get_traced_memory()[1] + (counted.max_memory() or 0)
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_candidates_of_a_store_are_gone_through_again_and_without_images(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, via=b"y") for row in candidates(8)]
    found = StoredCandidates(stored(tmp_path, rows))
    assert len(found) == 16
    assert list(found) == list(found) == rows
    assert list(found.without_images()) == [dataclasses.replace(row, image=b"", via=None) for row in rows]
    with pytest.raises(DataError, match="is no store"):
        StoredCandidates(tmp_path / "nowhere")


@pytest.mark.parametrize("policy", [Policy.RANDOM, Policy.DIRECT, Policy.SIMILARITY, Policy.K_CENTRE])
def test_without_a_teacher_images_are_never_in_memory_together(policy: Policy, large: Path, tmp_path: Path) -> None:
    config = SelectionConfig(PolicyConfig(policy, per_parent=1, per_label=4))
    few = [
        dataclasses.replace(row, caption="a man", image=encode_image(np.zeros((8, 8, 3), np.uint8)))
        for row in candidates(4)
    ]
    select(stored(tmp_path / "few", few), tmp_path / "warm", config)  # loads what is loaded once
    with peak_bytes() as peak:
        result = select(large, tmp_path / "selected", config)
    assert result.manifest.rows == 12
    assert peak.total < 250 * IMAGE_BYTES  # of 600
    kept = list(read_store(tmp_path / "selected"))
    assert all(len(row.image) > IMAGE_BYTES for row in kept)
    every = list(read_store(large))
    assert kept == [every[row] for row in np.flatnonzero(result.kept)]


def test_shards_of_large_images_have_fewer_rows(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SHARD_BYTES", 5 * IMAGE_BYTES)
    result = select(large, tmp_path / "selected", SelectionConfig(PolicyConfig(Policy.RANDOM, per_label=4)))
    assert len(result.manifest.shards) in (2, 3)
    shards = [pq.read_metadata(tmp_path / "selected" / name).num_rows for name in result.manifest.shards]
    assert all(5 <= rows <= 9 for rows in shards[:-1])
    assert len(list(read_store(tmp_path / "selected"))) == result.manifest.rows == 12


def test_the_page_holds_the_images_that_it_shows(large: Path, tmp_path: Path) -> None:
    result = select(large, tmp_path / "selected", SelectionConfig(PolicyConfig(Policy.RANDOM, per_parent=1)))
    with peak_bytes() as peak:
        write_selection_page(tmp_path / "page.html", StoredCandidates(large), result, parents=4)
    assert peak.total < 200 * IMAGE_BYTES
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<section class="parent">') == 4
    write_selection_page(tmp_path / "other.html", list(read_store(large)), result, parents=4)
    assert page == (tmp_path / "other.html").read_text(encoding="utf-8")


def test_teachers_fitted_on_some_score_all(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows, config = candidates(60), TeacherConfig(folds=3)
    known = table_from_candidates(rows)
    teachers, scores = fit_teachers_on_some(rows, known, config, 21)
    chosen = chosen_parents(known, 21, 3, 0)
    assert len(chosen) == 21
    fitted, scored = stub_fit[:3], stub_fit[3:]
    assert set().union(*(seen for seen, _ in fitted)) == chosen
    assert set().union(*(parents for _, parents in scored)) == {f"s{i}" for i in range(60)}
    assert all(not seen & parents for seen, parents in stub_fit)
    links = np.array([row.provenance.link for row in rows])
    assert scores.label_entropy_nats == pytest.approx(math.log(3))  # of all 60, not of the 21
    assert scores.information_nats[links == 1] == pytest.approx(math.log(3))
    assert scores.added_nats[links == 2] == pytest.approx(0)
    in_sample = np.array([row.provenance.parent in chosen for row in rows])
    assert scores.weights[in_sample] == pytest.approx(1) and not scores.weights[~in_sample].any()
    assert scores.probabilities.shape == (120, 3)
    alone = fit_teachers([row for row in rows if row.provenance.parent in chosen], config)
    assert scores.added_nats[in_sample] == pytest.approx(alone[1].added_nats)
    assert (teachers.name, teachers.temperatures) == (alone[0].name, alone[0].temperatures)


def test_fitting_on_as_many_as_there_are_is_fitting_on_all(stub_fit: list[tuple[set[str], set[str]]]) -> None:
    rows, config = candidates(30), TeacherConfig(folds=2)
    some = fit_teachers_on_some(rows, table_from_candidates(rows), config, 1000)[1]
    every = fit_teachers(rows, config)[1]
    assert some.added_nats.tolist() == every.added_nats.tolist()
    assert some.weights.tolist() == every.weights.tolist()
    assert len(stub_fit) == 4


def test_who_is_chosen_follows_the_key_and_no_label_is_left_out() -> None:
    rows = candidates(300)
    rare = [dataclasses.replace(row, sample=dataclasses.replace(row.sample, label="rare")) for row in rows[:8]]
    known = table_from_candidates([*rare, *rows[8:]])
    chosen = chosen_parents(known, 40, 3, 0)
    assert len(chosen) == 40
    assert len(chosen & {"s0", "s1", "s2", "s3"}) >= 3
    assert chosen == chosen_parents(known, 40, 3, 0) != chosen_parents(known, 40, 3, 1)
    backwards = table_from_candidates([*rare, *rows[8:]][::-1])
    assert chosen == chosen_parents(backwards, 40, 3, 0)
    assert chosen < chosen_parents(known, 80, 3, 0)
    folds = [fold_of(parent, 3, 0) for parent in chosen]
    assert min(folds.count(fold) for fold in range(3)) > 5


def test_too_few_to_fit_on(tmp_path: Path) -> None:
    rows = candidates(30)
    with pytest.raises(DataError, match=r"1 real samples to fit teachers on: none has the label.*larger --fit-on"):
        fit_teachers_on_some(rows, table_from_candidates(rows), TeacherConfig(folds=2), 1)
    with pytest.raises(InputError, match="fit on: came 0 with the policy added; expected 1 or more real samples"):
        SelectionConfig(fit_on=0)
    with pytest.raises(InputError, match="fit on: came 5 with the policy random"):
        SelectionConfig(PolicyConfig(Policy.RANDOM), fit_on=5)


def test_settings_of_earlier_releases_are_those_of_today() -> None:
    assert "fit_on" not in SelectionConfig().described()
    assert SelectionConfig(fit_on=7).described()["fit_on"] == 7


@pytest.mark.parametrize(("fit_on", "low", "high"), [(None, 600, 1000), (20, 60, 250)])
def test_what_teachers_are_fitted_on_is_what_is_held(
    fit_on: int | None,
    low: int,
    high: int,
    large: Path,
    tmp_path: Path,
    stub_fit: list[tuple[set[str], set[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_sample, "_BATCH", 64)
    limits, teacher = PolicyConfig(Policy.ADDED, per_parent=1, per_label=4), TeacherConfig(folds=2)
    with peak_bytes() as peak:
        result = select(large, tmp_path / "selected", SelectionConfig(limits, teacher, fit_on=fit_on))
    assert result.manifest.rows == 12
    assert result.scores is not None and len(result.scores.added_nats) == 600
    assert low * IMAGE_BYTES < peak.total < high * IMAGE_BYTES
