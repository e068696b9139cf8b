"""Owners to copies: which plans change together, and whether they may."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import add_error_once, format_path
from codemods.inheritance.ownership import MissingOwner, PlanLocation, Tree
from codemods.inheritance.relations import can_derive_from, find_missing_copies
from codemods.reading.module import Opaque, PlanLiteral
from codemods.rewriting.rewrite import compute_edited_entries
from codemods.tree.selection import Suppressions, build_overruled_finding
from plans.decompose import Decomposition, Edit, EditGroup, InsertEntry, find_group_key
from plans.errors import MigratorError
from plans.rule import Finding, load_rule

__all__ = [
    "Evaluation",
    "Family",
    "OwnedEdits",
    "Resolution",
    "ScopeCheck",
    "Transform",
    "build_plan_finding",
    "evaluate_family",
    "find_line",
    "find_lines",
    "get_anchor",
    "group_families",
    "resolve_edits",
]


@dataclass(frozen=True)
class Family:
    """An owner with every generated copy of its plan.

    Args:
        owner: where a person edits.
        copies: where the modular converter writes the same plan.
        ambiguous: plans of generated files that say the same, but whose way to an owner is lost.
    """

    owner: PlanLocation
    copies: tuple[PlanLocation, ...]
    ambiguous: tuple[PlanLocation, ...] = ()

    @property
    def locations(self) -> tuple[PlanLocation, ...]:
        """The owner first, then the copies."""
        return (self.owner, *self.copies)


Transform = Callable[[Tree, Family], Mapping[PlanLocation, Decomposition]]
"""Works out what becomes of each place of a family."""

ScopeCheck = Callable[[Path], str | None]
"""From a file to the reason in words why it may not be written, None where it may."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be done to a family and said of it, each with the place it belongs to.

    Args:
        edits: of every place, or of none.
        findings: what a person should know.
        blocked: the keys of experts modules, and of other entries, that must not be edited in any literal of the plan.
    """

    edits: Mapping[PlanLocation, tuple[Edit, ...]]
    findings: tuple[tuple[PlanLocation, Finding], ...]
    blocked: frozenset[str] = frozenset()


def group_families(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> tuple[list[Family], list[tuple[PlanLocation, Finding]]]:
    """Group plan literals under their owners; copies whose owner is lost become findings.

    Args:
        tree: reads files.
        locations: where plans are assigned.
        errors: takes those of files on the way to an owner that cannot be read.
    """
    locations = tuple(locations)
    owners, unknown = _find_owners(tree, locations, errors)
    copies: dict[PlanLocation, list[PlanLocation]] = {owner: [] for owner in owners.values()}
    for place, owner in owners.items():
        copies[owner] += [place] if place != owner else []
    for owner, place in find_missing_copies(tree, locations, errors):
        if owner in copies and place not in (owner, *copies[owner]):
            copies[owner].append(place)  # at odds with its owner
            _check_modular(tree, place, errors)
    stray = [place for place, lost in unknown.items() if not (lost and lost.lacks_modular)]
    found = [Family(owner, tuple(listed), _find_ambiguous(tree, owner, stray)) for owner, listed in copies.items()]
    return found, [
        (place, build_plan_finding(tree, place, lost.code, lost.reason)) for place, lost in unknown.items() if lost
    ]


def _find_owners(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> tuple[dict[PlanLocation, PlanLocation], dict[PlanLocation, MissingOwner | None]]:
    """Return the owners of plans, and the plans without one with the reason, None where a file cannot be read."""
    owners: dict[PlanLocation, PlanLocation] = {}
    unknown: dict[PlanLocation, MissingOwner | None] = {}
    for place in locations:
        try:
            owner = tree.find_owner(place)
        except MigratorError as error:
            errors.append(error)
            unknown[place] = None
            continue
        if isinstance(owner, PlanLocation):
            owners[place] = owner
            continue
        unknown[place] = owner
        if not owner.lacks_modular:
            _check_modular(tree, place, errors)
    return owners, unknown


def _check_modular(tree: Tree, location: PlanLocation, errors: list[MigratorError]) -> None:
    """Parse the modular file of a copy that is lost or at odds: what was read of it so far may not be all it says."""
    generated_from = tree.source(location.path).generated_from
    try:
        tree.parse(location.path.with_name(generated_from or location.path.name))
    except MigratorError as error:
        add_error_once(errors, error)


def _find_ambiguous(tree: Tree, owner: PlanLocation, orphans: Iterable[PlanLocation]) -> tuple[PlanLocation, ...]:
    """Return the plans with a lost owner that may be copies of this one: they say the same, and a name leads here."""
    wanted = tree.plan(owner)
    return tuple(
        place
        for place in orphans
        if isinstance(wanted, PlanLiteral)
        and _has_same_entries(tree.plan(place), wanted)
        and can_derive_from(tree, place, owner)
    )


def _has_same_entries(plan: PlanLiteral | Opaque, wanted: PlanLiteral) -> bool:
    return isinstance(plan, PlanLiteral) and plan.equals(wanted)


def evaluate_family(tree: Tree, family: Family, explain_out_of_scope: ScopeCheck, transform: Transform) -> Evaluation:
    """Decide a family's edits: all of its places or none.

    Args:
        tree: reads files.
        family: an owner with its copies.
        explain_out_of_scope: says of a file that may not be written why.
        transform: works out what becomes of each place.
    """
    wanted = transform(tree, family)
    results = {place: _compute_result(tree, place, wanted[place]) for place in family.locations}
    if differing := [place for place in family.copies if results[place] != results[family.owner]]:
        return Evaluation({}, tuple(_report_differing(tree, family.owner, differing)), _collect_decision_keys(wanted))
    edits = {place: decomposition.edits for place, decomposition in wanted.items()}
    if family.ambiguous and any(edits.values()):
        stays = build_plan_finding(tree, family.owner, "MIG306", format_path(family.ambiguous[0].path))
        return Evaluation({}, ((family.owner, stays),), _collect_decision_keys(wanted))
    reasons = [reason for place, some in edits.items() if some and (reason := explain_out_of_scope(place.path))]
    if reasons:
        named = [place for place in family.locations if not explain_out_of_scope(place.path)]
        findings = tuple((place, build_plan_finding(tree, place, "MIG304", reasons[0])) for place in named)
        return Evaluation({}, findings, _collect_decision_keys(wanted))
    disputed = frozenset(key for decomposition in wanted.values() for key in decomposition.ambiguous)
    return Evaluation(edits, tuple((family.owner, finding) for finding in wanted[family.owner].findings), disputed)


def _report_differing(
    tree: Tree, owner: PlanLocation, differing: Iterable[PlanLocation]
) -> Iterator[tuple[PlanLocation, Finding]]:
    """Yield what to say of copies that would become something else than their owner.

    One that says the same today is not at odds: other code of its class decides otherwise on the same entries.
    """
    plan = tree.plan(owner)
    copies = {place: isinstance(plan, PlanLiteral) and _has_same_entries(tree.plan(place), plan) for place in differing}
    if odd := [place for place, same in copies.items() if not same]:
        yield from ((place, build_plan_finding(tree, place, "MIG301", owner.path.name)) for place in odd)
        return
    place = next(iter(copies))
    code = place.path.with_name(tree.source(place.path).generated_from or place.path.name)
    because = f"{format_path(code)} inherits it, and code of its {place.class_name} decides on the same entries"
    yield owner, build_plan_finding(tree, owner, "MIG204", because)


def _collect_decision_keys(wanted: Mapping[PlanLocation, Decomposition]) -> frozenset[str]:
    """Return what the edits of a family are decided with."""
    return frozenset(find_group_key(edit.key) for found in wanted.values() for edit in found.edits)


def _compute_result(tree: Tree, location: PlanLocation, wanted: Decomposition) -> list[tuple[str, str | None]]:
    """Return the entries that a plan will have: a copy may lag behind its owner by rewrites only."""
    literal = tree.plan(location)
    return compute_edited_entries(literal, wanted.edits) if isinstance(literal, PlanLiteral) else []


def build_plan_finding(tree: Tree, location: PlanLocation, code: str, where: str) -> Finding:
    """Return a finding about a whole plan, standing at its first experts entry or else at the plan."""
    literal = tree.plan(location)
    keys = (entry.key for entry in literal.entries) if isinstance(literal, PlanLiteral) else iter(())
    key = next((key for key in keys if "experts" in key), location.attribute)
    return Finding(code, key, load_rule(code).message.format(key=key, where=where))


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
