"""The places of the chains: what each place's next child is made from, and which places make no more.

Without a judge a child is made from the child before. With one, the places of a real sample draw among its children
with weights exp(sharpness * added information), and a fresh start from the real sample with weight 1, which is what a
fresh child's weight is in expectation: E[q(y | both) / q(y | real)] = 1 over p(made | real).

With `ChainConfig.least_added_nats` selection runs along: a child that adds less has no children, and its place makes no
more. What is made is kept with its score; what a later selection would drop for its parent's sake is never made.
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

__all__ = ["Child", "Place", "that_go_on"]


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
    if judge is None or not alive:
        for place, child in zip(places, children, strict=True):
            if child is None:
                place.start_again()
            else:
                place.follow(child.candidate)
        return list(places)
    scores = judge.added_nats([child.finished() for child in alive])
    added = {child.candidate.sample.id: float(score) for child, score in zip(alive, scores, strict=True)}
    if config.least_added_nats is not None:
        for child in alive:  # the score says in the store why a chain ended
            child.candidate = dataclasses.replace(child.candidate, added_nats=added[child.candidate.sample.id])
    bad = {
        name for name, nats in added.items() if config.least_added_nats is not None and nats < config.least_added_nats
    }
    going = [
        place
        for place, child in zip(places, children, strict=True)
        if child is None or child.candidate.sample.id not in bad
    ]
    _draw_sources(
        going, [child.candidate for child in alive if child.candidate.sample.id not in bad], added, link, config
    )
    return going


def _draw_sources(
    places: Sequence[Place], good: Sequence[Candidate], added: dict[str, float], link: int, config: ChainConfig
) -> None:
    siblings: dict[str, list[Candidate]] = {}
    for candidate in good:
        siblings.setdefault(candidate.provenance.parent, []).append(candidate)
    for place in places:
        mine = siblings.get(place.sample.id, [])
        weights = np.exp(config.sharpness * np.array([*(added[candidate.sample.id] for candidate in mine), 0.0]))
        key = seed_from(config.seed, place.sample.id, link, place.child, "source")
        chosen = int(rng(key).choice(len(weights), p=weights / weights.sum()))
        if chosen == len(mine):
            place.start_again()
        else:
            place.follow(mine[chosen])
