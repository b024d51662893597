"""Rows that stand twice: within a split, with another label, and in two splits."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

from mi2rage_training.data_check.findings import Finding, Severity, places
from mi2rage_training.data_check.rows import Row, normal_tokens

__all__ = ["duplicate_findings", "shared_findings"]


def _exact(row: Row) -> Hashable:
    return row.tokens, row.head, row.tail


def _normal(row: Row) -> Hashable:
    words = normal_tokens(row.tokens)
    return (words, row.mention(row.head).lower(), row.mention(row.tail).lower()) if words else None


def _groups(rows: Sequence[Row], key: Callable[[Row], Hashable | None]) -> list[list[Row]]:
    """Rows of equal key, where there are two or more; a row whose key is None has no equal."""
    found: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        value = key(row)
        if value is not None:
            found[value].append(row)
    return [group for group in found.values() if len(group) > 1]


def _together(groups: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    return places(" = ".join(f"{row.place} ({row.label})" for row in group[:3]) for group in groups)


def _is_contradiction(group: Sequence[Row]) -> bool:
    """Two labels where nothing tells the rows apart: the same image, or none."""
    labels: dict[str | None, set[str | None]] = defaultdict(set)
    for row in group:
        labels[row.image].add(row.label)
    return any(len(seen) > 1 for seen in labels.values())


def _labels(group: Sequence[Row]) -> set[str | None]:
    return {row.label for row in group}


def duplicate_findings(rows: Sequence[Row]) -> list[Finding]:
    """Equal and nearly equal rows of one split.

    Equal: the same words and spans. Nearly equal: the same mentions in the same words after `normal_tokens`.
    """
    split = rows[0].split
    exact = _groups(rows, _exact)
    near = [group for group in _groups(rows, _normal) if len({_exact(row) for row in group}) > 1]
    contradictions = [group for group in exact if _is_contradiction(group)]
    divided = [group for group in exact if len(_labels(group)) > 1 and not _is_contradiction(group)]
    same = [group for group in exact if len(_labels(group)) == 1]
    near_same = [group for group in near if len(_labels(group)) == 1]
    near_divided = [group for group in near if len(_labels(group)) > 1]
    kinds = (
        (contradictions, Severity.ERROR, "contradiction", "the same words and spans carry different labels",
         "decide on one label; no model can satisfy both"),
        (divided, Severity.WARNING, "divided_by_image", "the same words and spans carry different labels, by image",
         "look whether the images decide it; a text model cannot satisfy both"),
        (near_divided, Severity.WARNING, "near_contradiction", "nearly the same rows carry different labels",
         "look at them; most are slips of annotation"),
        (same, Severity.NOTE, "duplicate", "rows stand twice with the same label",
         "they weigh double in training and in scores; keep one of each"),
        (near_same, Severity.NOTE, "near_duplicate", "rows differ only in case, urls or a retweet's prefix",
         "keep them in one split and one fold"),
    )  # fmt: skip
    return [
        Finding(severity, kind, f"{split}: {what}", _amount(groups), advice, _together(groups))
        for groups, severity, kind, what, advice in kinds
        if groups
    ]


def _amount(groups: Sequence[Sequence[Row]]) -> str:
    return f"{sum(len(group) for group in groups)} rows in {len(groups)} groups"


def shared_findings(
    splits: Mapping[str, Sequence[Row]], image_hashes: Mapping[str, str] | None = None
) -> list[Finding]:
    """What stands in two splits: ids, rows, sentences, images by name and by content.

    Args:
        splits: the rows by split.
        image_hashes: content hash by image name, where there are files.
    """
    hashes = image_hashes or {}
    kinds: tuple[tuple[Callable[[Row], Hashable | None], Severity, str, str, str], ...] = (
        (_exact, Severity.LEAK, "text", "shared_row", "rows (same words and spans)"),
        (lambda row: row.tokens, Severity.LEAK, "text", "shared_text", "sentences, with other spans"),
        (lambda row: normal_tokens(row.tokens) or None, Severity.WARNING, "text", "near_shared_text",
         "sentences up to case, urls and a retweet's prefix"),
        (lambda row: row.image, Severity.LEAK, "image", "shared_image", "images of one name"),
        (lambda row: hashes.get(row.image or ""), Severity.LEAK, "image", "shared_image_content",
         "images of the same bytes under other names"),
        (lambda row: row.id, Severity.ERROR, "id", "shared_id", "ids"),
    )  # fmt: skip
    findings = []
    for (first, rows), (second, others) in itertools.combinations(splits.items(), 2):
        told: dict[str, set[int]] = defaultdict(set)  # a row is told once for its text, once for its image
        for key, severity, part, kind, what in kinds:
            pairs = [pair for pair in _shared(rows, others, key) if pair[1].line not in told[part]]
            if pairs:
                told[part] |= {other.line for _, other in pairs}
                findings.append(_shared_finding(first, second, len(others), pairs, (severity, kind, what)))
    return findings


def _shared(rows: Sequence[Row], others: Sequence[Row], key: Callable[[Row], Hashable | None]) -> list[tuple[Row, Row]]:
    """Each of `others` with the first of `rows` that has its key."""
    seen: dict[Hashable, Row] = {}
    for row in rows:
        seen.setdefault(key(row), row)
    seen.pop(None, None)
    return [(seen[value], other) for other in others if (value := key(other)) in seen]


def _shared_finding(
    first: str, second: str, size: int, pairs: Sequence[tuple[Row, Row]], about: tuple[Severity, str, str]
) -> Finding:
    severity, kind, what = about
    return Finding(
        severity,
        kind,
        f"{first} and {second} share {what}",
        f"{len(pairs)} rows of {second} ({len(pairs) / size:.1%})",
        f"remove these rows from {first}, or scores on {second} measure memory"
        if severity is not Severity.ERROR
        else f"give the rows of {second} ids of their own",
        places(f"{one.place} = {other.place}" for one, other in pairs),
    )
