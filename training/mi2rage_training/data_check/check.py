"""The whole check of a data set, from its files to a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mi2rage_training.data_check.counts import (
    bad_row_findings,
    count_split,
    label_findings,
    label_table,
    unknown_key_findings,
)
from mi2rage_training.data_check.duplicates import duplicate_findings, shared_findings
from mi2rage_training.data_check.features import ALL_EXTRAS, Role
from mi2rage_training.data_check.findings import Finding, Severity, by_severity
from mi2rage_training.data_check.giveaways import Giveaway
from mi2rage_training.data_check.image_files import ImageFacts, image_facts, image_findings
from mi2rage_training.data_check.leaks import LeakScan, Score, scan_leaks
from mi2rage_training.data_check.report import Report
from mi2rage_training.data_check.rows import read_rows
from mi2rage_training.data_check.views import RELATION_OR_NONE, WHICH_RELATION

__all__ = ["CheckConfig", "check_data_set", "leak_findings"]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckConfig:
    """What to check.

    Attributes:
        train, validation, test: files of samples, JSONL or MNRE.
        images: the folder of the images; None leaves the files alone.
        skip_bad: count bad rows instead of refusing the file.
        seed: of folds, fits and bootstrap.
    """

    train: Path
    validation: Path | None = None
    test: Path | None = None
    images: Path | None = None
    skip_bad: bool = False
    seed: int = 0


def check_data_set(config: CheckConfig) -> Report:
    """Count, compare and scan a data set.

    Raises:
        DataError: a file or the folder cannot be read, or has a bad row and `skip_bad` is off.
        MissingExtraError: scikit-learn is not installed.
    """
    files = {"train": config.train, "validation": config.validation, "test": config.test}
    paths = {name: path for name, path in files.items() if path is not None}
    read = {name: read_rows(path, name, skip_bad=config.skip_bad) for name, path in paths.items()}
    splits = {name: rows for name, (rows, _) in read.items()}
    bad = {name: bad_rows for name, (_, bad_rows) in read.items()}
    every = [row for rows in splits.values() for row in rows]
    facts = image_facts(every, config.images) if config.images is not None else ImageFacts({}, {}, {})
    scan = scan_leaks(every, facts.files, config.seed)
    findings = leak_findings(scan) + bad_row_findings(bad) + unknown_key_findings(splits)
    findings += shared_findings(splits, {name: file.sha256 for name, file in facts.files.items()})
    findings += image_findings(splits, facts) + label_findings(splits)
    findings += [finding for rows in splits.values() for finding in duplicate_findings(rows)]
    images = {
        "named": len({row.image for row in every} - {None}),
        "decoded": len(facts.files),
        "missing": len(facts.missing),
        "undecodable": len(facts.undecodable),
    }
    return Report(
        files={name: str(path) for name, path in paths.items()},
        counts={name: count_split(rows, bad[name]) for name, rows in splits.items()},
        labels=label_table(splits),
        images=images if config.images is not None else None,
        scan=scan,
        findings=by_severity(findings),
    )


def leak_findings(scan: LeakScan) -> list[Finding]:
    """A finding for each field that the scan accuses; a warning where no model is shown the field.

    All extra fields together are accused only where none of them is: then it takes two to tell.
    """
    accused = [score for score in scan.scores if score.is_leak]
    alone = any(
        score.role == Role.EXTRA and score.field != ALL_EXTRAS and score.question != WHICH_RELATION for score in accused
    )
    leaks = [_leak_finding(score) for score in accused if score.field != ALL_EXTRAS or not alone]
    return leaks + [_giveaway_finding(giveaway) for giveaway in scan.giveaways]


def _giveaway_finding(found: Giveaway) -> Finding:
    answer = f"'{found.question}' is answered {'yes' if found.is_yes else 'no'}"
    if found.question == RELATION_OR_NONE:
        answer = "there is a relation" if found.is_yes else "the label is None"
    evidence = (
        f"where '{found.feature}' is {found.value!r} ({found.rows} rows, {found.groups} groups), {answer} in "
        f"{found.share:.1%}; the text expects {found.text_share:.1%}"
    )
    advice = "find out how this value came about; do not show the field to a model before that is clear"
    return Finding(
        Severity.LEAK, "label_giveaway", f"a value of '{found.field}' gives the label away", evidence, advice
    )


def _leak_finding(score: Score) -> Finding:
    bound = "" if score.margin_nats is None else f", at least {max(score.margin_nats, 0):.3f} nats more (bootstrap)"
    evidence = (
        f"'{score.feature}' removes {score.share:.1%} of the uncertainty of '{score.question}', the text "
        f"{score.text_share:.1%}{bound}; best F1 of the field {score.f1:.3f}, text {score.text_f1:.3f}"
    )
    role = Role(score.role)
    if role is Role.EXTRA and score.question == WHICH_RELATION:
        advice = "entity types that a tagger read off the sentence do so; annotated ones are not there in real use"
        what = f"the extra field '{score.field}' tells which relation it is, not whether there is one"
        return Finding(Severity.WARNING, "label_types", what, evidence, advice)
    if role in (Role.EXTRA, Role.IMAGE):
        advice = "it may be made from the gold label: do not show it to a model, and find out how it was made"
        what = f"the {role} '{score.field}'" if role is Role.EXTRA else f"the {score.field}"
        if score.field == ALL_EXTRAS:
            what = "the set of all extra fields, none of them alone,"
        return Finding(Severity.LEAK, "label_leak", f"{what} gives the label away", evidence, advice)
    advice = {
        Role.ID: "give ids that say nothing of the label",
        Role.ORDER: "shuffle the rows before cutting splits, folds or a --limit from them",
        Role.TEXT: "look how the mentions were marked: their place or form alone may follow from the label",
    }[role]
    return Finding(Severity.WARNING, "label_pattern", f"the {score.field} follows the label", evidence, advice)
