from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mi2rage_engines import plan_cache
from mi2rage_engines.errors import InputError
from mi2rage_engines.plan_cache import Content, PlanCache, bytes_from_text, default_cache_folder, write_content

KEYS = [letter * 64 for letter in "abcd"]


class Builder:
    """Counts its builds."""

    def __init__(self, content: bytes = b"plan") -> None:
        self.content = content
        self.count = 0

    def __call__(self) -> dict[str, bytes | memoryview]:
        self.count += 1
        return {"plan": memoryview(self.content), "log": b"log"}


def never() -> dict[str, bytes | memoryview]:
    raise AssertionError("built again")


def in_memory(files: Mapping[str, Content]) -> dict[str, bytes]:
    return {
        name: content.read_bytes() if isinstance(content, Path) else bytes(content) for name, content in files.items()
    }


def put(cache: PlanCache, key: str, content: bytes = b"plan", age_seconds: float = 0) -> None:
    with cache.fetch(key, Builder(content)):
        pass
    stamp = time.time() - age_seconds
    os.utime(cache.folder / "entries" / key / "files.json", (stamp, stamp))


def entries(cache: PlanCache) -> list[str]:
    return sorted(path.name[0] + path.name[64:] for path in (cache.folder / "entries").iterdir())


def test_built_once_and_found_again(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache", 10**6)
    with cache.fetch(KEYS[0], Builder()) as fetched:
        assert not fetched.was_cached and in_memory(fetched.files) == {"plan": b"plan", "log": b"log"}
    with cache.fetch(KEYS[0], never) as fetched:
        assert fetched.was_cached and in_memory(fetched.files) == {"plan": b"plan", "log": b"log"}
        write_content(fetched.files["plan"], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"plan" and cache.size_bytes() > 7


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, 10**6)

    def fail() -> dict[str, bytes | memoryview]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.fetch(KEYS[0], fail):
        pass
    assert not (tmp_path / "entries").exists()
    put(cache, KEYS[0])
    assert entries(cache) == ["a"]


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "extra", "no index", "bad index"])
def test_damaged_entries_are_found_and_built_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache, builder = PlanCache(tmp_path, 10**6), Builder()
    put(cache, KEYS[0])
    entry = tmp_path / "entries" / KEYS[0]
    match damage:
        case "changed":
            (entry / "plan").write_bytes(b"plaN")
        case "cut":
            (entry / "plan").write_bytes(b"pl")
        case "missing":
            (entry / "log").unlink()
        case "extra":
            (entry / "more").touch()
        case "no index":
            (entry / "files.json").unlink()
        case _:
            (entry / "files.json").write_text("{")
    with caplog.at_level(logging.WARNING), cache.fetch(KEYS[0], builder) as fetched:
        assert not fetched.was_cached
    assert builder.count == 1 and "damaged cache entry" in caplog.text
    with cache.fetch(KEYS[0], never) as fetched:
        assert in_memory(fetched.files)["plan"] == b"plan"


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, 3500)
    for age, key in zip((300, 200, 100), KEYS, strict=False):
        put(cache, key, b"x" * 1000, age)
    with cache.fetch(KEYS[0], never):
        pass
    put(cache, KEYS[3], b"x" * 1000)
    assert entries(cache) == ["a", "c", "d"]
    assert cache.size_bytes() <= cache.limit_bytes


def test_what_was_just_written_or_is_in_use_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(tmp_path, 100)
    put(cache, KEYS[0], b"x" * 1000)
    assert entries(cache) == ["a"] and "more than its limit of 100" in caplog.text
    with cache.fetch(KEYS[0], never) as fetched:
        put(cache, KEYS[1], b"x" * 1000)
        assert entries(cache) == ["a", "b"] and in_memory(fetched.files)["plan"] == b"x" * 1000
    put(cache, KEYS[2], b"x" * 1000)
    assert entries(cache) == ["c"]


def test_a_lower_limit_holds_from_the_next_hit_on(tmp_path: Path) -> None:
    for age, key in zip((100, 300, 200), KEYS, strict=False):
        put(PlanCache(tmp_path, 10_000), key, b"x" * 1000, age)
    with PlanCache(tmp_path, 2500).fetch(KEYS[1], never) as fetched:
        assert in_memory(fetched.files)["plan"] == b"x" * 1000
        assert entries(PlanCache(tmp_path, 2500)) == ["a", "b"]


def test_drafts_of_killed_builders_go(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, 10**6)
    for key in KEYS[:2]:
        (tmp_path / "entries" / f"{key}.draft").mkdir(parents=True)
        (tmp_path / "entries" / f"{key}.draft" / "plan").write_bytes(b"half")
    put(cache, KEYS[0])
    assert entries(cache) == ["a"]


def test_a_full_disk_costs_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    cache, builder = PlanCache(tmp_path, 10**6), Builder()
    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "write_content", full)
        with cache.fetch(KEYS[0], builder) as fetched:
            assert in_memory(fetched.files)["plan"] == b"plan"
    assert "cannot be used (No space left on device)" in caplog.text
    assert builder.count == 1 and entries(cache) == []


def test_a_folder_that_cannot_be_made_costs_no_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with PlanCache(tmp_path / "file" / "cache", 10**6).fetch(KEYS[0], Builder()) as fetched:
        assert in_memory(fetched.files)["plan"] == b"plan"
    assert "going on without it; see --cache" in caplog.text


def test_a_read_only_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    cache, builder = PlanCache(tmp_path, 10**6), Builder()
    put(cache, KEYS[0])
    # The tests may run as root, whom permissions do not hold: the calls that would write are refused instead.
    for owner, name in ((Path, "mkdir"), (os, "utime")):
        monkeypatch.setattr(owner, name, read_only)
    with cache.fetch(KEYS[0], never) as fetched:
        assert fetched.was_cached and in_memory(fetched.files)["plan"] == b"plan"
    assert caplog.text == ""
    with cache.fetch(KEYS[1], builder) as fetched:
        assert not fetched.was_cached
    assert builder.count == 1 and "Read-only file system" in caplog.text


RACER = """
import sys, time
from pathlib import Path
from mi2rage_engines.plan_cache import PlanCache
folder, name = Path(sys.argv[1]), sys.argv[2]

def build():
    (folder / f"building-{name}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return {"plan": name.encode()}

with PlanCache(folder / "cache", 10**6).fetch("a" * 64, build) as fetched:
    content = fetched.files["plan"]
    print(content.read_bytes().decode() if isinstance(content, Path) else content.decode(), fetched.was_cached)
"""


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RACER, str(folder), name], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_of_two_builders_the_second_takes_the_first_ones_result(tmp_path: Path) -> None:
    first = start(tmp_path, "first")
    wait_for(tmp_path / "building-first")
    second = start(tmp_path, "second")
    time.sleep(0.5)
    assert second.poll() is None
    (tmp_path / "go").touch()
    assert first.communicate(timeout=30)[0] == "first False\n"
    assert second.communicate(timeout=30)[0] == "first True\n"
    assert not (tmp_path / "building-second").exists()


def test_a_killed_builder_keeps_nobody_waiting(tmp_path: Path) -> None:
    first = start(tmp_path, "first")
    wait_for(tmp_path / "building-first")
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    assert start(tmp_path, "second").communicate(timeout=30)[0] == "second False\n"


def test_sizes_and_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bytes_from_text(text) for text in ("20GB", "1.5 kb", "7", "2M")] == [20 * 10**9, 1500, 7, 2 * 10**6]
    for text in ("", "GB", "-1GB", "0", "0.5", "20 XB", "1000001TB", "9" * 400 + "GB"):
        with pytest.raises(InputError, match=r"expected 1B to 1000000TB, e\.g\. 20GB or 500MB"):
            bytes_from_text(text)
    monkeypatch.setenv("MI2RAGE_CACHE", "/somewhere")
    assert default_cache_folder() == Path("/somewhere")
    monkeypatch.delenv("MI2RAGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_folder() == Path("/xdg/mi2rage-rt/plans")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache/mi2rage-rt/plans"
