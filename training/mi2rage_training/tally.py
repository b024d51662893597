"""Counts of what a run has made so far: rows, what the judge keeps of them by label, and what was given up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from mi2rage_training.chain_config import ChainConfig
from mi2rage_training.chain_places import adds_too_little
from mi2rage_training.store import Candidate

__all__ = ["Tally"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """Counts over some real samples; tallies are added up with `+`.

    Attributes:
        samples: real samples that all was made of.
        rows: candidates.
        kept: of them, those that add enough by the judge inside the chain; all where there is none.
        dropped: children given up, as duplicates (`ChainConfig.drop_duplicates`) or as texts of no use, with all that
            would have come of them.
        not_made: children spared by the judge.
        by_label: of each label, how many are kept and how many there are.
    """

    samples: int = 0
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    not_made: int = 0
    by_label: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, candidates: Sequence[Candidate], samples: int, config: ChainConfig) -> Tally:
        """Of all candidates of so many real samples."""
        seen = ((str(row.sample.label), row.provenance.link, row.added_nats) for row in candidates)
        return cls.of_scores(seen, samples, config)

    @classmethod
    def of_scores(cls, scores: Iterable[tuple[str, int, float | None]], samples: int, config: ChainConfig) -> Tally:
        """The same, of each candidate's label, link and added nats."""
        kept, rows, not_made = Counter[str](), Counter[str](), 0
        for label, link, added_nats in scores:
            rows[label] += 1
            if adds_too_little(added_nats, config):
                not_made += config.links - link
            else:
                kept[label] += 1
        there = rows.total()
        dropped = samples * config.width * config.links - there - not_made
        labels = {label: (kept[label], count) for label, count in sorted(rows.items())}
        return cls(samples, there, kept.total(), dropped, not_made, labels)

    def __add__(self, other: Tally) -> Tally:
        labels = {
            label: (
                self.by_label.get(label, (0, 0))[0] + other.by_label.get(label, (0, 0))[0],
                self.by_label.get(label, (0, 0))[1] + other.by_label.get(label, (0, 0))[1],
            )
            for label in sorted(self.by_label.keys() | other.by_label.keys())
        }
        return Tally(
            self.samples + other.samples,
            self.rows + other.rows,
            self.kept + other.kept,
            self.dropped + other.dropped,
            self.not_made + other.not_made,
            labels,
        )

    def described(self, *, judged: bool) -> str:
        """A short line for the progress bar; with the labels of which least is kept where a judge runs along."""
        parts = []
        if judged and self.rows:
            parts.append(f"kept {self.kept / self.rows:.0%}")
            if len(self.by_label) > 1:
                least = sorted(self.by_label.items(), key=lambda item: item[1][0] / item[1][1])[:3]
                parts.append(f"({', '.join(f'{_short(label)} {kept / count:.0%}' for label, (kept, count) in least)})")
        if self.dropped:
            parts.append(f"{self.dropped} given up")
        return " ".join(parts)


def _short(label: str) -> str:
    return label.rsplit("/", 1)[-1]
