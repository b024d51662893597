"""What the rows of a study are trained on, for one setting and seed: data, stores, scores; each made once and kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from mi2rage_rt.noise import seed_from
from mi2rage_training import microworld
from mi2rage_training.chain import synthesize
from mi2rage_training.chain_config import Given
from mi2rage_training.fit import labels_of
from mi2rage_training.pairs import Pair, load_pairs, mentions_only
from mi2rage_training.pytorch_captioner import CaptionDecoding, TorchCaptioner
from mi2rage_training.pytorch_models import TorchGenerator
from mi2rage_training.store import Candidate, read_manifest, read_store
from mi2rage_training.study_recipe import Recipe
from mi2rage_training.study_scores import read_scores, write_scores
from mi2rage_training.teacher import TeacherScores, fit_teachers
from mi2rage_training.teacher_folder import load_teachers, save_teachers

__all__ = ["Material", "Place"]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where one job of a study works.

    Attributes:
        folder: of the job; what is made stays there.
        data: what the recipe's files are relative to.
        device: of models and fits.
    """

    folder: Path
    data: Path
    device: str


class Material:
    """Data, stores and scores of one setting and seed, made when asked for and read again after a kill.

    Stores: `independent` has `links * width` children made directly from each real sample and told nothing of its
    label, `independent-labelled` the same by the recipe's prompts, `chain` has `width` chains of `links` by the
    recipe's prompts, `judged` the same with the teachers of the chain's first link as judge.
    """

    def __init__(self, recipe: Recipe, given: Given, seed: int, place: Place) -> None:
        self.recipe = recipe
        self.given = given
        self.seed = seed
        self.place = place
        self.chain = recipe.chain_of(given)
        self._held: tuple[str, list[Candidate]] | None = None

    def seed_of(self, what: str) -> int:
        """A seed of 31 bits for one use."""
        return seed_from("study", self.seed, what) % 2**31

    @functools.cached_property
    def real(self) -> dict[str, list[Pair]]:
        """Real pairs of the splits train, validation and test."""
        data = self.recipe.data
        if data.world is None:
            files = {"train": data.train, "validation": data.validation, "test": data.test}
            images = None if data.images is None else self.place.data / data.images
            return {
                split: load_pairs(self.place.data / file, images=images)[: data.limit]
                for split, file in files.items()
                if file is not None
            }
        folder = self.place.folder / "world"
        if not folder.is_dir():
            microworld.build_world(folder, seed=self.seed, **data.world.model_dump())
        return {split: load_pairs(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Every label of the benchmark, `None` first; a small training split may lack some."""
        return labels_of([pair for pairs in self.real.values() for pair in pairs])

    def unimodal(self, pairs: Sequence[Pair]) -> list[Pair]:
        """What the given modality alone shows of real pairs: no image, or of the sentence the two mentions."""
        if self.given is Given.TEXT:
            return [Pair(dataclasses.replace(pair.sample, image=None)) for pair in pairs]
        return [Pair(mentions_only(pair.sample), pair.image) for pair in pairs]

    @functools.cached_property
    def _models(self) -> tuple[TorchGenerator, TorchCaptioner]:
        models = self.recipe.models
        generator = TorchGenerator.from_folder(
            models.generator, device=self.place.device, steps=models.steps, guidance_scale=models.guidance
        )
        decoding = CaptionDecoding(beams=4 if self.chain.decoding == "beam" else 1)
        return generator, TorchCaptioner.from_folder(models.captioner, device=self.place.device, decoding=decoding)

    def store(self, name: str) -> list[Candidate]:
        """The candidates of a store; the last one is held, for all of them need not fit into memory."""
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next is read
            self._held = name, self._stored(name)
        return self._held[1]

    def _stored(self, name: str) -> list[Candidate]:
        folder = self.place.folder / name
        if not (folder / "manifest.json").is_file():
            generator, captioner = self._models
            links, width = self.chain.links, self.chain.width
            sizes = (1, links * width) if name.startswith("independent") else (links, width)
            config = self.chain.config(self.given, self.seed_of("chain"), links=sizes[0], width=sizes[1])
            if self.given is Given.IMAGE and not config.prefixes:
                config = dataclasses.replace(config, prefixes=captioner.text_prefixes)
            if name == "independent":
                config = config.without_labels()
            judge = load_teachers(self._judge(), self.place.device) if name == "judged" else None
            described = self.recipe.models.model_dump(mode="json")
            synthesize(self.unimodal(self.real["train"]), folder, generator, captioner, config, described, judge)
        read_manifest(folder)
        return list(read_store(folder))

    def has_store(self, name: str) -> bool:
        """Whether a store was asked for and made."""
        return (self.place.folder / name / "manifest.json").is_file()

    def rounds_scored(self, name: str) -> list[int]:
        """For which numbers of rounds a store was scored."""
        paths = self.place.folder.glob(f"scores-{name}-*.npz")
        return sorted(int(path.stem.rsplit("-", 1)[1]) for path in paths)

    def _judge(self) -> Path:
        folder = self.place.folder / "judge"
        if not folder.is_dir():
            first = [candidate for candidate in self.store("chain") if candidate.provenance.link == 1]
            config = self.recipe.teacher.teacher(self.recipe.models, self.seed_of("judge"), self.place.device)
            save_teachers(fit_teachers(first, config)[0], folder)
        return folder

    def scores(self, name: str, rounds: int | None = None) -> TeacherScores:
        """The scores of a store's candidates by cross-fitted teachers after some rounds (default the recipe's)."""
        rounds = rounds or self.recipe.teacher.rounds
        path = self.place.folder / f"scores-{name}-{rounds}.npz"
        if not path.is_file():
            config = self.recipe.teacher.teacher(
                self.recipe.models, self.seed_of(f"teacher {name}"), self.place.device, rounds
            )
            write_scores(path, fit_teachers(self.store(name), config)[1])
        return read_scores(path)
