"""The check as a document for programs and as a page for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import typer

from mi2rage_rt.console import write_table
from mi2rage_training.data_check.counts import SplitCounts
from mi2rage_training.data_check.findings import Finding, Severity
from mi2rage_training.data_check.leaks import LeakScan, Score

__all__ = ["SCHEMA_VERSION", "Report", "document_from", "write_report"]

SCHEMA_VERSION = 1
_SHOWN_SCORES = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """All that a check found.

    Attributes:
        files: the file of each split.
        counts: figures by split.
        labels: rows by label and split, the most frequent label first.
        images: named, found, missing, undecodable; None where no folder was given.
        scan: the search for label leaks.
        findings: the worst first.
    """

    files: dict[str, str]
    counts: dict[str, SplitCounts]
    labels: dict[str, dict[str, int]]
    images: dict[str, int] | None
    scan: LeakScan
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        """No leak and no error."""
        return not any(finding.severity in (Severity.LEAK, Severity.ERROR) for finding in self.findings)


def document_from(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return {"schema_version": SCHEMA_VERSION, "is_sound": report.is_sound, **dataclasses.asdict(report)}


def write_report(report: Report) -> None:
    """Print the report: verdict and findings first, then the figures."""
    _write_findings(report)
    _heading("Splits")
    names = list(report.counts)
    rows = _count_rows(report.counts)
    write_table(["", *names], rows)
    _heading("Labels")
    _write_labels(report.labels, {name: counts.labelled for name, counts in report.counts.items()})
    _heading("Images")
    if report.images is None:
        typer.echo("Files not looked at; pass their folder with --images.")
    else:
        write_table(list(report.images), [[str(count) for count in report.images.values()]])
    _heading("Label leaks")
    _write_scan(report.scan)


def _heading(title: str) -> None:
    typer.echo(f"\n{title}\n{'-' * len(title)}")


def _write_findings(report: Report) -> None:
    amounts = [(level, sum(finding.severity is level for finding in report.findings)) for level in Severity]
    told = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in amounts if count)
    typer.echo(f"{'Sound' if report.is_sound else 'Not sound'}: {told or 'nothing found'}.")
    if report.findings:
        _heading("Findings")
    for finding in report.findings:
        typer.echo(f"{finding.severity.upper():>7}  {finding.what}: {finding.evidence}")
        typer.echo(f"{'':>9}-> {finding.advice}")
        for example in finding.examples:
            typer.echo(f"{'':>9}   {example}")


def _count_rows(counts: Mapping[str, SplitCounts]) -> list[list[str]]:
    every = list(counts.values())

    def share(part: int, count: SplitCounts) -> str:
        return f"{part} ({part / count.rows:.1%})"

    rows = [
        ["rows", *(str(count.rows) for count in every)],
        ["with a label", *(str(count.labelled) for count in every)],
        ["could not be read", *(str(count.bad) for count in every)],
        ["labels", *(str(count.labels) for count in every)],
        ["words, least", *(str(count.tokens_min) for count in every)],
        ["words, median", *(f"{count.tokens_median:g}" for count in every)],
        ["words, mean", *(f"{count.tokens_mean:.1f}" for count in every)],
        ["words, most", *(str(count.tokens_max) for count in every)],
        ["head and tail overlap", *(share(count.overlapping, count) for count in every)],
        ["tail before head", *(share(count.tail_first, count) for count in every)],
        ["name an image", *(share(count.with_image, count) for count in every)],
        ["different images", *(str(count.images) for count in every)],
        ["most rows an image", *(str(count.most_rows_an_image) for count in every)],
    ]
    for field in sorted({field for count in every for field in count.extra_fields}):
        rows.append([f"have '{field}'", *(share(count.extra_fields.get(field, 0), count) for count in every)])
    return rows


def _write_labels(labels: Mapping[str, Mapping[str, int]], totals: Mapping[str, int]) -> None:
    headers = ["label"]
    for name in totals:
        headers += [name, "share"]
    rows = []
    for label, counts in labels.items():
        rows.append([label])
        for name, total in totals.items():
            rows[-1] += [str(counts[name]), f"{counts[name] / total:.1%}" if total else "-"]
    write_table(headers, rows)


def _write_scan(scan: LeakScan) -> None:
    if scan.skipped is not None:
        typer.echo(f"Not looked for: {scan.skipped}.")
        return
    typer.echo(
        f"{scan.rows} labelled rows in {scan.groups} groups that share no image or sentence; {scan.features} features, "
        f"each held out by group.\nThe text alone: F1 {scan.text_f1:.3f}, accuracy {scan.text_accuracy:.3f} "
        f"(majority {scan.majority_accuracy:.3f}), {scan.text_nats:.3f} of {scan.label_entropy_nats:.3f} nats.\n"
        "Each field at the question where it does best next to the text; share: of the answer's uncertainty removed.\n"
    )
    headers = ["field", "from", "feature", "question", "share", "text's", "best F1", "leak"]
    write_table(headers, [_score_row(score) for score in scan.scores[:_SHOWN_SCORES]])
    if len(scan.scores) > _SHOWN_SCORES:
        typer.echo(f"... and {len(scan.scores) - _SHOWN_SCORES} more fields, all lower; --json has them.")


def _score_row(score: Score) -> list[str]:
    return [
        score.field,
        score.role,
        score.feature,
        score.question,
        f"{score.share:.1%}",
        f"{score.text_share:.1%}",
        f"{score.f1:.3f}",
        "LEAK" if score.is_leak else "no",
    ]
