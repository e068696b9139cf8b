"""What a run over a tree found: files to be written, findings and errors, each with its place."""

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
    """A finding with its place in a file, the line counted from 1."""

    path: Path
    line: int
    class_name: str
    attribute: str
    finding: Finding


@dataclass(frozen=True)
class LocatedEdit:
    """An edit with its place in a file.

    Args:
        line: counted from 1 in the file as it was.
        class_name: where its plan is assigned.
        attribute: of the plan.
        edit: what changes.
        owner: the place that a person edits; the edits of one owner are made together or not at all.
    """

    line: int
    class_name: str
    attribute: str
    edit: Edit
    owner: PlanLocation


@dataclass(frozen=True)
class Change:
    """One file to be written.

    Args:
        source: the file as it was read.
        data: its new bytes.
        role: whether a person owns it or the modular converter writes it.
        edits: what changed in it.
    """

    source: SourceFile
    data: bytes
    role: Role
    edits: tuple[LocatedEdit, ...]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.source.path

    @property
    def owners(self) -> frozenset[PlanLocation]:
        """The owners of what changes in it."""
        return frozenset(edit.owner for edit in self.edits)


@dataclass(frozen=True)
class Outcome:
    """What a run over a tree found.

    Args:
        changes: files to be written, owners before copies.
        findings: what a person should know.
        errors: files that could not be read or parsed; all others were still done.
        files: how many files were looked at.
        plan_files: how many of them mention a plan.
        dialects: what the tree speaks, where it was asked for; of several projects what each of them does.
    """

    changes: tuple[Change, ...]
    findings: tuple[LocatedFinding, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int
    dialects: tuple[DetectedDialect, ...] = ()

    @property
    def dialect(self) -> DetectedDialect | None:
        """The one dialect that was asked for, None where there is none or several."""
        return self.dialects[0] if len(self.dialects) == 1 else None


def merge_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of several projects as one."""
    changes = [change for one in outcomes for change in one.changes]
    return Outcome(
        tuple(sorted(changes, key=lambda change: change.role == "copy")),
        tuple(finding for one in outcomes for finding in one.findings),
        tuple(error for one in outcomes for error in one.errors),
        sum(one.files for one in outcomes),
        sum(one.plan_files for one in outcomes),
        tuple(dict.fromkeys(dialect for one in outcomes for dialect in one.dialects)),
    )


def build_pending_findings(changes: Iterable[Change]) -> Iterator[LocatedFinding]:
    """Yield a finding for every edit, in the file that it is pending in."""
    for change in changes:
        for located in change.edits:
            yield _build_pending_finding(change, located)


def find_unused_comments(suppressions: Suppressions) -> Iterator[LocatedFinding]:
    """Yield a finding for every ignore comment of no use, once every other finding was asked for."""
    for path, line, finding in suppressions.find_unused():
        yield LocatedFinding(path, line, "", "", finding)


def format_edit_message(edit: Edit) -> str:
    """Return the rule's message about an edit."""
    style = edit.before if isinstance(edit, SetStyle) else edit.style
    return load_rule(edit.code).message.format(key=edit.key, style=style, to=edit.style, where="")


def _build_pending_finding(change: Change, located: LocatedEdit) -> LocatedFinding:
    finding = Finding(located.edit.code, located.edit.key, format_edit_message(located.edit))
    return LocatedFinding(change.path, located.line, located.class_name, located.attribute, finding)
