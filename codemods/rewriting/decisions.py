"""Decisions: which of the edits that were worked out are made.

The entries of one experts module in one plan are one decision, whichever literals of the class write them and whichever
generated files copy them. Where one of its edits is ignored, cannot be made or depends on circumstances, none is made:
half of them would leave the module half migrated. The owner's file decides for its copies; and where a copy puts the
entries of several owners together, what holds one of them back holds the others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import format_path
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.reading.module import PlanLiteral
from codemods.rewriting.propagate import Evaluation, Family
from codemods.tree.ignores import build_overruled_finding
from codemods.tree.selection import Suppressions
from plans.decompose import Edit, EditGroup, InsertEntry, find_group_key
from plans.rule import Finding

__all__ = ["OwnedEdits", "Resolution", "find_line", "find_lines", "get_anchor", "resolve_edits"]

OwnedEdits = tuple[PlanLocation, tuple[Edit, ...]]
"""A plan's owner, and what changes in the plan."""

_Evaluations = Sequence[tuple[Family, Evaluation]]
_Blocked = frozenset[tuple[Path, EditGroup]]


@dataclass(frozen=True)
class Resolution:
    """What is to be done to the plans of a tree.

    Args:
        edits: by the place that they are made in.
        findings: what a person should know, each with its place.
        ignored: the keys of edits that are not made because a person wants it so, by their place.
    """

    edits: Mapping[PlanLocation, OwnedEdits]
    findings: Sequence[tuple[PlanLocation, Finding]]
    ignored: Mapping[PlanLocation, frozenset[str]]


def resolve_edits(
    tree: Tree, evaluations: _Evaluations, suppressions: Suppressions, orphans: Iterable[PlanLocation] = ()
) -> Resolution:
    """Decide which edits of all families are made.

    Args:
        tree: reads files.
        evaluations: what may be done to each family.
        suppressions: says what is ignored.
        orphans: plans that belong to no family, because their owner cannot be found.
    """
    ignored = _propagate(_find_ignored(tree, evaluations, suppressions), evaluations)
    held = _propagate(ignored | _find_infeasible(tree, evaluations, orphans), evaluations)
    edits: dict[PlanLocation, OwnedEdits] = {}
    left: dict[PlanLocation, frozenset[str]] = {}
    findings = [finding for _, verdict in evaluations for finding in verdict.findings]
    for family, verdict in evaluations:
        for place, proposed in verdict.edits.items():
            left[place] = frozenset(edit.key for edit in proposed if _get_decision(place, edit.key) in ignored)
            if kept := tuple(edit for edit in proposed if _get_decision(place, edit.key) not in held):
                edits[place] = (family.owner, kept)
                findings += _report_overruled(tree, place, family.owner, kept, suppressions)
    return Resolution(edits, findings, left)


def get_anchor(edit: Edit) -> str:
    """Return the key of the entry that an edit stands at."""
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key


def find_line(tree: Tree, location: PlanLocation, key: str) -> int:
    """Return the line of an entry, or of the whole plan for a key that it does not hold."""
    return find_lines(tree, location, key)[-1]


def find_lines(tree: Tree, location: PlanLocation, key: str) -> range:
    """Return the lines of an entry from its key to where its style begins, or that of the whole plan."""
    plan = tree.plan(location)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    entry = next((entry for entry in entries if entry.key == key), None)
    if entry is None:
        return range(plan.line, plan.line + 1)
    first = bisect_right(tree.source(location.path).line_offsets, entry.key_span[0])
    return range(min(first, entry.line), entry.line + 1)


def _find_infeasible(tree: Tree, evaluations: _Evaluations, orphans: Iterable[PlanLocation]) -> _Blocked:
    """Return the decisions that cannot be carried out everywhere."""
    plans = ((place, tree.plan(place)) for place in orphans)
    keys = [(place, entry.key) for place, plan in plans if isinstance(plan, PlanLiteral) for entry in plan.entries]
    keys += [(place, key) for family, verdict in evaluations for key in verdict.blocked for place in family.locations]
    return frozenset(_get_decision(place, key) for place, key in keys)


def _propagate(blocked: _Blocked, evaluations: _Evaluations) -> _Blocked:
    """Hold what is held in one place of a family in all of them, and so on from plan to plan."""
    while blocked:
        more = {
            _get_decision(place, edit.key)
            for family, verdict in evaluations
            for edit in dict.fromkeys(edit for edits in verdict.edits.values() for edit in edits)
            if any(_get_decision(place, edit.key) in blocked for place in family.locations)
            for place in family.locations
        }
        if more <= blocked:
            break
        blocked |= more
    return blocked


def _find_ignored(tree: Tree, evaluations: _Evaluations, suppressions: Suppressions) -> _Blocked:
    """Return the decisions that a person does not want; a copy's edits are looked for in the owner."""
    return frozenset(
        _get_decision(family.owner, edit.key)
        for family, verdict in evaluations
        for edit in dict.fromkeys(edit for edits in verdict.edits.values() for edit in edits)
        if suppressions.is_suppressed(family.owner.path, find_lines(tree, family.owner, get_anchor(edit)), edit.code)
    )


def _get_decision(location: PlanLocation, key: str) -> tuple[Path, EditGroup]:
    return location.path, EditGroup(location.class_name, location.attribute, find_group_key(key))


def _report_overruled(
    tree: Tree, location: PlanLocation, owner: PlanLocation, edits: Iterable[Edit], suppressions: Suppressions
) -> Iterator[tuple[PlanLocation, Finding]]:
    """Yield a finding for every edit that is ignored in a copy, where nothing is decided."""
    for edit in edits if location != owner else ():
        key = get_anchor(edit)
        if suppressions.is_suppressed(location.path, find_lines(tree, location, key), edit.code):
            yield location, build_overruled_finding(edit.code, key, format_path(owner.path))
