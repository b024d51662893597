"""The micro-world: small pictures and tweets that only together tell how two entities are related."""

from __future__ import annotations

from pathlib import Path

from mi2rage_training.microworld.gallery import write_gallery
from mi2rage_training.microworld.relations import CUES, LABELS
from mi2rage_training.microworld.scenes import IMAGE_PX, Scene, render
from mi2rage_training.microworld.sentences import attributes_in
from mi2rage_training.microworld.world import Corpus, Facts, WorldSummary, build_world, corpus, read_facts

__all__ = [
    "CUES",
    "IMAGE_PX",
    "LABELS",
    "Corpus",
    "Facts",
    "Scene",
    "WorldSummary",
    "attributes_in",
    "build_world",
    "corpus",
    "models_folder",
    "read_facts",
    "render",
    "write_gallery",
]


def models_folder() -> Path:
    """The folder of embedded models that the package carries: generator, captioner, image and text encoder."""
    from importlib import resources

    return Path(str(resources.files("mi2rage_training"))) / "models"
