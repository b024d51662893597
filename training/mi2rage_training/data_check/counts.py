"""How many rows, labels, words and spans each split has."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from mi2rage_rt.samples import BadRow
from mi2rage_training.data_check.findings import Finding, Severity, places
from mi2rage_training.data_check.rows import Row

__all__ = [
    "RARE_LABEL_ROWS",
    "SplitCounts",
    "bad_row_findings",
    "count_split",
    "label_findings",
    "label_table",
    "unknown_key_findings",
]

RARE_LABEL_ROWS = 100
"""Below this many rows a label's own scores mean little: twelve of MNRE's 23 labels are so rare."""


@dataclasses.dataclass(frozen=True, slots=True)
class SplitCounts:
    """Figures of one split.

    Attributes:
        rows, labelled, bad: good rows, those of them with a label, and rows that could not be read.
        labels, images, with_image: distinct labels, distinct image names, rows that name one.
        most_rows_an_image: of the image that most rows share.
        tokens_min, tokens_median, tokens_mean, tokens_max: words a row.
        overlapping: rows whose head and tail spans share a word.
        tail_first: rows whose tail starts before the head.
        extra_fields: rows by further field.
    """

    rows: int
    labelled: int
    bad: int
    labels: int
    images: int
    with_image: int
    most_rows_an_image: int
    tokens_min: int
    tokens_median: float
    tokens_mean: float
    tokens_max: int
    overlapping: int
    tail_first: int
    extra_fields: dict[str, int]


def count_split(rows: Sequence[Row], bad: Sequence[BadRow] = ()) -> SplitCounts:
    """The figures of one split, which has at least one row."""
    lengths = [len(row.tokens) for row in rows]
    images = Counter(row.image for row in rows if row.image is not None)
    return SplitCounts(
        rows=len(rows),
        labelled=sum(row.label is not None for row in rows),
        bad=len(bad),
        labels=len({row.label for row in rows} - {None}),
        images=len(images),
        with_image=images.total(),
        most_rows_an_image=max(images.values(), default=0),
        tokens_min=min(lengths),
        tokens_median=float(statistics.median(lengths)),
        tokens_mean=statistics.fmean(lengths),
        tokens_max=max(lengths),
        overlapping=sum(row.head[0] < row.tail[1] and row.tail[0] < row.head[1] for row in rows),
        tail_first=sum(row.tail[0] < row.head[0] for row in rows),
        extra_fields=dict(Counter(name for row in rows for name in row.extras)),
    )


def label_table(splits: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, int]]:
    """Rows of each label by split, the most frequent label first; rows without a label are not in it."""
    counts = {name: Counter(row.label for row in rows if row.label is not None) for name, rows in splits.items()}
    total: Counter[str] = Counter()
    for counter in counts.values():
        total.update(counter)
    return {label: {name: counter[label] for name, counter in counts.items()} for label, _ in total.most_common()}


def label_findings(splits: Mapping[str, Sequence[Row]]) -> list[Finding]:
    """Labels that are rare in training, that one split alone has, and rows without one."""
    table = label_table(splits)
    findings = []
    for name in splits:
        unseen = {label: row[name] for label, row in table.items() if row[name] and not row["train"]}
        if unseen:
            named = ", ".join(f"{label} ({count})" for label, count in unseen.items())
            findings.append(
                Finding(
                    Severity.ERROR,
                    "unseen_labels",
                    f"{name} has labels that train does not have",
                    f"{sum(unseen.values())} rows: {named}",
                    "no model can learn them: 'evaluate' refuses such rows; add training rows or drop the labels",
                    places(row.place for row in splits[name] if row.label in unseen),
                )
            )
    findings += _rare(table, [name for name in splits if name != "train"])
    unlabelled = [row.place for rows in splits.values() for row in rows if row.label is None]
    if unlabelled:
        advice = "training and scoring need a label; MNRE writes pairs without relation as 'None'"
        what, evidence = "rows without a label", f"{len(unlabelled)} rows"
        findings.append(Finding(Severity.WARNING, "unlabelled", what, evidence, advice, places(unlabelled)))
    return findings


def _rare(table: dict[str, dict[str, int]], others: Sequence[str]) -> list[Finding]:
    findings = []
    rare = [f"{label} ({row['train']})" for label, row in table.items() if 0 < row["train"] < RARE_LABEL_ROWS]
    if rare:
        what = f"{len(rare)} of {len(table)} labels have fewer than {RARE_LABEL_ROWS} rows in train"
        advice = "report scores by label beside the micro scores; give these labels their own quota in a selection"
        findings.append(Finding(Severity.NOTE, "rare_labels", what, ", ".join(rare), advice))
    for name in others:
        lone = [f"{label} ({row['train']})" for label, row in table.items() if row["train"] and not row[name]]
        if lone:
            what = f"{name} lacks {len(lone)} of train's labels"
            advice = f"scores on {name} say nothing of them"
            findings.append(Finding(Severity.NOTE, "untested_labels", what, ", ".join(lone), advice))
    return findings


def bad_row_findings(bad: Mapping[str, Sequence[BadRow]]) -> list[Finding]:
    """The rows that `--skip-bad` left out."""
    return [
        Finding(
            Severity.ERROR,
            "bad_rows",
            f"{name} has rows that cannot be read",
            f"{len(rows)} rows, left out of every other figure",
            "correct them; every other command refuses the file, or leaves them out with --skip-bad",
            places(f"{name} line {row.line}: {row.reason}" for row in rows),
        )
        for name, rows in bad.items()
        if rows
    ]


def unknown_key_findings(splits: Mapping[str, Sequence[Row]]) -> list[Finding]:
    """JSONL rows with keys that the other commands refuse."""
    found = [(row, set(row.extras) - {"provenance"}) for rows in splits.values() for row in rows if row.is_json]
    unknown = [(row, keys) for row, keys in found if keys]
    if not unknown:
        return []
    names = Counter(key for _, keys in unknown for key in keys)
    what = "JSONL rows have keys that the format does not have"
    evidence = f"{len(unknown)} rows: " + ", ".join(f"{name} ({count})" for name, count in names.most_common())
    advice = "train, evaluate and synthesize refuse them; remove the keys"
    return [Finding(Severity.ERROR, "unknown_keys", what, evidence, advice, places(row.place for row, _ in unknown))]
