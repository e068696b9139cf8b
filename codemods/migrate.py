"""A tree through the rules: plans found, grouped under their owners, every edit computed before one is written."""

from __future__ import annotations

import re
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
from codemods.sources import Source, find_sources, read_source, replace_source
from plans.decompose import Edit, InsertEntry, is_decomposed_plan
from plans.errors import MigratorError
from plans.rule import Finding

__all__ = ["Change", "Located", "LocatedEdit", "Outcome", "Role", "plan_rewrites", "write_changes"]

Role = Literal["owner", "copy"]

_WRITERS = 8
_PLAN = b"_plan"
# An entry of experts that are not expert-parallel already; far fewer files hold one than mention a plan.
_EXPERTS_ENTRY = re.compile(rb"experts(?:\.\w+)?[\"']\s*(?::(?!\s*[\"'](?:grouped_gemm|ep_))|[,\])])")


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
    """An edit with its place in a file, the line counted from 1 in the file as it was."""

    line: int
    class_name: str
    attribute: str
    edit: Edit


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
    paths = [path.absolute() for path in paths]
    reachable = find_sources(paths)
    tree = Tree()
    errors: list[MigratorError] = []
    places: list[Place] = []
    plan_files = 0
    named = frozenset(paths)
    for path in _with_context(paths, reachable):
        try:
            mentions, found = _expert_plans(tree, path, named=path in named)
            plan_files += mentions
            places += found
        except MigratorError as error:
            errors.append(error)
    scope = frozenset(reachable)
    edits, findings = _decide(tree, places, scope, errors)
    changes = sorted(_changes(tree, edits), key=lambda change: (change.role == "copy", change.path))
    kept = [_located(tree, place, finding) for place, finding in findings if place.path in scope]
    return Outcome(tuple(changes), tuple(kept), tuple(errors), len(reachable), plan_files)


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


def _with_context(paths: Sequence[Path], reachable: Sequence[Path]) -> list[Path]:
    """Return the files to look at: a plan's copies may live beside the given paths, in sibling model folders."""
    roots = {path.parent.parent if path.is_file() else path.parent for path in paths if _is_model_path(path)}
    return list(dict.fromkeys([*reachable, *find_sources(sorted(roots))]))


def _is_model_path(path: Path) -> bool:
    """Say whether a path is one model: its folder, or a file in it."""
    folder = path.parent if path.is_file() else path
    return any(folder.glob("configuration_*.py")) or any(folder.glob("modular_*.py"))


def _expert_plans(tree: Tree, path: Path, *, named: bool) -> tuple[bool, list[Place]]:
    """Return whether a file mentions a plan, and its plans with expert entries; most files are not even parsed."""
    source = read_source(path)
    mentions = _PLAN in source.data
    if not mentions or not (named or _EXPERTS_ENTRY.search(source.data)):
        return mentions, []
    tree.add(source)
    return mentions, list(_places(tree, path))


def _places(tree: Tree, path: Path) -> Iterator[Place]:
    """Yield where a file writes down plans that the rules speak of and that have expert entries."""
    for owner in tree.module(path).classes.values():
        for attribute, plan in owner.plans.items():
            if isinstance(plan, PlanLiteral) and is_decomposed_plan(attribute) and _has_experts(plan):
                yield Place(path, owner.name, attribute)
        for index, literal in enumerate(owner.code):
            if is_decomposed_plan(literal.attribute) and _has_experts(literal):
                yield Place(path, owner.name, literal.attribute, index)


def _has_experts(plan: PlanLiteral) -> bool:
    return any("experts" in entry.key for entry in plan.entries)


def _decide(
    tree: Tree, places: Sequence[Place], scope: frozenset[Path], errors: list[MigratorError]
) -> tuple[dict[Place, tuple[Edit, ...]], list[tuple[Place, Finding]]]:
    groups, found = families(tree, places, errors)
    edits: dict[Place, tuple[Edit, ...]] = {}
    for family in groups:
        try:
            verdict = judge(tree, family, scope)
        except MigratorError as error:
            errors.append(error)
            continue
        found += verdict.findings
        if verdict.decomposition.edits:
            edits |= dict.fromkeys(family.places, verdict.decomposition.edits)
    return edits, found


def _located(tree: Tree, place: Place, finding: Finding) -> Located:
    return Located(place.path, _line(tree, place, finding.key), place.class_name, place.attribute, finding)


def _line(tree: Tree, place: Place, key: str) -> int:
    """Return the line of an entry, or of the whole plan for a key that it does not hold."""
    plan = tree.plan(place)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    return next((entry.line for entry in entries if entry.key == key), plan.line)


def _changes(tree: Tree, edits: Mapping[Place, tuple[Edit, ...]]) -> Iterator[Change]:
    by_file: dict[Path, dict[Place, tuple[Edit, ...]]] = defaultdict(dict)
    for place, wanted in edits.items():
        by_file[place.path][place] = wanted
    for path, wanted_here in by_file.items():
        source = tree.source(path)
        literals = [(_literal(tree, place), wanted) for place, wanted in wanted_here.items()]
        data = rewrite_source(source, tree.module(path), literals)
        located = tuple(
            LocatedEdit(_line(tree, place, _anchor(edit)), place.class_name, place.attribute, edit)
            for place, wanted in wanted_here.items()
            for edit in wanted
        )
        yield Change(source, data, "copy" if source.generated_from else "owner", located)


def _literal(tree: Tree, place: Place) -> PlanLiteral:
    plan = tree.plan(place)
    assert isinstance(plan, PlanLiteral)
    return plan


def _anchor(edit: Edit) -> str:
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key
