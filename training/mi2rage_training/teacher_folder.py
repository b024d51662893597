"""The teachers of a selection in a folder, so that they can judge children inside a later chain."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mi2rage_engines.errors import InputError, ModelFolderError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.files import atomic_folder
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.fit import View
from mi2rage_training.teacher import Teachers

__all__ = ["is_teachers", "keep_teachers", "load_teachers", "save_teachers"]

_CONFIG_NAME = "teachers.json"
_WANTED = "expected a folder written by 'mi2rage-rt select --teachers FOLDER'"


class _Described(BaseModel):
    """`teachers.json`; the classifiers lie in `fold-<f>/member-<m>/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    single: View
    fold_seed: int
    temperatures: tuple[tuple[float, float], ...]
    members: int


def save_teachers(teachers: Teachers, folder: Path, *, force: bool = False) -> None:
    """Write the teachers of every fold; the folder appears whole or not at all.

    Raises:
        InputError: `folder` exists and `force` is off.
    """
    described = _Described(
        name=teachers.name,
        single=teachers.single,
        fold_seed=teachers.fold_seed,
        temperatures=teachers.temperatures,
        members=len(teachers.members[0]),
    )
    with atomic_folder(folder, force=force) as draft:
        for fold, members in enumerate(teachers.members):
            for number, member in enumerate(members):
                place = draft / f"fold-{fold}" / f"member-{number}"
                place.mkdir(parents=True)
                member.save(place)
        (draft / _CONFIG_NAME).write_text(described.model_dump_json(indent=2) + "\n", encoding="utf-8")


def is_teachers(folder: Path) -> bool:
    """Whether a folder is one that `save_teachers` wrote."""
    return (folder / _CONFIG_NAME).is_file()


def keep_teachers(teachers: Teachers, folder: Path) -> None:
    """Save the teachers, unless the folder has the same ones already, from an earlier call that was stopped.

    Raises:
        InputError: it is there and has others.
        ModelFolderError: it is damaged.
    """
    if not is_teachers(folder):
        save_teachers(teachers, folder)
    elif (name := _described(folder).name) != teachers.name:
        raise InputError(
            f"{folder}: holds other teachers ({name}, these are {teachers.name}); expected a new folder, or these; "
            "give another --teachers"
        )


def _described(folder: Path) -> _Described:
    path = folder / _CONFIG_NAME
    try:
        return _Described.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error.reason
        raise ModelFolderError(f"{path}: is damaged ({reason}); {_WANTED}; make the selection again") from error


def load_teachers(folder: Path, device: str = "cpu") -> Teachers:
    """Read what `save_teachers` wrote.

    Raises:
        ModelFolderError: the folder or a part of it is missing or damaged.
    """
    if not is_teachers(folder):
        raise ModelFolderError(f"{folder}: has no {_CONFIG_NAME}; {_WANTED}; check the path")
    described = _described(folder)
    members = tuple(
        tuple(load_classifier(folder / f"fold-{fold}" / f"member-{number}") for number in range(described.members))
        for fold in range(len(described.temperatures))
    )
    return Teachers(described.name, members, described.temperatures, described.single, described.fold_seed, device)
