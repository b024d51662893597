"""Writing a store, going on, and repairing it, wherever it is; who else can read it."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError, InputError, Mi2rageError
from mi2rage_rt.images import decode_image, encode_image
from mi2rage_training.chain import ChainConfig, synthesize
from mi2rage_training.pairs import Pair, load_pairs
from mi2rage_training.store import (
    Candidate,
    StorePlace,
    StoreWriter,
    is_store,
    read_columns,
    read_manifest,
    read_store,
    set_aside,
    shard_name,
)
from mi2rage_training.store_files import files_at
from mi2rage_training.store_rows import rows_if_whole
from tests.training.fakes import MeanCaptioner, NoiseGenerator, candidates, samples
from tests.training.object_store import s3_server
from tests.training.test_store_files import place_of

SETTINGS = {"step": "test", "seed": 0}
CONFIG = ChainConfig(links=2, seed=5, shard_size=4)
PAIRS = [Pair(sample) for sample in samples(10)]


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: None) -> StorePlace:
    """Nothing yet, of each kind."""
    return place_of(request.param, tmp_path)


def pictured(parents: int) -> list[Candidate]:
    """Candidates with images that can be decoded, and some bytes that do not shrink."""
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(row, image=encode_image(rng.integers(0, 255, (8, 8, 3), np.uint8)))
        for row in candidates(parents)
    ]


def flip(place: StorePlace, name: str, at: float = 0.5) -> None:
    """Change one byte in a file, at a share of its length."""
    files = files_at(place)
    content = bytearray(files.read(name))
    content[int(at * len(content))] ^= 0x10
    files.write(name, bytes(content))


def made(place: StorePlace) -> list[int]:
    """Synthesize into `place`, and say how many prompts the generator got."""
    generator = NoiseGenerator()
    synthesize(PAIRS, place, generator, MeanCaptioner(), CONFIG)
    return [len(prompts) for prompts, _ in generator.calls]


def test_a_store_anywhere_is_written_and_read(place: StorePlace) -> None:
    rows = pictured(6)
    assert not is_store(place)
    writer = StoreWriter(place, SETTINGS)
    assert is_store(place)
    assert (writer.has(0), writer.missing(2)) == (False, [0, 1])
    writer.write(1, rows[8:])
    with pytest.raises(DataError, match="is not finished"):
        read_manifest(place)
    with pytest.raises(DataError, match=r"shard-00000\.parquet is missing or damaged; expected 2 whole shards"):
        writer.finish(2)
    again = StoreWriter(place, SETTINGS)
    assert again.missing(2) == [0]
    again.write(0, rows[:8])
    manifest = again.finish(2)
    assert (manifest.rows, list(manifest.shards)) == (12, [shard_name(0), shard_name(1)])
    assert read_manifest(place) == manifest
    assert list(read_store(place)) == rows
    pairs = load_pairs(place)
    assert [pair.image for pair in pairs] == [row.image for row in rows]
    with pytest.raises(InputError, match=r"begun with other settings \(seed: was 0, is 1\)"):
        StoreWriter(place, {**SETTINGS, "seed": 1})


def test_the_bytes_are_the_same_everywhere(place: StorePlace, tmp_path: Path) -> None:
    assert made(place) == [4, 4, 4, 4, 2, 2]
    made(tmp_path / "reference")
    assert read_manifest(place) == read_manifest(tmp_path / "reference")
    assert made(place) == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["missing", "cut", "image", "header", "footer"])
def test_a_damaged_shard_is_made_again(
    damage: str, finished: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "store"
    made(place)
    whole = read_manifest(place)
    name = shard_name(1)
    content = (place / name).read_bytes()
    if not finished:
        (place / "manifest.json").unlink()
    if damage == "missing":
        (place / name).unlink()
    elif damage == "cut":
        (place / name).write_bytes(content[: len(content) // 2])
    else:
        where = {"image": content.index(b"IDAT") + 60, "header": 5, "footer": len(content) - 3}[damage]
        flip(place, name, where / len(content))
    if finished:
        with pytest.raises(DataError, match=rf"{name}: is missing or was changed.*makes this shard again"):
            list(read_store(place))
    assert made(place) == [4, 4]
    assert read_manifest(place) == whole
    assert len(list(read_store(place))) == 20
    assert ("is to be made again" in caplog.text) == (damage != "missing")


def test_every_flipped_bit_is_found_without_a_manifest(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, SETTINGS)
    writer.write(0, pictured(2))
    content = (tmp_path / shard_name(0)).read_bytes()
    assert rows_if_whole(content) == 4
    rng = np.random.default_rng(0)
    places = {*rng.integers(0, len(content), 400).tolist(), *range(100), *range(len(content) - 1200, len(content))}
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        assert rows_if_whole(bytes(broken)) is None, place
    for length in rng.integers(0, len(content), 50).tolist():
        assert rows_if_whole(content[:length]) is None


def test_shards_of_earlier_releases_are_taken_if_they_can_be_decoded(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / shard_name(0)
    table = pq.read_table(path)
    old = {key: value for key, value in table.schema.metadata.items() if key != b"mi2rage_sha256"}
    pq.write_table(table.replace_schema_metadata(old), path, compression="zstd")
    assert made(tmp_path) == []
    (tmp_path / "manifest.json").unlink()
    path.write_bytes(path.read_bytes()[:-100])
    assert made(tmp_path) == [4, 4]


def test_a_whole_shard_that_was_changed_is_not_taken_for_the_finished_ones(tmp_path: Path) -> None:
    made(tmp_path / "store")
    whole = read_manifest(tmp_path / "store")
    name = shard_name(0)
    table = pq.read_table(tmp_path / "store" / name)
    pq.write_table(table.slice(1), tmp_path / "store" / name)
    assert made(tmp_path / "store") == [4, 4]
    assert read_manifest(tmp_path / "store") == whole


def test_a_shard_of_another_schema_is_made_again(tmp_path: Path) -> None:
    made(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    name = shard_name(0)
    pq.write_table(pq.read_table(tmp_path / "store" / name).drop_columns("weight"), tmp_path / "store" / name)
    assert made(tmp_path / "store") == [4, 4]


def test_a_damaged_manifest_is_written_again(tmp_path: Path) -> None:
    place = tmp_path / "store"
    made(place)
    whole = read_manifest(place)
    (place / "manifest.json").write_bytes((place / "manifest.json").read_bytes()[:100])
    with pytest.raises(DataError, match=r"manifest\.json: is damaged"):
        read_manifest(place)
    assert made(place) == []
    assert read_manifest(place) == whole


def test_a_store_of_another_schema_version_is_neither_read_nor_written(tmp_path: Path) -> None:
    place = tmp_path / "store"
    made(place)
    document = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**document, "schema_version": 1}))
    for call in (lambda: list(read_store(place)), lambda: made(place)):
        with pytest.raises(DataError, match="store of schema version 1; expected 2"):
            call()
    assert len(list(place.iterdir())) == 5


def test_columns_are_read_without_the_others(place: StorePlace) -> None:
    rows = pictured(6)
    writer = StoreWriter(place, SETTINGS)
    writer.write(0, rows[:8])
    writer.write(1, rows[8:])
    writer.finish(2)
    tables = list(read_columns(place, ("id", "image.path")))
    assert [table.num_rows for table in tables] == [8, 4]
    assert tables[1].to_pylist()[0] == {"id": rows[8].sample.id, "image": {"path": rows[8].sample.image}}
    files_at(place).remove(shard_name(1))
    with pytest.raises(DataError, match=r"shard-00001\.parquet: cannot be read"):
        list(read_columns(place, ("id",)))


def test_drafts_of_a_killed_run_are_no_obstacle_and_go(tmp_path: Path) -> None:
    place = tmp_path / "store"
    place.mkdir()
    for name in (".settings.json.k1ll", ".shard-00000.parquet.k1ll"):
        (place / name).write_bytes(b"half")
    made(place)
    assert sorted(path.name for path in place.iterdir()) == [
        "manifest.json",
        "settings.json",
        *(shard_name(i) for i in range(3)),
    ]


def test_what_is_no_store_is_left_alone(place: StorePlace, tmp_path: Path) -> None:
    files_at(place).write("mine.txt", b"mine")
    assert set_aside(place) is None
    with pytest.raises(InputError, match="exists and is no store of candidates"):
        StoreWriter(place, SETTINGS)
    assert files_at(place).names() == {"mine.txt": 4}
    (tmp_path / "file").write_text("mine")
    assert not is_store(tmp_path / "file")
    with pytest.raises(InputError, match="is a file"):
        StoreWriter(tmp_path / "file", SETTINGS)


def test_writers_in_several_places_at_once(place: StorePlace) -> None:
    driver, *workers = (StoreWriter(place, SETTINGS) for _ in range(3))
    rows = pictured(4)
    for index, worker in enumerate(workers):
        worker.write(index, rows[4 * index : 4 * index + 4])
    assert driver.has(0) and driver.has(1) and not driver.has(2)
    assert driver.finish(2).rows == 8
    assert list(read_store(place)) == rows


def test_a_new_run_keeps_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "store"
    for number in (1, 2):
        made(place)
        before = read_manifest(place)
        assert set_aside(place) == tmp_path / f"store.{number}"
        assert not place.exists()
        assert read_manifest(tmp_path / f"store.{number}") == before
    assert set_aside(place) is None
    unfinished = StoreWriter(place, SETTINGS)
    assert set_aside(str(place)) == tmp_path / "store.3"
    assert unfinished.files.names() == {}


def test_a_new_run_elsewhere_needs_a_new_address(tmp_path: Path) -> None:
    place = place_of("memory", tmp_path)
    made(place)
    with pytest.raises(InputError, match=r"a store is there; expected a local folder.*give another address"):
        set_aside(place)
    assert len(list(read_store(place))) == 20


class _FullAfter(NoiseGenerator):
    """Has the disk full from its third call on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.patch = patch

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if len(self.calls) == 2:

            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            self.patch.setattr("os.fsync", full)
        return super().generate(prompts, seeds)


def test_a_run_stops_at_a_full_disk_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Mi2rageError, match=r"shard-00001\.parquet: No space left on device.*same command again"):
        synthesize(PAIRS, tmp_path / "store", _FullAfter(monkeypatch), MeanCaptioner(), CONFIG)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["settings.json", shard_name(0)]
    assert made(tmp_path / "store") == [4, 4, 2, 2]
    made(tmp_path / "reference")
    assert read_manifest(tmp_path / "store") == read_manifest(tmp_path / "reference")


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Candidate]]:
    """A finished store of two shards, and what is in it."""
    folder, rows = tmp_path_factory.mktemp("readable") / "store", pictured(6)
    rows[0] = dataclasses.replace(rows[0], added_nats=0.5, caption="a man, laughing")
    writer = StoreWriter(folder, SETTINGS)
    writer.write(0, rows[:8])
    writer.write(1, rows[8:])
    writer.finish(2)
    return folder, rows


def test_datasets_reads_it_and_decodes_its_images(
    readable: tuple[Path, list[Candidate]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder, rows = readable
    for streaming in (False, True):
        found = list(
            datasets.load_dataset(
                "parquet",
                data_files=str(folder / "shard-*.parquet"),
                split="train",
                cache_dir=str(tmp_path / "cache"),
                streaming=streaming,
            )
        )
        assert [row["id"] for row in found] == [row.sample.id for row in rows]
        assert found[0]["tokens"] == list(rows[0].sample.tokens)
        assert (found[0]["caption"], found[0]["added_nats"]) == ("a man, laughing", 0.5)
        for row, expected in zip(found, rows, strict=True):
            np.testing.assert_array_equal(np.asarray(row["image"]), decode_image(expected.image))


def test_pandas_reads_it(readable: tuple[Path, list[Candidate]]) -> None:
    pandas = pytest.importorskip("pandas")
    folder, rows = readable
    frame = pandas.concat([pandas.read_parquet(path) for path in sorted(folder.glob("shard-*.parquet"))])
    assert frame["id"].tolist() == [row.sample.id for row in rows]
    assert frame["label"].value_counts().to_dict() == {"None": 4, "/per/per/peer": 4, "/per/org/member_of": 4}
    np.testing.assert_array_equal(
        decode_image(frame["image"].iloc[3]["bytes"], "image"), decode_image(rows[3].image, "image")
    )


def test_duckdb_queries_it(readable: tuple[Path, list[Candidate]]) -> None:
    duckdb = pytest.importorskip("duckdb")
    folder, rows = readable
    query = (
        "SELECT label, count(*), sum(octet_length(image.bytes)), max(added_nats), any_value(tokens[1]) "
        f"FROM '{folder}/shard-*.parquet' WHERE link = 1 GROUP BY label ORDER BY label"
    )
    with duckdb.connect() as database:
        found = database.sql(query).fetchall()
    size = {
        label: sum(len(row.image) for row in rows if row.sample.label == label and row.provenance.link == 1)
        for label in ("/per/org/member_of", "/per/per/peer", "None")
    }
    assert found == [(label, 2, size[label], 0.5 if label == "None" else None, "Ana") for label in size]


def test_is_quiet_about_shards_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    StoreWriter(tmp_path, SETTINGS).missing(3)
    assert caplog.text == ""


def test_a_shard_that_another_process_makes_again_with_other_bytes_is_taken(tmp_path: Path) -> None:
    rows = pictured(4)
    writer = StoreWriter(tmp_path, SETTINGS)
    writer.write(0, rows[:4])
    writer.write(1, rows[4:])
    writer.finish(2)
    flip(tmp_path, shard_name(0))
    (tmp_path / shard_name(1)).unlink()
    driver, worker = StoreWriter(tmp_path, SETTINGS), StoreWriter(tmp_path, SETTINGS)
    assert driver.missing(2) == [0, 1]
    worker.write(0, rows[2:4])  # as an encoder of another version would, say
    worker.write(1, rows[:2])
    assert driver.finish(2).rows == 4
    assert list(read_store(tmp_path)) == [*rows[2:4], *rows[:2]]


def test_differences_are_named_setting_by_setting(tmp_path: Path) -> None:
    old = {"step": "test", "chain": {"links": 3, "seed": 0}, "models": {}, "names": ["a"]}
    StoreWriter(tmp_path, old)
    StoreWriter(tmp_path, {**old, "added_later": None})
    new = {**old, "chain": {"links": 2, "seed": 0, "width": 2}, "names": ["a", "b"]}
    with pytest.raises(
        InputError,
        match=r"\(chain\.links: was 3, is 2; chain\.width: was None, is 2; names: was \['a'\], is \['a', 'b'\]\)",
    ):
        StoreWriter(tmp_path, new)
    many = {**old, "source": {f"shard-{i}": i for i in range(5000)}}
    with pytest.raises(InputError, match=r"source\.shard-0: was None, is 0; .*; and 4,992 more\)"):
        StoreWriter(tmp_path, many)
