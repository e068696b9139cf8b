"""A tree through the rules: plans found, grouped under their owners, every edit computed before one is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codemods.module import PlanLiteral
from codemods.ownership import Place, Tree
from codemods.propagate import families, judge
from codemods.rewrite import rewrite_source
from codemods.sources import Source, replace_source
from codemods.survey import Survey, expert_plans, survey
from plans.decompose import Edit, InsertEntry
from plans.errors import MigratorError
from plans.rule import Finding

__all__ = ["Change", "Located", "LocatedEdit", "Outcome", "Role", "decide", "outcome", "plan_rewrites", "write_changes"]

Role = Literal["owner", "copy"]
OwnedEdits = tuple[Place, tuple[Edit, ...]]
"""A plan's owner, and what changes in the plan."""

_WRITERS = 8


@dataclass(frozen=True)
class Located:
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
    owner: Place


@dataclass(frozen=True)
class Change:
    """One file to be written.

    Args:
        source: the file as it was read.
        data: its new bytes.
        role: whether a person owns it or the modular converter writes it.
        edits: what changed in it.
    """

    source: Source
    data: bytes
    role: Role
    edits: tuple[LocatedEdit, ...]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.source.path


@dataclass(frozen=True)
class Outcome:
    """What a run over a tree found.

    Args:
        changes: files to be written, owners before copies.
        findings: what a person should know.
        errors: files that could not be read or parsed; all others were still done.
        files: how many files were looked at.
        plan_files: how many of them mention a plan.
    """

    changes: tuple[Change, ...]
    findings: tuple[Located, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int


def plan_rewrites(paths: Sequence[Path]) -> Outcome:
    """Compute every rewrite below the paths; nothing is written.

    Raises:
        UsageError: a path does not exist.
    """
    found = survey(paths, expert_plans)
    edits, findings = decide(found)
    return outcome(found, edits, findings)


def outcome(
    found: Survey, edits: Mapping[Place, OwnedEdits], findings: Sequence[tuple[Place, Finding]]
) -> Outcome:
    """Return the files that the edits make, and the findings below the given paths, with their lines."""
    changes = sorted(_changes(found.tree, edits), key=lambda change: (change.role == "copy", change.path))
    kept = [_located(found.tree, place, finding) for place, finding in findings if place.path in found.reachable]
    return Outcome(tuple(changes), tuple(kept), tuple(found.errors), len(found.reachable), found.plan_files)


def write_changes(changes: Sequence[Change]) -> list[MigratorError]:
    """Write every file, owners before copies; one that cannot be written does not stop the others.

    Returns:
        The errors met.
    """
    # Each write waits for the disk: side by side they wait together.
    with ThreadPoolExecutor(_WRITERS) as writers:
        errors: list[MigratorError] = []
        for role in ("owner", "copy"):
            wanted = [change for change in changes if change.role == role]
            errors += filter(None, writers.map(_write, wanted))
    return errors


def _write(change: Change) -> MigratorError | None:
    try:
        replace_source(change.source, change.data)
    except MigratorError as error:
        return error
    return None


def decide(found: Survey) -> tuple[dict[Place, OwnedEdits], list[tuple[Place, Finding]]]:
    """Decide the edits of every family of plans that the rules speak of, and say what a person should know."""
    wanted = [place for place in found.places if expert_plans.literal(_literal(found.tree, place))]
    groups, findings = families(found.tree, wanted, found.errors)
    edits: dict[Place, OwnedEdits] = {}
    for family in groups:
        try:
            verdict = judge(found.tree, family, found.reachable)
        except MigratorError as error:
            found.errors.append(error)
            continue
        edits |= {place: (family.owner, wanted) for place, wanted in verdict.edits.items() if wanted}
        findings += verdict.findings
    return edits, findings


def _located(tree: Tree, place: Place, finding: Finding) -> Located:
    return Located(place.path, _line(tree, place, finding.key), place.class_name, place.attribute, finding)


def _line(tree: Tree, place: Place, key: str) -> int:
    """Return the line of an entry, or of the whole plan for a key that it does not hold."""
    plan = tree.plan(place)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    return next((entry.line for entry in entries if entry.key == key), plan.line)


def _changes(tree: Tree, edits: Mapping[Place, OwnedEdits]) -> Iterator[Change]:
    by_file: dict[Path, dict[Place, OwnedEdits]] = defaultdict(dict)
    for place, wanted in edits.items():
        by_file[place.path][place] = wanted
    for path, wanted_here in by_file.items():
        source = tree.source(path)
        literals = [(_literal(tree, place), wanted) for place, (_, wanted) in wanted_here.items()]
        data = rewrite_source(source, tree.module(path), literals)
        located = tuple(
            LocatedEdit(_line(tree, place, _anchor(edit)), place.class_name, place.attribute, edit, owner)
            for place, (owner, wanted) in wanted_here.items()
            for edit in wanted
        )
        yield Change(source, data, "copy" if source.generated_from else "owner", located)


def _literal(tree: Tree, place: Place) -> PlanLiteral:
    plan = tree.plan(place)
    assert isinstance(plan, PlanLiteral)
    return plan


def _anchor(edit: Edit) -> str:
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key
