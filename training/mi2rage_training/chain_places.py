"""The places of the chains: what each place's next child is made from, and which places make no more.

Without a judge a child is made from the child before. With one, the places of a real sample draw among its children
with weights exp(sharpness * added information), and a fresh start from the real sample with weight 1, which is what a
fresh child's weight is in expectation: E[q(y | both) / q(y | real)] = 1 over p(made | real).

With `ChainConfig.least_added_nats` selection runs along instead: a child is made from the child before, and one that
adds less has no children. So what is made is what chains without a judge would make, less all that would come of such a
child; those that were judged are kept with their scores, which say why a chain ended. (A caption that repeats one of a
sibling that was never made is not drawn again for it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from mi2rage_rt.noise import rng, seed_from
from mi2rage_rt.samples import Sample
from mi2rage_training.chain_config import ChainConfig
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.store import Candidate

__all__ = ["Child", "Place", "adds_too_little", "that_go_on"]


@dataclasses.dataclass(slots=True)
class Child:
    """A candidate whose images may still be encoded elsewhere.

    Attributes:
        candidate: its `image` (where one was made) and `via` are not in it yet.
        image, via: what is to stand there; None leaves the candidate's own.
    """

    candidate: Candidate
    image: Future[bytes] | None = None
    via: Future[bytes] | None = None

    def finished(self) -> Candidate:
        """The candidate with its images, waited for; raises what encoding them raised."""
        return dataclasses.replace(
            self.candidate,
            image=self.candidate.image if self.image is None else self.image.result(),
            via=self.candidate.via if self.via is None else self.via.result(),
        )


@dataclasses.dataclass(slots=True)
class Place:
    """Where a child is made at each link: a real sample's, one of `width`.

    Attributes:
        source: id of what the next child is made from: a candidate, or the real sample.
        caption: what the next link's image is drawn from; None at the start of a chain.
        chain: the children made here.
    """

    pair: Pair
    child: int
    source: str
    caption: str | None = None
    chain: list[Child] = dataclasses.field(default_factory=list)

    @property
    def sample(self) -> Sample:
        return self.pair.sample

    def start_again(self) -> None:
        """Let the next child be made from the real sample."""
        self.source, self.caption = self.sample.id, None

    def follow(self, candidate: Candidate) -> None:
        """Let the next child be made from `candidate`."""
        self.source, self.caption = candidate.sample.id, candidate.caption


def that_go_on(
    places: Sequence[Place], children: Sequence[Child | None], link: int, config: ChainConfig, judge: Judge | None
) -> list[Place]:
    """The places that make a child at the next link, each told what it is made from.

    Args:
        children: of the places, at `link`; None where one was given up.
    """
    alive = [child for child in children if child is not None]
    for place, child in zip(places, children, strict=True):
        if child is None:
            place.start_again()
        else:
            place.follow(child.candidate)
    if judge is None or not alive:
        return list(places)
    scores = judge.added_nats([child.finished() for child in alive])
    if config.least_added_nats is None:
        added = {child.candidate.sample.id: float(score) for child, score in zip(alive, scores, strict=True)}
        _draw_sources(places, [child.candidate for child in alive], added, link, config)
        return list(places)
    for child, score in zip(alive, scores, strict=True):
        child.candidate = dataclasses.replace(child.candidate, added_nats=float(score))
    return [
        place
        for place, child in zip(places, children, strict=True)
        if child is None or not adds_too_little(child.candidate.added_nats, config)
    ]


def adds_too_little(added_nats: float | None, config: ChainConfig) -> bool:
    """Whether a child of this score, None where it was not judged, ends its chain."""
    return config.least_added_nats is not None and added_nats is not None and added_nats < config.least_added_nats


def _draw_sources(
    places: Sequence[Place], made: Sequence[Candidate], added: dict[str, float], link: int, config: ChainConfig
) -> None:
    siblings: dict[str, list[Candidate]] = {}
    for candidate in made:
        siblings.setdefault(candidate.provenance.parent, []).append(candidate)
    for place in places:
        mine = siblings.get(place.sample.id, [])
        logits = config.sharpness * np.array([*(added[candidate.sample.id] for candidate in mine), 0.0])
        weights = np.exp(logits - logits.max())
        key = seed_from(config.seed, place.sample.id, link, place.child, "source")
        chosen = int(rng(key).choice(len(weights), p=weights / weights.sum()))
        if chosen == len(mine):
            place.start_again()
        else:
            place.follow(mine[chosen])
