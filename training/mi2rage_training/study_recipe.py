"""The recipe of a study: what it compares, on which data, with which models; a TOML file."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mi2rage_engines.errors import InputError
from mi2rage_engines.validation import first_problem
from mi2rage_training.chain_config import ChainConfig, Decoding, Given
from mi2rage_training.fit import FitConfig, MixedPrecision
from mi2rage_training.teacher import TeacherConfig

__all__ = ["ChainRecipe", "Recipe", "read_recipe", "recipe_names"]

_FOLDER = Path(__file__).parent / "recipes"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldRecipe(_Part):
    """Rows of each split of a micro-world, drawn anew for every seed."""

    train: int
    validation: int
    test: int


class DataRecipe(_Part):
    """A micro-world, or three files and the folder of their images, relative to `--data`."""

    world: WorldRecipe | None = None
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    images: Path | None = None
    limit: int | None = Field(default=None, ge=1, description="only the first so many rows of each file")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        named = sum(file is not None for file in (self.train, self.validation, self.test))
        if named != (3 if self.world is None else 0):
            raise ValueError("expected either a world, or the files train, validation and test")
        return self


class ModelsRecipe(_Part):
    """`embedded`, folders or hub ids; sampling settings None take the generator's own."""

    generator: str = "embedded"
    captioner: str = "embedded"
    text_encoder: str = "embedded"
    image_encoder: str = "embedded"
    steps: int | None = None
    guidance: float | None = None


class ChainRecipe(_Part):
    """Of the chains in one setting; see `ChainConfig`. `links * width` children is what every control gets too."""

    links: int = 2
    width: int = 2
    first_prompt: str = "{sentence}"
    next_prompt: str = "{caption}"
    prefixes: tuple[str, ...] = ()
    label_words: dict[str, str] = {}
    decoding: Decoding = Decoding.NUCLEUS
    attempts: int = 3
    drop_duplicates: bool = False
    sharpness: float = 1.0
    shard_size: int = 32

    def config(self, given: Given, seed: int, *, links: int, width: int) -> ChainConfig:
        """The chain's settings for one seed."""
        fields = self.model_dump() | {"links": links, "width": width}
        return ChainConfig(given=given, seed=seed, **fields)


class FitRecipe(_Part):
    """Of a classifier's fitting; see `FitConfig`. `steps` is the same for every row of the table."""

    steps: int = 600
    evaluation_steps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    dropout: float = 0.3
    width: int = 64
    heads: int = 4
    max_length: int = 64
    class_balance: float = 0.0
    image_dropout: float = 0.0
    text_dropout: float = 0.0
    train_image_encoder: bool = False
    mixed_precision: MixedPrecision = MixedPrecision.NO

    def config(self, models: ModelsRecipe, seed: int) -> FitConfig:
        """The settings for one seed."""
        return FitConfig(
            text_encoder=models.text_encoder, image_encoder=models.image_encoder, seed=seed, **self.model_dump()
        )


class TeacherRecipe(FitRecipe):
    """Of the teachers; see `TeacherConfig`."""

    folds: int = 3
    members: int = 1
    rounds: int = 1
    sharpness: float = 1.0
    hidden: float = 0.3

    def teacher(self, models: ModelsRecipe, seed: int, device: str, rounds: int | None = None) -> TeacherConfig:
        """The teachers of one seed, for `rounds` rounds of expectation maximisation in place of the recipe's."""
        own = {name: getattr(self, name) for name in ("folds", "members", "sharpness", "hidden")}
        plain = FitRecipe(**{name: getattr(self, name) for name in FitRecipe.model_fields})
        return TeacherConfig(fit=plain.config(models, seed), device=device, rounds=rounds or self.rounds, **own)


class MethodRecipe(_Part):
    """How MI2RAGE makes its training set out of the judged chain's candidates.

    Attributes:
        per_parent: candidates kept of a real sample at most.
        weighted: keep all, each weighted by q(y | both) among its siblings, in place of dropping some.
        sharpness: power of q(y | both) in the weights.
        distill: share of the teachers' soft labels in the student's loss.
    """

    per_parent: int = Field(default=2, ge=1)
    weighted: bool = True
    sharpness: float = 1.0
    distill: float = Field(default=0.0, ge=0, le=1)


class Recipe(_Part):
    """A whole study.

    Attributes:
        students: of each row, alike but for their seeds; the mean of their probabilities answers. More than one takes
            the noise of a single student out of every row.
    """

    name: str
    title: str
    given: tuple[Given, ...] = Field(default=(Given.TEXT, Given.IMAGE), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    data: DataRecipe
    models: ModelsRecipe = ModelsRecipe()
    chain: dict[Given, ChainRecipe] = {}
    teacher: TeacherRecipe = TeacherRecipe()
    student: FitRecipe = FitRecipe()
    students: int = Field(default=1, ge=1)
    method: MethodRecipe = MethodRecipe()
    cells: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.given)) < len(self.given):
            raise ValueError("seeds and given: expected each of them once")
        return self

    def chain_of(self, given: Given) -> ChainRecipe:
        """The chain's recipe in one setting."""
        return self.chain.get(given, ChainRecipe())


def recipe_names() -> list[str]:
    """The recipes that the package carries."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_recipe(name: str, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe of the package by its name, or a TOML file.

    Args:
        changes: `key.key=value` each, the value as TOML has it, or else a plain string.

    Raises:
        InputError: no such recipe, or it is not one; the fault is named.
    """
    path = _FOLDER / f"{name}.toml" if name in recipe_names() else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"recipe {name!r}: no such recipe; expected one of {', '.join(recipe_names())}, or a TOML file; check it"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error}); expected a TOML file; correct it") from error
    for change in changes:
        content = _changed(content, change)
    try:
        return Recipe.model_validate({"name": path.stem} | content)
    except ValidationError as error:
        raise InputError(f"recipe {path}: {first_problem(error)}; correct the recipe") from error


def _changed(content: dict[str, Any], change: str) -> dict[str, Any]:
    key, sign, text = change.partition("=")
    if not sign or not key:
        raise InputError(f"change {change!r}: expected KEY=VALUE, e.g. models.generator=stabilityai/sd-turbo")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    result = copy.deepcopy(content)
    place = result
    *parents, last = key.split(".")
    for part in parents:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError(f"change {change!r}: {part!r} holds a value, no table; expected the key of a recipe")
    place[last] = value
    return result
