"""Where a store may be: a folder, memory, and an S3 server on this machine."""

import errno
import importlib
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import InputError, Mi2rageError, MissingExtraError
from mi2rage_training.store import StorePlace
from mi2rage_training.store_files import LocalFiles, RemoteFiles, files_at, is_address
from tests.training.object_store import BUCKET, s3_server

PLACES = ("folder", "file", "memory", "s3")


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """An S3 server with one bucket, and the environment that leads there."""
    with s3_server():
        yield


def place_of(kind: str, tmp_path: Path) -> StorePlace:
    """A place of each kind, nothing in it."""
    return {
        "folder": tmp_path / "store",
        "file": (tmp_path / "by-address").as_uri(),
        "memory": f"memory://{tmp_path.name}/store",
        "s3": f"s3://{BUCKET}/{tmp_path.name}/store",
    }[kind]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("kind", PLACES)
def test_a_file_is_written_listed_read_and_removed(kind: str, tmp_path: Path) -> None:
    files = files_at(place_of(kind, tmp_path))
    assert files.names() == {}
    with pytest.raises(FileNotFoundError):
        files.read("a.bin")
    files.remove("a.bin")
    content = np.random.default_rng(0).bytes(100_000)
    files.write("a.bin", b"old")
    files.write("a.bin", content)
    files.write("b.bin", b"")
    assert files.names() == {"a.bin": 100_000, "b.bin": 0}
    assert files.read("a.bin") == content
    with files.open("a.bin") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
    files.remove("a.bin")
    assert files.names() == {"b.bin": 0}
    assert files.at("b.bin").endswith("/b.bin")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("kind", PLACES)
def test_what_another_process_wrote_is_seen(kind: str, tmp_path: Path) -> None:
    place = place_of(kind, tmp_path)
    mine, theirs = files_at(place), files_at(place)
    mine.write("a", b"1")
    assert set(mine.names()) == {"a"}
    theirs.write("b", b"2")
    assert set(mine.names()) == {"a", "b"}


def test_subfolders_are_marked(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    assert set(files_at(tmp_path).names()) == {"inner/"}
    files_at("memory://outer").write("x", b"1")
    files_at("memory://outer/inner").write("y", b"1")
    assert files_at("memory://outer").names() == {"x": 1, "inner/": 0}


def test_what_goes_while_it_is_listed_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / ".#lock").symlink_to("nowhere")  # as an editor leaves it
    assert files_at(tmp_path).names() == {"a": 3, ".#lock": 0}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; expected the name of a folder"):
        files_at(tmp_path / "file").names()
    with pytest.raises(FileNotFoundError):
        files_at(tmp_path / "file").read("x")


def test_only_text_with_a_protocol_is_an_address(tmp_path: Path) -> None:
    assert is_address("s3://bucket/run")
    assert not is_address("runs/one")
    assert not is_address(Path("s3://bucket/run"))
    assert isinstance(files_at("runs/one"), LocalFiles)
    assert isinstance(files_at("memory://x"), RemoteFiles)


@pytest.mark.usefixtures("server")
def test_a_bucket_that_is_not_there_is_named() -> None:
    files = files_at("s3://nowhere-at-all/run")
    assert files.names() == {}
    with pytest.raises(InputError, match=r"s3://nowhere-at-all/run/a: cannot be written.*bucket.*make it"):
        files.write("a", b"1")


@pytest.mark.usefixtures("server")
def test_what_s3_refuses_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_at(f"s3://{BUCKET}/refused")

    def fail(error: Exception) -> None:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(files._system, "pipe_file", raising)  # type: ignore[attr-defined]

    fail(PermissionError("Access Denied"))
    with pytest.raises(InputError, match=r"refused: PermissionError: Access Denied; expected credentials.*AWS_PROFILE"):
        files.write("a", b"1")
    fail(importlib.import_module("botocore.exceptions").NoCredentialsError())
    with pytest.raises(InputError, match="NoCredentialsError: Unable to locate credentials; expected credentials"):
        files.write("a", b"1")
    fail(TimeoutError("too slow"))
    with pytest.raises(Mi2rageError, match="too slow; what was finished is kept; check the address") as caught:
        files.write("a", b"1")
    assert caught.value.exit_code == 1


def test_unknown_protocols_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"nonsense://x: Protocol not known: nonsense; expected a folder, or"):
        files_at("nonsense://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # it is loaded already
    with pytest.raises(MissingExtraError, match=r"pip install 'mi2rage-rt\[scale\]'"):
        files_at("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match="fsspec"):
        files_at("memory://x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_nothing_is_left(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_at(tmp_path / "store")
    files.write("kept", b"1")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        Mi2rageError, match=r"shard: .*\(the disk at /.* has [\d,.]+ MB left.* kept; make room"
    ) as caught:
        files.write("shard", b"x" * 100)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert files.names() == {"kept": 1}
    files.write("shard", b"x" * 100)
    assert files.names() == {"kept": 1, "shard": 100}


def test_a_real_limit_stops_as_a_full_disk_does(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mi2rage_engines.errors import Mi2rageError\n"
        "from mi2rage_training.store_files import files_at\nfiles = files_at(sys.argv[1])\n"
        "files.write('small', b'x' * 1000)\n"
        "try: files.write('large', b'x' * 100_000)\nexcept Mi2rageError as error: print(error)\n"
        "print(files.names())"
    )

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "File too large (the disk at /" in done.stdout
    assert done.stdout.splitlines()[-1] == "{'small': 1000}"


def test_other_faults_of_the_disk_stay_what_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        files_at(tmp_path / "file").write("x", b"1")
