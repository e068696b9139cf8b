"""A tree through the rules: plans found, grouped under their owners, every edit computed before one is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from codemods.detect import Detected, detect
from codemods.ignores import without_held
from codemods.literals import read_module
from codemods.module import PlanLiteral
from codemods.ownership import Place, Tree
from codemods.propagate import Transform, families, judge
from codemods.rewrite import rewrite_source
from codemods.selection import Silencer
from codemods.sources import Source, read_source, shown
from codemods.survey import Survey, Wanted, every_plan, expert_plans, survey
from codemods.transform import to_dialect, to_param_level
from plans.decompose import Edit, InsertEntry
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.errors import MigratorError
from plans.rule import Finding, rule

__all__ = [
    "Change",
    "Located",
    "LocatedEdit",
    "Outcome",
    "Role",
    "decide",
    "outcome",
    "plan_rewrites",
    "tree_dialect",
]

Role = Literal["owner", "copy"]
OwnedEdits = tuple[Place, tuple[Edit, ...]]
"""A plan's owner, and what changes in the plan."""


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

    @property
    def owners(self) -> frozenset[Place]:
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
        dialect: what the tree speaks, where it was asked for.
    """

    changes: tuple[Change, ...]
    findings: tuple[Located, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int
    dialect: Detected | None = None


def plan_rewrites(
    paths: Sequence[Path], silencer: Silencer | None = None, target: str = PARAM_LEVEL, source: str = "auto"
) -> Outcome:
    """Compute every rewrite below the paths; nothing is written.

    Args:
        paths: files and folders.
        silencer: says what of them is spoken of and what is ignored; without it everything is said.
        target: the dialect to write; `param-level` decomposes expert entries and leaves all else.
        source: the dialect that the tree speaks, `auto` to find out.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    if source != "auto":
        load_dialect(source)  # refuses a name that no dialect has, also where the target asks for none
    if target == PARAM_LEVEL:
        found = survey(paths, expert_plans, silencer, skims=True)
        edits, findings = decide(found)
        result = outcome(found, edits, findings)
        return replace(result, errors=(*result.errors, *_unparsable(found, result)))
    found = survey(paths, every_plan, silencer)
    spoken = tree_dialect(paths, found, source)
    edits, findings = decide(found, partial(to_dialect, load_dialect(spoken.dialect), load_dialect(target)), every_plan)
    return replace(outcome(found, edits, findings), dialect=spoken)


def _unparsable(found: Survey, result: Outcome) -> list[MigratorError]:
    """Parse the files whose plans were read without a parser; those that change were parsed when they did."""
    errors: list[MigratorError] = []
    for path in sorted({place.path for place in found.places} - {change.path for change in result.changes}):
        try:
            if path in found.reachable:
                read_module(found.tree.source(path))
        except MigratorError as error:
            errors += [error] if error.message not in {known.message for known in found.errors} else []
    return errors


def tree_dialect(paths: Sequence[Path], found: Survey, source: str = "auto") -> Detected:
    """Return the dialect that a tree speaks, as asked for or found out, with the reason."""
    if source != "auto":
        return Detected(load_dialect(source).name, "asked for")
    styles = {style for place in found.places for style in _literal(found.tree, place).plan.values()}
    return detect(next(iter(paths), Path()), styles)


def outcome(found: Survey, edits: Mapping[Place, OwnedEdits], findings: Sequence[tuple[Place, Finding]]) -> Outcome:
    """Return the files that the edits make, and the findings below the given paths, with their lines."""
    changes = sorted(_changes(found, edits), key=lambda change: (change.role == "copy", change.path))
    located = [_located(found.tree, place, finding) for place, finding in findings if place.path in found.reachable]
    located += filter(None, map(_about_link, found.links))
    kept = [one for one in located if not found.silencer.is_silent(one.path, one.line, one.finding.code)]
    return Outcome(tuple(changes), tuple(kept), tuple(found.errors), len(found.reachable), found.plan_files)


def _about_link(link: Path) -> Located | None:
    """Say of a link out of the given paths that the plans behind it are left alone."""
    try:
        leads_to_plans = expert_plans.in_file(read_source(link).data)
    except MigratorError:
        return None
    where = shown(link.resolve())
    finding = Finding("MIG305", link.name, rule("MIG305").message.format(key=link.name, where=where))
    return Located(link, 1, "", "", finding) if leads_to_plans else None


def decide(
    found: Survey, transform: Transform = to_param_level, wanted: Wanted = expert_plans
) -> tuple[dict[Place, OwnedEdits], list[tuple[Place, Finding]]]:
    """Decide the edits of every family of plans, and say what a person should know.

    Args:
        found: the tree.
        transform: works out what becomes of a family.
        wanted: which plans it speaks of.
    """
    places = [place for place in found.places if wanted.literal(_literal(found.tree, place))]
    touches = found.silencer.selection.touches
    groups, lost = families(found.tree, places, found.errors)
    findings = [(place, finding) for place, finding in lost if touches([place.path])]
    edits: dict[Place, OwnedEdits] = {}
    for family in groups:
        if not touches(place.path for place in family.places):
            continue
        try:
            verdict = judge(found.tree, family, found.reachable, transform)
        except MigratorError as error:
            found.errors.append(error)
            continue
        owner = family.owner
        held = found.silencer.held(owner.path, verdict.edits.get(owner, ()), partial(_edit_line, found.tree, owner))
        kept = {place: without_held(proposed, held) for place, proposed in verdict.edits.items()}
        edits |= {place: (owner, wanted) for place, wanted in kept.items() if wanted}
        findings += verdict.findings
    return edits, findings


def _located(tree: Tree, place: Place, finding: Finding) -> Located:
    return Located(place.path, _line(tree, place, finding.key), place.class_name, place.attribute, finding)


def _line(tree: Tree, place: Place, key: str) -> int:
    """Return the line of an entry, or of the whole plan for a key that it does not hold."""
    plan = tree.plan(place)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    return next((entry.line for entry in entries if entry.key == key), plan.line)


def _changes(found: Survey, edits: Mapping[Place, OwnedEdits]) -> list[Change]:
    """Compute every file's new bytes; where one fails, all that belongs to its owners is given up."""
    by_file: dict[Path, dict[Place, OwnedEdits]] = defaultdict(dict)
    for place, wanted in edits.items():
        by_file[place.path][place] = wanted
    changes: list[Change] = []
    broken: set[Place] = set()
    for path, wanted_here in by_file.items():
        try:
            changes.append(_change(found.tree, path, wanted_here))
        except MigratorError as error:
            found.errors.append(error)
            broken |= {owner for owner, _ in wanted_here.values()}
    if not broken:
        return changes
    return _changes(found, {place: owned for place, owned in edits.items() if owned[0] not in broken})


def _change(tree: Tree, path: Path, edits: Mapping[Place, OwnedEdits]) -> Change:
    source = tree.source(path)
    literals = [(_literal(tree, place), wanted) for place, (_, wanted) in edits.items()]
    data = rewrite_source(source, tree.module(path), literals)
    located = tuple(
        LocatedEdit(_edit_line(tree, place, edit), place.class_name, place.attribute, edit, owner)
        for place, (owner, wanted) in edits.items()
        for edit in wanted
    )
    return Change(source, data, "copy" if source.generated_from else "owner", located)


def _literal(tree: Tree, place: Place) -> PlanLiteral:
    plan = tree.plan(place)
    assert isinstance(plan, PlanLiteral)
    return plan


def _edit_line(tree: Tree, place: Place, edit: Edit) -> int:
    return _line(tree, place, edit.anchor if isinstance(edit, InsertEntry) else edit.key)
