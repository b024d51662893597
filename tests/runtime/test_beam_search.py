"""Against a plain search over lists, one image at a time; against transformers in `tests/export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt.beam_search import BeamSearch, BeamSettings, best_continuations
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from tests.runtime.tiny_bundle import WORDS

VOCABULARY, EOS, LIMIT = 7, 2, 5


def log_shares(image: int, ids: Sequence[int]) -> np.ndarray:
    """A language model: log-probabilities of the token behind `ids`, the end the likelier the longer they are."""
    draws = np.random.default_rng([image, *ids, 99]).standard_normal(VOCABULARY)
    draws[EOS] += 0.4 * len(ids)
    return np.asarray(draws - np.log(np.exp(draws).sum()), dtype=np.float32)


def search(images: int, settings: BeamSettings, limit: int = LIMIT) -> list[list[int]]:
    """Drive `BeamSearch` with the model, as a captioner does."""
    found = BeamSearch(images, settings, EOS, limit)
    rows: list[tuple[int, tuple[int, ...]]] = [(image, ()) for image in range(images)]
    while len(found.open):
        found.advance(3 + np.stack([log_shares(image, ids) for image, ids in rows]))
        rows = [
            (rows[origin][0], (*rows[origin][1], token))
            for origin, token in zip(found.origin.tolist(), found.ids.tolist(), strict=True)
        ]
        assert [image for image, _ in rows] == np.repeat(found.open, settings.beams).tolist()
    return found.best()


def plain(image: int, settings: BeamSettings, limit: int = LIMIT) -> list[int]:
    """The same with lists of (score, ids)."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for step in range(1, limit + 1):
        longer = [
            (float(np.float32(score) + shares[token]), (*ids, token))
            for score, ids in beams
            for shares in [log_shares(image, ids)]
            for token in range(VOCABULARY)
        ]
        longer.sort(reverse=True, key=lambda beam: beam[0])
        best = longer[: 2 * settings.beams]
        for score, ids in best[: settings.beams]:
            if ids[-1] == EOS or step == limit:
                ended.append((score / step**settings.length_penalty, ids))
        ended = sorted(ended, reverse=True, key=lambda beam: beam[0])[: settings.beams]
        beams = [beam for beam in best if beam[1][-1] != EOS][: settings.beams]
        length = limit if settings.early_stopping == "never" and settings.length_penalty > 0 else step
        if len(ended) == settings.beams and (
            settings.early_stopping is True or beams[0][0] / length**settings.length_penalty <= ended[-1][0]
        ):
            break
    return [token for token in ended[0][1] if token != EOS]


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_images_together_are_searched_as_alone(beams: int, early_stopping: Any, length_penalty: float) -> None:
    settings = BeamSettings(beams, length_penalty, early_stopping)
    for limit in (1, LIMIT):
        expected = [plain(image, settings, limit) for image in range(12)]
        assert search(12, settings, limit) == expected
    assert len({len(ids) for ids in expected}) > 1


def test_the_best_continuations_are_log_probabilities() -> None:
    logits = np.log(np.array([[0.1, 0.4, 0.4, 0.1]], dtype=np.float32)) + 5
    likely, ids = best_continuations(logits, 3)
    assert ids.tolist() == [[1, 2, 0]]  # of equals the lower id first
    np.testing.assert_allclose(np.exp(likely), [[0.4, 0.4, 0.1]], rtol=1e-6)


def test_a_captioner_searches_in_batches_of_beams(bundle_folder: Path) -> None:
    """In the hand-made bundle the next word is the likeliest by far: beams find what greedy decoding finds."""
    captioner = Bundle.open(bundle_folder, threads=1).captioner()
    images = [np.full((9, 7, 3), 255 * (row % 2), np.uint8) for row in range(5)]
    prefixes = ["", "the", "", "a red", ""]
    expected = captioner.caption(images, prefixes)
    for size in (1, 4, 16):
        assert captioner.caption(images, prefixes, options=CaptionOptions(beams=3, batch_size=size)) == expected
    sampled = captioner.caption(images, prefixes, seeds=range(5))
    assert captioner.caption(images, prefixes, range(5), CaptionOptions(beams=3)) == sampled


def test_unusable_beams(bundle_folder: Path) -> None:
    captioner = Bundle.open(bundle_folder, threads=1).captioner()
    image = np.zeros((5, 8, 3), np.uint8)
    with pytest.raises(InputError, match="beams 0: expected 1"):
        captioner.caption([image], options=CaptionOptions(beams=0))
    with pytest.raises(InputError, match=f"beams 12: the captioner knows {len(WORDS)} tokens"):
        captioner.caption([image], options=CaptionOptions(beams=12))
