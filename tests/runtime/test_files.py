from __future__ import annotations

import os
from pathlib import Path

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt.files import atomic_folder, check_absent


def write_into(path, text, force=False):
    with atomic_folder(path, force=force) as draft:
        (draft / "file").write_text(text)


def names_beside(path):
    return [entry.name for entry in path.parent.iterdir()]


def test_a_folder_appears_whole_and_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "folder"
    write_into(path, "first")
    with pytest.raises(InputError, match="exists and is not empty"):
        write_into(path, "second")
    write_into(path, "third", force=True)
    assert (path / "file").read_text() == "third"
    assert names_beside(path) == ["folder"]


def test_folders_that_cannot_be_replaced_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("mounted"))
    for place in (Path(), Path(".."), Path("mounted")):
        with pytest.raises(InputError, match="is the current folder, one around it, or a mount point"):
            check_absent(place, force=True)
    check_absent(Path("inside"))


def test_of_two_that_write_at_once_the_second_to_end_is_refused(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(InputError, match="exists and is not empty"), atomic_folder(path) as draft:
        (draft / "file").write_text("slow")
        write_into(path, "fast")
    assert (path / "file").read_text() == "fast"
    assert names_beside(path) == ["folder"]


def test_what_fails_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    write_into(path, "old")
    with pytest.raises(OSError, match="disk"), atomic_folder(path, force=True) as draft:
        (draft / "file").write_text("new")
        raise OSError("disk")
    assert (path / "file").read_text() == "old"
    assert names_beside(path) == ["folder"]
