"""Families of plans: an owner and its generated copies, which are edited together or not at all."""

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
from plans.decompose import Decomposition, Edit, EditGroup, find_group_key, get_anchor
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
    "group_families",
    "resolve_edits",
]


@dataclass(frozen=True)
class Family:
    """An owner with every generated copy of its plan.

    Args:
        owner: the plan that a person edits.
        copies: the generated plans that the modular converter writes from it.
        ambiguous: generated plans with the same entries whose owner cannot be found; they may be copies too.
    """

    owner: PlanLocation
    copies: tuple[PlanLocation, ...]
    ambiguous: tuple[PlanLocation, ...] = ()

    @property
    def locations(self) -> tuple[PlanLocation, ...]:
        """The owner first, then the copies."""
        return (self.owner, *self.copies)


Transform = Callable[[Tree, Family], Mapping[PlanLocation, Decomposition]]
"""Compute the edits and findings of every plan of a family."""

ScopeCheck = Callable[[Path], str | None]
"""Return why a file must not be written, or None where it may be."""


@dataclass(frozen=True)
class Evaluation:
    """The edits and findings of a family, each with its location.

    Args:
        edits: the edits of every plan of the family; empty if any of them cannot be edited.
        findings: what a person should know.
        blocked: the experts modules, and the keys of other entries, that must not be edited in any literal of the plan.
    """

    edits: Mapping[PlanLocation, tuple[Edit, ...]]
    findings: tuple[tuple[PlanLocation, Finding], ...]
    blocked: frozenset[str] = frozenset()


def group_families(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> tuple[list[Family], list[tuple[PlanLocation, Finding]]]:
    """Group plan literals under their owners; a copy whose owner cannot be found becomes a finding.

    Args:
        tree: the files.
        locations: the plan literals.
        errors: receives an error for each file that cannot be read on the way to an owner.

    Returns:
        The families, and the findings with their locations.
    """
    locations = tuple(locations)
    owners, ownerless = _find_owners(tree, locations, errors)
    copies: dict[PlanLocation, list[PlanLocation]] = {owner: [] for owner in owners.values()}
    for location, owner in owners.items():
        copies[owner] += [location] if location != owner else []
    for owner, location in find_missing_copies(tree, locations, errors):
        if owner in copies and location not in (owner, *copies[owner]):
            copies[owner].append(location)  # its entries differ from its owner's
            _check_modular(tree, location, errors)
    orphans = [location for location, missing in ownerless.items() if not (missing and missing.lacks_modular)]
    families = [
        Family(owner, tuple(of_owner), _find_ambiguous(tree, owner, orphans)) for owner, of_owner in copies.items()
    ]
    findings = [
        (location, build_plan_finding(tree, location, missing.code, missing.reason))
        for location, missing in ownerless.items()
        if missing
    ]
    return families, findings


def _find_owners(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> tuple[dict[PlanLocation, PlanLocation], dict[PlanLocation, MissingOwner | None]]:
    """Return the owner of each plan, and for each plan without one the reason, None where a file cannot be read."""
    owners: dict[PlanLocation, PlanLocation] = {}
    ownerless: dict[PlanLocation, MissingOwner | None] = {}
    for location in locations:
        try:
            owner = tree.find_owner(location)
        except MigratorError as error:
            errors.append(error)
            ownerless[location] = None
            continue
        if isinstance(owner, PlanLocation):
            owners[location] = owner
            continue
        ownerless[location] = owner
        if not owner.lacks_modular:
            _check_modular(tree, location, errors)
    return owners, ownerless


def _check_modular(tree: Tree, location: PlanLocation, errors: list[MigratorError]) -> None:
    """Parse the modular file behind a copy that has no owner or differs from it: it may only have been skimmed."""
    generated_from = tree.source(location.path).generated_from
    try:
        tree.parse(location.path.with_name(generated_from or location.path.name))
    except MigratorError as error:
        add_error_once(errors, error)


def _find_ambiguous(tree: Tree, owner: PlanLocation, orphans: Iterable[PlanLocation]) -> tuple[PlanLocation, ...]:
    """Return the orphans that may be copies of a plan: they have its entries, and a class name leads to it."""
    plan = tree.plan(owner)
    return tuple(
        location
        for location in orphans
        if isinstance(plan, PlanLiteral)
        and _has_same_entries(tree.plan(location), plan)
        and can_derive_from(tree, location, owner)
    )


def _has_same_entries(plan: PlanLiteral | Opaque, other: PlanLiteral) -> bool:
    return isinstance(plan, PlanLiteral) and plan.equals(other)


def evaluate_family(tree: Tree, family: Family, explain_out_of_scope: ScopeCheck, transform: Transform) -> Evaluation:
    """Return the edits and findings of a family; its plans are edited all or not at all.

    Args:
        tree: the files.
        family: an owner with its copies.
        explain_out_of_scope: returns why a file must not be written.
        transform: computes what changes in each plan.
    """
    wanted = transform(tree, family)
    decided = frozenset(find_group_key(edit.key) for each in wanted.values() for edit in each.edits)
    results = {location: _compute_result(tree, location, wanted[location]) for location in family.locations}
    if differing := [location for location in family.copies if results[location] != results[family.owner]]:
        return Evaluation({}, tuple(_report_differing(tree, family.owner, differing)), decided)
    edits = {location: decomposition.edits for location, decomposition in wanted.items()}
    if family.ambiguous and any(edits.values()):
        finding = build_plan_finding(tree, family.owner, "MIG306", format_path(family.ambiguous[0].path))
        return Evaluation({}, ((family.owner, finding),), decided)
    reasons = [reason for location, some in edits.items() if some and (reason := explain_out_of_scope(location.path))]
    if reasons:
        in_scope = [location for location in family.locations if not explain_out_of_scope(location.path)]
        findings = tuple((location, build_plan_finding(tree, location, "MIG304", reasons[0])) for location in in_scope)
        return Evaluation({}, findings, decided)
    ambiguous = frozenset(key for decomposition in wanted.values() for key in decomposition.ambiguous)
    return Evaluation(edits, tuple((family.owner, finding) for finding in wanted[family.owner].findings), ambiguous)


def _report_differing(
    tree: Tree, owner: PlanLocation, differing: Iterable[PlanLocation]
) -> Iterator[tuple[PlanLocation, Finding]]:
    """Yield findings about copies whose edits would not give what their owner becomes.

    A copy with its owner's entries is up to date; then other code of the copy's class leads to other edits.
    """
    plan = tree.plan(owner)
    differing = list(differing)
    outdated = [
        location
        for location in differing
        if not (isinstance(plan, PlanLiteral) and _has_same_entries(tree.plan(location), plan))
    ]
    if outdated:
        yield from ((location, build_plan_finding(tree, location, "MIG301", owner.path.name)) for location in outdated)
        return
    location = differing[0]
    code = location.path.with_name(tree.source(location.path).generated_from or location.path.name)
    because = f"{format_path(code)} inherits it, and code of its {location.class_name} decides on the same entries"
    yield owner, build_plan_finding(tree, owner, "MIG204", because)


def _compute_result(tree: Tree, location: PlanLocation, wanted: Decomposition) -> list[tuple[str, str | None]]:
    """Return the entries that a plan will have: a copy may differ from its owner only by what the edits change."""
    literal = tree.plan(location)
    return compute_edited_entries(literal, wanted.edits) if isinstance(literal, PlanLiteral) else []


def build_plan_finding(tree: Tree, location: PlanLocation, code: str, where: str) -> Finding:
    """Return a finding about a whole plan, located at its first experts entry or else at the plan."""
    literal = tree.plan(location)
    keys = (entry.key for entry in literal.entries) if isinstance(literal, PlanLiteral) else iter(())
    key = next((key for key in keys if "experts" in key), location.attribute)
    return Finding(code, key, load_rule(code).message.format(key=key, where=where))


OwnedEdits = tuple[PlanLocation, tuple[Edit, ...]]
"""A plan's owner, and the edits of the plan."""

_Evaluations = Sequence[tuple[Family, Evaluation]]
_Blocked = frozenset[tuple[Path, EditGroup]]


@dataclass(frozen=True)
class Resolution:
    """The edits of all plans of a tree, and what is reported about them.

    Args:
        edits: location to the owner and the edits of its plan.
        findings: what a person should know, each with its location.
        ignored: location to the keys of the edits that an ignore comment or the configuration suppresses.
    """

    edits: Mapping[PlanLocation, OwnedEdits]
    findings: Sequence[tuple[PlanLocation, Finding]]
    ignored: Mapping[PlanLocation, frozenset[str]]


def resolve_edits(
    tree: Tree, evaluations: _Evaluations, suppressions: Suppressions, orphans: Iterable[PlanLocation] = ()
) -> Resolution:
    """Decide which edits of all families are made.

    Args:
        tree: the files.
        evaluations: each family with its edits and findings.
        suppressions: decides which edits are suppressed.
        orphans: plans that belong to no family, because their owner cannot be found.
    """
    ignored = _propagate(_find_ignored(tree, evaluations, suppressions), evaluations)
    blocked = _propagate(ignored | _find_infeasible(tree, evaluations, orphans), evaluations)
    edits: dict[PlanLocation, OwnedEdits] = {}
    suppressed: dict[PlanLocation, frozenset[str]] = {}
    findings = [finding for _, evaluation in evaluations for finding in evaluation.findings]
    for family, evaluation in evaluations:
        for location, proposed in evaluation.edits.items():
            suppressed[location] = frozenset(
                edit.key for edit in proposed if _get_edit_group(location, edit.key) in ignored
            )
            if kept := tuple(edit for edit in proposed if _get_edit_group(location, edit.key) not in blocked):
                edits[location] = (family.owner, kept)
                findings += _report_overruled(tree, location, family.owner, kept, suppressions)
    return Resolution(edits, findings, suppressed)


def find_line(tree: Tree, location: PlanLocation, key: str) -> int:
    """Return the line of an entry's style, or the plan's first line for a key that it does not have."""
    return find_lines(tree, location, key)[-1]


def find_lines(tree: Tree, location: PlanLocation, key: str) -> range:
    """Return the lines of an entry from its key to the start of its style, or the plan's first line without the key."""
    plan = tree.plan(location)
    entries = plan.entries if isinstance(plan, PlanLiteral) else ()
    entry = next((entry for entry in entries if entry.key == key), None)
    if entry is None:
        return range(plan.line, plan.line + 1)
    first = bisect_right(tree.source(location.path).line_offsets, entry.key_span[0])
    return range(min(first, entry.line), entry.line + 1)


def _find_infeasible(tree: Tree, evaluations: _Evaluations, orphans: Iterable[PlanLocation]) -> _Blocked:
    """Return the edit groups that cannot be edited in every plan that shares them."""
    plans = ((location, tree.plan(location)) for location in orphans)
    keys = [
        (location, entry.key) for location, plan in plans if isinstance(plan, PlanLiteral) for entry in plan.entries
    ]
    keys += [
        (location, key)
        for family, evaluation in evaluations
        for key in evaluation.blocked
        for location in family.locations
    ]
    return frozenset(_get_edit_group(location, key) for location, key in keys)


def _propagate(blocked: _Blocked, evaluations: _Evaluations) -> _Blocked:
    """Block in all plans of a family what is blocked in one of them, until nothing more follows."""
    while blocked:
        more = {
            _get_edit_group(location, edit.key)
            for family, evaluation in evaluations
            for edit in dict.fromkeys(edit for edits in evaluation.edits.values() for edit in edits)
            if any(_get_edit_group(location, edit.key) in blocked for location in family.locations)
            for location in family.locations
        }
        if more <= blocked:
            break
        blocked |= more
    return blocked


def _find_ignored(tree: Tree, evaluations: _Evaluations, suppressions: Suppressions) -> _Blocked:
    """Return the edit groups that a person suppressed; for a copy only the comments of its owner count."""
    return frozenset(
        _get_edit_group(family.owner, edit.key)
        for family, evaluation in evaluations
        for edit in dict.fromkeys(edit for edits in evaluation.edits.values() for edit in edits)
        if suppressions.is_suppressed(family.owner.path, find_lines(tree, family.owner, get_anchor(edit)), edit.code)
    )


def _get_edit_group(location: PlanLocation, key: str) -> tuple[Path, EditGroup]:
    return location.path, EditGroup(location.class_name, location.attribute, find_group_key(key))


def _report_overruled(
    tree: Tree, location: PlanLocation, owner: PlanLocation, edits: Iterable[Edit], suppressions: Suppressions
) -> Iterator[tuple[PlanLocation, Finding]]:
    """Yield a finding for every ignore comment in a copy about an edit that its owner decides."""
    for edit in edits if location != owner else ():
        key = get_anchor(edit)
        if suppressions.is_suppressed(location.path, find_lines(tree, location, key), edit.code):
            yield location, build_overruled_finding(edit.code, key, format_path(owner.path))
