"""The outcome of a run over a tree: files to write, findings and errors, each with its location."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codemods.files.sources import SourceFile
from codemods.inheritance.ownership import PlanLocation
from codemods.tree.detect import DetectedDialect
from codemods.tree.selection import Suppressions
from plans.decompose import Edit, SetStyle
from plans.errors import MigratorError
from plans.rule import Finding, load_rule

__all__ = [
    "Change",
    "LocatedEdit",
    "LocatedFinding",
    "Outcome",
    "Role",
    "build_pending_findings",
    "find_unused_comments",
    "format_edit_message",
    "merge_outcomes",
]


Role = Literal["owner", "copy"]


@dataclass(frozen=True)
class LocatedFinding:
    """A finding with its location in a file; the line is counted from 1."""

    path: Path
    line: int
    class_name: str
    attribute: str
    finding: Finding


@dataclass(frozen=True)
class LocatedEdit:
    """An edit with its location in a file.

    Args:
        line: the line in the original file, counted from 1.
        class_name: the class that assigns the plan.
        attribute: the plan's attribute.
        edit: what changes.
        owner: the location that a person edits; the edits of one owner are made together or not at all.
    """

    line: int
    class_name: str
    attribute: str
    edit: Edit
    owner: PlanLocation


@dataclass(frozen=True)
class Change:
    """One file to write.

    Args:
        source: the file as it was read.
        data: the file's new bytes.
        role: `owner` if a person edits the file, `copy` if the modular converter writes it.
        edits: what changes in the file.
    """

    source: SourceFile
    data: bytes
    role: Role
    edits: tuple[LocatedEdit, ...]

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.source.path

    @property
    def owners(self) -> frozenset[PlanLocation]:
        """The owners of the plans that change in the file."""
        return frozenset(edit.owner for edit in self.edits)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run over a tree.

    Args:
        changes: the files to write, owners before copies.
        findings: what a person should know.
        errors: the errors of files that could not be read or parsed; all other files were still processed.
        files: how many files were read.
        plan_files: how many of them mention a plan.
        dialects: the dialect of each project, empty if the run did not need it.
    """

    changes: tuple[Change, ...]
    findings: tuple[LocatedFinding, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int
    dialects: tuple[DetectedDialect, ...] = ()

    @property
    def dialect(self) -> DetectedDialect | None:
        """The dialect, None if there is none or several."""
        return self.dialects[0] if len(self.dialects) == 1 else None


def merge_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcomes of several projects as one."""
    changes = [change for outcome in outcomes for change in outcome.changes]
    return Outcome(
        tuple(sorted(changes, key=lambda change: change.role == "copy")),
        tuple(finding for outcome in outcomes for finding in outcome.findings),
        tuple(error for outcome in outcomes for error in outcome.errors),
        sum(outcome.files for outcome in outcomes),
        sum(outcome.plan_files for outcome in outcomes),
        tuple(dict.fromkeys(dialect for outcome in outcomes for dialect in outcome.dialects)),
    )


def build_pending_findings(changes: Iterable[Change]) -> Iterator[LocatedFinding]:
    """Yield a finding for every pending edit, in the file that it changes."""
    for change in changes:
        for located in change.edits:
            finding = Finding(located.edit.code, located.edit.key, format_edit_message(located.edit))
            yield LocatedFinding(change.path, located.line, located.class_name, located.attribute, finding)


def find_unused_comments(suppressions: Suppressions) -> Iterator[LocatedFinding]:
    """Yield a finding for every unused ignore comment; call it after all other findings are decided."""
    for path, line, finding in suppressions.find_unused():
        yield LocatedFinding(path, line, "", "", finding)


def format_edit_message(edit: Edit) -> str:
    """Return the rule's message about an edit."""
    style = edit.before if isinstance(edit, SetStyle) else edit.style
    return load_rule(edit.code).message.format(key=edit.key, style=style, to=edit.style, where="")
