"""Looking after stores: `store verify`, `store merge`, `store stats`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt import cli
from mi2rage_rt.images import encode_image
from mi2rage_training import store_merge
from mi2rage_training.chain import ChainConfig, synthesize
from mi2rage_training.pairs import Pair, load_pairs
from mi2rage_training.policies import Policy, PolicyConfig
from mi2rage_training.selection import SelectionConfig, select
from mi2rage_training.shard_work import left_out_of
from mi2rage_training.store import Candidate, StorePlace, StoreWriter, read_manifest, read_store, record_of, shard_name
from mi2rage_training.store_check import check_store
from mi2rage_training.store_files import files_at
from mi2rage_training.store_manifest import note_name
from mi2rage_training.store_merge import merge_stores
from mi2rage_training.store_stats import stats_of_store
from tests.training.fakes import MeanCaptioner, NoiseGenerator, candidates, samples
from tests.training.object_store import s3_server
from tests.training.test_store import flip
from tests.training.test_store_files import place_of

CONFIG = ChainConfig(links=2, shard_size=4)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: None) -> StorePlace:
    """Nothing yet, of each kind."""
    return place_of(request.param, tmp_path)


def made(place: StorePlace, first: int = 0, count: int = 10, **settings: Any) -> list[Candidate]:
    """A store of some of the samples, and what is in it."""
    pairs = [Pair(sample) for sample in samples(first + count)[first:]]
    synthesize(pairs, place, NoiseGenerator(), MeanCaptioner(), dataclasses.replace(CONFIG, **settings))
    return list(read_store(place))


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_every_fault_of_a_store_is_named(place: StorePlace) -> None:
    made(place, count=20)
    found = check_store(place)
    assert found.whole
    assert (found.shards, found.rows, found.damaged, found.missing, found.extra) == (5, 40, (), (), ())
    files = files_at(place)
    flip(place, shard_name(1))
    files.remove(shard_name(3))
    files.write(shard_name(7), files.read(shard_name(0)))
    found = check_store(place)
    assert (found.damaged, found.missing, found.extra) == ((shard_name(1),), (shard_name(3),), (shard_name(7),))
    assert (found.whole, found.rows, found.shards) == (False, 24, 5)
    made(place, count=20)
    assert not check_store(place).whole
    files.remove(shard_name(7))
    assert check_store(place).whole


def test_an_unfinished_store_checks_itself(tmp_path: Path) -> None:
    made(tmp_path, count=20)
    (tmp_path / "manifest.json").unlink()
    found = check_store(tmp_path)
    assert (found.finished, found.whole, found.shards, found.rows, found.damaged) == (False, False, 5, 40, ())
    assert "is not finished; 5 shards, 40 candidates so far" in found.described()
    flip(tmp_path, shard_name(2))
    assert check_store(tmp_path).damaged == (shard_name(2),)


def test_verify_says_what_is_wrong_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "store")
    assert called(capsys, "store", "verify", tmp_path / "store") == (
        0,
        f"{tmp_path / 'store'}: whole; 3 shards, 20 candidates\n",
        "",
    )
    flip(tmp_path / "store", shard_name(1))
    code, out, _ = called(capsys, "store", "verify", tmp_path / "store")
    assert code == 1
    assert out.startswith(f"damaged: {shard_name(1)}\n") and "makes these shards again" in out
    code, out, _ = called(capsys, "store", "verify", tmp_path / "store", "--json")
    document = json.loads(out)
    assert (code, document["whole"], document["damaged"], document["rows"]) == (1, False, [shard_name(1)], 12)
    code, _, err = called(capsys, "store", "verify", tmp_path)
    assert code == 2
    assert "is no store; expected a folder written by" in err
    assert called(capsys, "store", "verify", tmp_path / "nowhere")[0] == 2


def test_stores_of_different_samples_become_one(place: StorePlace, tmp_path: Path) -> None:
    one, two = tmp_path / "one", place_of("memory", tmp_path / "two")
    rows = made(one) + made(two, first=10, seed=3)
    manifest = merge_stores([one, two], place)
    assert (manifest.rows, len(manifest.shards)) == (40, 6)
    assert list(read_store(place)) == rows
    assert check_store(place).whole
    assert len(load_pairs(place)) == 40
    settings = manifest.settings
    assert settings["step"] == "merge"
    assert (settings["of"]["step"], settings["of"]["chain.links"], settings["of"]["generator"]) == (
        "synthesize",
        2,
        "noise",
    )
    assert [part["chain.seed"] for part in settings["stores"]] == [0, 3]
    assert [(part["samples"], part["rows"]) for part in settings["stores"]] == [(10, 20), (10, 20)]
    records = [*read_manifest(one).shards.values(), *read_manifest(two).shards.values()]
    assert list(manifest.shards.values()) == records  # the shards are the same bytes


def test_merged_stores_are_merged_and_selected_from(tmp_path: Path) -> None:
    rows = [row for i in range(3) for row in made(tmp_path / str(i), first=10 * i)]
    merge_stores([tmp_path / "0", tmp_path / "1"], tmp_path / "01")
    merge_stores([tmp_path / "01", tmp_path / "2"], tmp_path / "012")
    assert list(read_store(tmp_path / "012")) == rows
    config = SelectionConfig(PolicyConfig(Policy.RANDOM, per_parent=1))
    select(tmp_path / "012", tmp_path / "all", config)
    assert read_manifest(tmp_path / "all").rows == 30
    select(tmp_path / "2", tmp_path / "s2", config)
    select(tmp_path / "1", tmp_path / "s1", config)
    assert merge_stores([tmp_path / "s2", tmp_path / "s1"], tmp_path / "s").rows == 20
    with pytest.raises(InputError, match=r"different settings.*step: 'synthesize' and 'select'"):
        merge_stores([tmp_path / "0", tmp_path / "s1"], tmp_path / "no")


def test_what_a_store_lacks_is_noted_in_the_merged_one_too(tmp_path: Path) -> None:
    made(tmp_path / "one")
    made(tmp_path / "two", first=10)
    note = note_name(shard_name(1))
    (tmp_path / "two" / note).write_text('{"id": "s99", "reason": "no image"}\n')
    merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert [left.id for left in left_out_of(files_at(tmp_path / "out"))] == ["s99"]
    first = len(read_manifest(tmp_path / "one").shards)
    assert (tmp_path / "out" / note_name(shard_name(first + 1))).is_file()


def test_a_merge_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made(tmp_path / "one") + made(tmp_path / "two", first=10)
    stores = [tmp_path / "one", tmp_path / "two"]
    copied: list[str] = []
    whole = store_merge.read_shard

    def counted(files: Any, name: str, record: Any) -> bytes:
        if len(copied) == 4:
            raise KeyboardInterrupt
        copied.append(name)
        return whole(files, name, record)

    monkeypatch.setattr(store_merge, "read_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(stores, tmp_path / "out")
    with pytest.raises(DataError, match="is not finished"):
        read_manifest(tmp_path / "out")
    copied.clear()
    merge_stores(stores, tmp_path / "out")
    assert len(copied) == 2
    assert list(read_store(tmp_path / "out")) == rows


def test_what_does_not_belong_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "one")
    made(tmp_path / "same", seed=1)
    made(tmp_path / "other", first=10, links=1)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"one and .*same: candidate 's0/0\.1' is in both; expected different samples"):
        merge_stores([tmp_path / "one", tmp_path / "same"], out)
    with pytest.raises(InputError, match=r"were made with different settings \(chain\.links: 2 and 1\)"):
        merge_stores([tmp_path / "one", tmp_path / "other"], out)
    with pytest.raises(InputError, match="stores: came 1; expected two or more"):
        merge_stores([tmp_path / "one"], out)
    with pytest.raises(DataError, match="is no store"):
        merge_stores([tmp_path / "one", tmp_path / "nowhere"], out)
    assert not out.exists()
    made(tmp_path / "two", first=10)
    flip(tmp_path / "two", shard_name(1))
    with pytest.raises(DataError, match=r"shard-00001\.parquet: (cannot be read|is missing or was changed)"):
        merge_stores([tmp_path / "one", tmp_path / "two"], out)
    # Two ids whose hashes are equal are still two ids.
    made(tmp_path / "three", first=20)
    monkeypatch.setattr(store_merge, "seed_from", lambda name: hash(name[:1]) & 0xFF)
    assert merge_stores([tmp_path / "one", tmp_path / "three"], tmp_path / "fine").rows == 40


def test_shards_with_other_columns_are_not_merged(tmp_path: Path) -> None:
    made(tmp_path / "one")
    writer = StoreWriter(tmp_path / "two", json.loads((tmp_path / "one" / "settings.json").read_text()))
    table = pq.read_table(tmp_path / "one" / shard_name(0)).drop_columns("weight")
    table = table.set_column(0, "id", [[f"x{i}" for i in range(table.num_rows)]])
    pq.write_table(table, tmp_path / "two" / shard_name(0))
    writer._records[0] = record_of((tmp_path / "two" / shard_name(0)).read_bytes()), table.num_rows
    writer.finish(1)
    with pytest.raises(DataError, match=r"two/shard-00000\.parquet: has other columns than a store of this version"):
        merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_merge_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "one")
    made(tmp_path / "two", first=10)
    args = ("store", "merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out", "--json")
    code, out, _ = called(capsys, *args)
    assert (code, json.loads(out)) == (
        0,
        {"store": str(tmp_path / "out"), "stores": 2, "candidates": 40, "shards": 6},
    )
    assert called(capsys, *args)[0] == 0
    code, _, err = called(capsys, "store", "merge", tmp_path / "one", tmp_path / "one", "--out", tmp_path / "no")
    assert code == 2
    assert err.count("\n") == 1 and "is in both" in err


def colour(side: int, grey: int, kind: str = "png") -> bytes:
    """A square of one grey."""
    return encode_image(np.full((side, side, 3), grey, np.uint8), kind, 90)


def test_stats_count_what_is_there(place: StorePlace) -> None:
    rows = candidates(4, links=2)
    images = [colour(8, 10 * i) for i in range(6)] + [colour(16, 1, "jpeg"), b"nothing"]
    images[3] = images[1]
    rows = [
        dataclasses.replace(row, image=image, caption=f"caption {min(i, 6)}", added_nats=float(i) if i < 5 else None)
        for i, (row, image) in enumerate(zip(rows, images, strict=True))
    ]
    writer = StoreWriter(place, {"step": "test"})
    writer.write(0, rows[:6])
    writer.write(1, rows[6:])
    writer.write(2, [])
    manifest = writer.finish(3)
    found = stats_of_store(place)
    assert (found.step, found.rows, found.shards, found.parents) == ("test", 8, 3, 4)
    assert found.store_bytes == sum(record.bytes for record in manifest.shards.values())
    assert found.image_bytes == sum(map(len, images))
    assert dict(found.labels) == {"None": 4, "/per/per/peer": 2, "/per/org/member_of": 2}
    assert dict(found.links) == {1: 4, 2: 4}
    assert dict(found.formats) == {"png": 6, "jpeg": 1, "unreadable": 1}
    assert dict(found.sizes) == {"8x8": 6, "16x16": 1}
    assert (found.repeated_images, found.repeated_captions) == (1, 1)  # rows 6 and 7 are siblings
    assert list(found.scores) == ["added_nats"]
    assert found.scores["added_nats"] == {
        "count": 5,
        "min": 0.0,
        "p5": pytest.approx(0.2),
        "p25": 1.0,
        "p50": 2.0,
        "p75": 3.0,
        "p95": pytest.approx(3.8),
        "max": 4.0,
    }


def test_captions_are_repeated_among_siblings_alone_and_real_images_are_no_repetition(tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(row, image=colour(8, 1), caption="the same", made="text", via=b"1234")
        for row in candidates(3, links=3)
    ]
    writer = StoreWriter(tmp_path, {"step": "test"})
    writer.write(0, rows)
    writer.finish(1)
    found = stats_of_store(tmp_path)
    assert (found.repeated_images, found.repeated_captions, found.via_bytes) == (0, 6, 36)


def test_stats_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "store")
    code, out, _ = called(capsys, "store", "stats", tmp_path / "store")
    assert code == 0
    assert "20 of 10 real samples, in 3 shards" in out
    assert "png 20" in out and "8x8 20" in out and "/per/org/member_of  6" in out
    code, out, _ = called(capsys, "store", "stats", tmp_path / "store", "--json")
    document = json.loads(out)
    assert (code, document["rows"], document["links"], document["repeated_images"]) == (0, 20, {"1": 10, "2": 10}, 0)
    (tmp_path / "store" / "manifest.json").unlink()
    code, _, err = called(capsys, "store", "stats", tmp_path / "store")
    assert code == 2
    assert "is not finished" in err
