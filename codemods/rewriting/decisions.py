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

from codemods.files.sources import shown
from codemods.inheritance.ownership import Place, Tree
from codemods.reading.module import PlanLiteral
from codemods.rewriting.propagate import Family, Verdict
from codemods.tree.ignores import overruled_ignore
from codemods.tree.selection import Silencer
from plans.decompose import Decision, Edit, InsertEntry, decided_with
from plans.rule import Finding

__all__ = ["Decided", "OwnedEdits", "anchor_of", "line_of", "lines_of", "settle"]

OwnedEdits = tuple[Place, tuple[Edit, ...]]
"""A plan's owner, and what changes in the plan."""

_Verdicts = Sequence[tuple[Family, Verdict]]
_Held = frozenset[tuple[Path, Decision]]


@dataclass(frozen=True)
class Decided:
    """What is to be done to the plans of a tree.

    Args:
        edits: by the place that they are made in.
        findings: what a person should know, each with its place.
        ignored: the keys of edits that are not made because a person wants it so, by their place.
    """

    edits: Mapping[Place, OwnedEdits]
    findings: Sequence[tuple[Place, Finding]]
    ignored: Mapping[Place, frozenset[str]]


def settle(tree: Tree, verdicts: _Verdicts, silencer: Silencer, loose: Iterable[Place] = ()) -> Decided:
    """Decide which edits of all families are made.

    Args:
        tree: reads files.
        verdicts: what may be done to each family.
        silencer: says what is ignored.
        loose: plans that belong to no family, because their owner cannot be found.
    """
    ignored = _spread(_ignored(tree, verdicts, silencer), verdicts)
    held = _spread(ignored | _unfit(tree, verdicts, loose), verdicts)
    edits: dict[Place, OwnedEdits] = {}
    left: dict[Place, frozenset[str]] = {}
    findings = [finding for _, verdict in verdicts for finding in verdict.findings]
    for family, verdict in verdicts:
        for place, proposed in verdict.edits.items():
            left[place] = frozenset(edit.key for edit in proposed if _decision(place, edit.key) in ignored)
            if kept := tuple(edit for edit in proposed if _decision(place, edit.key) not in held):
                edits[place] = (family.owner, kept)
                findings += _overruled(tree, place, family.owner, kept, silencer)
    return Decided(edits, findings, left)


def anchor_of(edit: Edit) -> str:
    """Return the key of the entry that an edit stands at."""
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key


def line_of(tree: Tree, place: Place, key: str) -> int:
    """Return the line of an entry, or of the whole plan for a key that it does not hold."""
    return lines_of(tree, place, key)[-1]


def lines_of(tree: Tree, place: Place, key: str) -> range:
    """Return the lines of an entry from its key to where its style begins, or that of the whole plan."""
    plan = tree.plan(place)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    entry = next((entry for entry in entries if entry.key == key), None)
    if entry is None:
        return range(plan.line, plan.line + 1)
    first = bisect_right(tree.source(place.path).line_offsets, entry.key_span[0])
    return range(min(first, entry.line), entry.line + 1)


def _unfit(tree: Tree, verdicts: _Verdicts, loose: Iterable[Place]) -> _Held:
    """Return the decisions that cannot be carried out everywhere."""
    plans = ((place, tree.plan(place)) for place in loose)
    keys = [(place, entry.key) for place, plan in plans if isinstance(plan, PlanLiteral) for entry in plan.entries]
    keys += [(place, key) for family, verdict in verdicts for key in verdict.held for place in family.places]
    return frozenset(_decision(place, key) for place, key in keys)


def _spread(held: _Held, verdicts: _Verdicts) -> _Held:
    """Hold what is held in one place of a family in all of them, and so on from plan to plan."""
    while held:
        more = {
            _decision(place, edit.key)
            for family, verdict in verdicts
            for edit in dict.fromkeys(edit for edits in verdict.edits.values() for edit in edits)
            if any(_decision(place, edit.key) in held for place in family.places)
            for place in family.places
        }
        if more <= held:
            break
        held |= more
    return held


def _ignored(tree: Tree, verdicts: _Verdicts, silencer: Silencer) -> _Held:
    """Return the decisions that a person does not want; a copy's edits are looked for in the owner."""
    return frozenset(
        _decision(family.owner, edit.key)
        for family, verdict in verdicts
        for edit in dict.fromkeys(edit for edits in verdict.edits.values() for edit in edits)
        if silencer.is_silent(family.owner.path, lines_of(tree, family.owner, anchor_of(edit)), edit.code)
    )


def _decision(place: Place, key: str) -> tuple[Path, Decision]:
    return place.path, Decision(place.class_name, place.attribute, decided_with(key))


def _overruled(
    tree: Tree, place: Place, owner: Place, edits: Iterable[Edit], silencer: Silencer
) -> Iterator[tuple[Place, Finding]]:
    """Yield a finding for every edit that is ignored in a copy, where nothing is decided."""
    for edit in edits if place != owner else ():
        key = anchor_of(edit)
        if silencer.is_silent(place.path, lines_of(tree, place, key), edit.code):
            yield place, overruled_ignore(edit.code, key, shown(owner.path))
