"""The edits of a family of plans: its param-level decomposition, or its translation into another dialect.

The edits of a literal depend on the rest of its plan. Where code decides what the rest is, an edit is made only if
every alternative asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.files.sources import format_path
from codemods.inheritance.conflicts import OutsideConflict, find_outside_conflicts
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.inheritance.relations import Consumer, find_consumers
from codemods.models.describe import describe
from codemods.models.experts import read_experts
from codemods.reading.alternatives import Alternative, find_alternatives, keep_relevant_literals
from codemods.reading.module import ANY_KEY, ClassPlans, Conflict, PlanLiteral, are_exclusive
from codemods.rewriting.families import Family
from plans.decompose import (
    Decomposition,
    Edit,
    InsertEntry,
    LayoutReader,
    SetStyle,
    decompose,
    find_group_key,
    get_anchor,
    is_decomposable_plan,
)
from plans.dialect import Dialect
from plans.model_facts import ExpertLayout, KeyTarget, TargetReader, UnreadLayout
from plans.plan import plan_kind, to_wildcard
from plans.quantized import find_weight_key
from plans.rule import Finding, load_rule

__all__ = ["block_unsafe_edits", "find_siblings", "report_blocked", "to_dialect", "to_param_level"]


_UNSAFE = "the code that builds it cannot be rewritten safely"
_PARTIAL = "the plan takes in entries from elsewhere, which decide on its counterpart"


def block_unsafe_edits(
    literal: PlanLiteral,
    owner: ClassPlans | None,
    wanted: Decomposition,
    outside: Sequence[OutsideConflict] = (),
) -> Decomposition:
    """Turn edits that are not safe to make into findings, for whole experts modules at a time.

    Args:
        literal: the plan literal.
        owner: its class, None to ignore what other statements of the class do.
        wanted: the edits and findings of the literal.
        outside: what the code of other files does with the plan.
    """
    reasons = ((edit, next(_find_block_reasons(literal, owner, edit, outside), None)) for edit in wanted.edits)
    unsafe = {edit: why for edit, why in reasons if why}
    if not unsafe:
        return wanted
    blocked = frozenset(find_group_key(edit.key) for edit in unsafe)
    return replace(
        wanted,
        edits=tuple(edit for edit in wanted.edits if find_group_key(edit.key) not in blocked),
        findings=(*wanted.findings, *report_blocked({get_anchor(edit): why for edit, why in unsafe.items()})),
        ambiguous=wanted.ambiguous | blocked,
    )


def report_blocked(reasons: Mapping[str, str] | Iterable[str]) -> tuple[Finding, ...]:
    """Return a finding for each entry whose edit cannot be made.

    Args:
        reasons: key to the reason; keys alone if the reason is that code builds the entries.
    """
    reason_of = reasons if isinstance(reasons, Mapping) else dict.fromkeys(reasons, _UNSAFE)
    message = load_rule("MIG204").message
    return tuple(Finding("MIG204", key, message.format(key=key, where=why)) for key, why in reason_of.items())


def _find_block_reasons(
    literal: PlanLiteral, owner: ClassPlans | None, edit: Edit, outside: Sequence[OutsideConflict]
) -> Iterator[str]:
    """Yield the reasons why an edit cannot be made."""
    if not _is_replaceable(literal, edit):
        yield _UNSAFE
    module = find_group_key(to_wildcard(edit.key))
    for conflict in owner.conflicts if owner else ():
        if conflict.concerns(literal.attribute, module) and _is_renamed(edit, conflict):
            yield f"line {conflict.line} {_describe_conflict(edit, conflict)}"
    for path, conflict in outside:
        if conflict.concerns(literal.attribute, module) and _is_renamed(edit, conflict):
            yield f"{format_path(path)}:{conflict.line} {_describe_conflict(edit, conflict)}"
    for removal in owner.removals if owner else ():
        # Removing the whole plan leaves no half-migrated plan behind.
        removes_entry = removal.key is not None and (
            removal.key == ANY_KEY or find_group_key(to_wildcard(removal.key)) == module
        )
        if removes_entry and removal.attribute == literal.attribute and not are_exclusive(removal, literal):
            yield f"line {removal.line} takes entries out of it again"


def _is_renamed(edit: Edit, conflict: Conflict) -> bool:
    """Return whether a conflict concerns an edit: code that only reads styles concerns those that it would mistake."""
    before = edit.before if isinstance(edit, SetStyle) else None
    return conflict.reading is None or conflict.reading.distinguishes(before, edit.style)


def _describe_conflict(edit: Edit, conflict: Conflict) -> str:
    if conflict.reading is not None and conflict.reading.is_known and isinstance(edit, SetStyle):
        return f"{conflict.reason}, {edit.before} from {edit.style}"
    return conflict.reason


def _is_replaceable(literal: PlanLiteral, edit: Edit) -> bool:
    if not isinstance(edit, SetStyle):
        return True
    return all(entry.replaceable for entry in literal.entries if (entry.key, entry.style) == (edit.key, edit.before))


_NOTHING = Decomposition((), ())

_EXPERT_PARAMETER = re.compile(r"(?<!\w)experts\.(?:gate_up_proj|up_proj|down_proj)$")


_ABOUT_MISSING = frozenset({"MIG202", "MIG206"})
"""The codes of findings that an entry is missing, which a plan with entries from elsewhere may have."""


def to_param_level(tree: Tree, family: Family) -> Mapping[PlanLocation, Decomposition]:
    """Decompose the expert entries of a family's plans if every model that uses them has the regular layout."""
    layouts = _build_layout_reader(tree, family)

    def read(experts: str) -> ExpertLayout | UnreadLayout:
        of_models = list(layouts(experts).values())
        unread = (layout for layout in of_models if isinstance(layout, UnreadLayout))
        irregular = (layout for layout in of_models if isinstance(layout, ExpertLayout) and layout.irregularity)
        return next(unread, None) or next(irregular, of_models[0])

    def name_consumer(finding: Finding) -> Finding:
        """Name the other model, generated or inheriting, whose layout cannot be read."""
        by_model = layouts(find_group_key(finding.key)) if finding.code == "MIG203" else {}
        folder = next((folder for (folder, _), layout in by_model.items() if isinstance(layout, UnreadLayout)), None)
        if folder is None or folder == family.owner.path.parent:
            return finding
        return replace(finding, message=f"{finding.message}, in {format_path(folder)}, which uses it")

    outside = find_outside_conflicts(tree, family.locations)
    results = {location: _decompose_plan(tree, location, read, outside) for location in family.locations}
    return {
        location: replace(result, findings=tuple(map(name_consumer, result.findings)))
        for location, result in results.items()
    }


def to_dialect(source: Dialect, target: Dialect, tree: Tree, family: Family) -> Mapping[PlanLocation, Decomposition]:
    """Translate a family's plans by meaning; a key must name the same kind of module in every model that uses it."""
    describer = partial(
        _describe_for_all, frozenset((location.path.parent, location.class_name) for location in family.locations)
    )
    outside = [found for found in find_outside_conflicts(tree, family.locations) if found[1].reading]
    return {
        location: _translate_plan(source, target, tree, location, describer, outside) for location in family.locations
    }


def _decompose_plan(
    tree: Tree, location: PlanLocation, read_layout: LayoutReader, outside: Sequence[OutsideConflict]
) -> Decomposition:
    literal = tree.plan(location)
    if not isinstance(literal, PlanLiteral):
        return _NOTHING
    agreed = _merge_alternatives(
        [
            _block_unwritable(literal, decompose(literal.plan, read_layout, alternative.plan), alternative)
            for alternative in find_siblings(tree, location)
        ]
    )
    agreed = replace(agreed, findings=tuple(_explain_missing_half(tree, location, each) for each in agreed.findings))
    return block_unsafe_edits(literal, tree.get_class(location), agreed, outside)


def _explain_missing_half(tree: Tree, location: PlanLocation, finding: Finding) -> Finding:
    """Name the plan that code adds half a pair to, if that plan decides what the other half is."""
    literal = tree.literal(location)
    if finding.code != "MIG202" or location.code is None or literal.replaces:
        return finding
    base = tree.find_definition(replace(location, code=None)) if location.class_name else None
    plan = tree.plan(base) if base else None
    if base is None or not isinstance(plan, PlanLiteral):
        where = f", which {format_path(base.path)}:{plan.line} gives it," if base and plan else ""
        return report_blocked({finding.key: f"the plan that it is added to{where} is not read"})[0]
    entries = (entry for entry in plan.entries if find_group_key(entry.key) == find_group_key(finding.key))
    others = [entry for entry in entries if _EXPERT_PARAMETER.search(entry.key) and entry.key != finding.key]
    if not others:
        return finding
    where = f"{format_path(base.path)}:{others[0].line} writes {others[0].key.rpartition('.')[2]}"
    return report_blocked({finding.key: f"it is added to a plan whose other half is elsewhere: {where}"})[0]


def _translate_plan(
    source: Dialect,
    target: Dialect,
    tree: Tree,
    location: PlanLocation,
    describer: TargetReader,
    outside: Sequence[OutsideConflict],
) -> Decomposition:
    """Translate one literal; every statement is translated by itself, so that only code that reads names can differ."""
    from plans.translate import translate

    literal = tree.plan(location)
    kind = plan_kind(location.attribute)
    if not isinstance(literal, PlanLiteral) or kind is None:
        return _NOTHING
    computed = report_blocked([entry.key for entry in literal.entries if entry.style is None])
    owner = tree.get_class(location)
    alternatives = find_alternatives(owner, literal)
    reading = replace(owner, conflicts=tuple(filter(lambda one: one.reading, owner.conflicts)), removals=())
    results = [translate({**other.plan, **literal.plan}, source, target, describer, kind) for other in alternatives]
    return block_unsafe_edits(
        literal,
        reading,
        _merge_alternatives([_restrict_to_literal(literal, result, computed) for result in results]),
        outside,
    )


def _restrict_to_literal(literal: PlanLiteral, wanted: Decomposition, more: Sequence[Finding]) -> Decomposition:
    """Keep only the edits and findings of a whole plan's translation that concern the entries of one literal."""
    edits = tuple(edit for edit in wanted.edits if edit.key in literal.plan)
    return Decomposition(edits, (*(finding for finding in wanted.findings if finding.key in literal.plan), *more))


def _describe_for_all(consumers: frozenset[tuple[Path, str]], key: str) -> KeyTarget | None:
    """Return what a key names in every model that uses the plan, None if two of them differ."""
    targets = {describe(folder, key, owner.rpartition(".")[2]) for folder, owner in consumers}
    kinds = {(target.kind, target.ndim) if target else None for target in targets}
    return next(iter(targets)) if len(kinds) == 1 else None


def find_siblings(tree: Tree, location: PlanLocation) -> tuple[Alternative, ...]:
    """Return what the plan of a literal can hold besides it; for TP and SP plans only what concerns its experts."""
    literal, owner = tree.literal(location), tree.get_class(location)
    return find_alternatives(
        keep_relevant_literals(owner, literal) if is_decomposable_plan(location.attribute) else owner, literal
    )


def _merge_alternatives(results: Sequence[Decomposition]) -> Decomposition:
    """Return the edits that every alternative asks for; those that only some ask for become ambiguous."""
    wanted = [frozenset(result.edits) for result in results]
    contested = [edit for result in results for edit in result.edits if not all(edit in edits for edits in wanted)]
    ambiguous = frozenset(find_group_key(edit.key) for edit in contested)
    findings = dict.fromkeys(finding for result in results for finding in result.findings)
    explained = {find_group_key(finding.key) for finding in findings}
    unexplained = [get_anchor(edit) for edit in contested if find_group_key(edit.key) not in explained]
    return Decomposition(
        tuple(edit for edit in results[0].edits if find_group_key(edit.key) not in ambiguous),
        (*findings, *report_blocked(unexplained)),
        ambiguous.union(*(result.ambiguous for result in results)),
    )


def _block_unwritable(literal: PlanLiteral, wanted: Decomposition, other: Alternative) -> Decomposition:
    """Turn edits that cannot be written safely into findings.

    These are edits of experts with a computed style or with an entry that is written twice, new entries that have no
    position in the text, and edits that depend on entries which the plan takes from elsewhere and which are not read.
    """
    is_partial = literal.is_partial or other.is_partial
    own = [entry.key for entry in literal.entries if entry.style is None and _is_of_experts(entry.key)]
    computed = {find_group_key(key) for key in (*own, *filter(_is_of_experts, other.computed))}
    fixed = {entry.key for entry in literal.entries if is_partial or not entry.can_precede}
    unread = [finding.key for finding in wanted.findings if is_partial and finding.code in _ABOUT_MISSING]
    duplicates = _find_duplicates(literal, other)
    unwritable = [
        edit
        for edit in wanted.edits
        if find_group_key(edit.key) in computed or (isinstance(edit, InsertEntry) and edit.anchor in fixed)
    ]
    overridden = [edit for edit in wanted.edits if edit not in unwritable and find_group_key(edit.key) in duplicates]
    whys = {get_anchor(edit): f"line {duplicates[find_group_key(edit.key)]} writes it too" for edit in overridden}
    findings = [finding for finding in wanted.findings if finding.key not in unread]
    return Decomposition(
        tuple(edit for edit in wanted.edits if edit not in (*unwritable, *overridden)),
        (
            *findings,
            *report_blocked([*own, *map(get_anchor, unwritable)]),
            *report_blocked(dict.fromkeys(unread, _PARTIAL)),
            *report_blocked(whys),
        ),
        frozenset(find_group_key(edit.key) for edit in (*unwritable, *overridden)),
    )


def _is_of_experts(key: str) -> bool:
    """Return whether a key names a parameter of experts, or a scale of one."""
    return _EXPERT_PARAMETER.search(find_weight_key(key) or key) is not None


def _find_duplicates(literal: PlanLiteral, other: Alternative) -> Mapping[str, int]:
    """Return the experts modules with an entry that another literal writes too, each with that line."""
    keys = {entry.key for entry in literal.entries}
    return {find_group_key(key): line for key, line in other.lines.items() if key in keys}


def _build_layout_reader(tree: Tree, family: Family) -> Callable[[str], Mapping[Consumer, ExpertLayout | UnreadLayout]]:
    """Return a function from the key of an experts module to its layout in every model that uses the family's plan."""

    plan_files = {location.path.parent: location.path for location in reversed(family.locations)}

    @cache
    def read(experts: str) -> Mapping[Consumer, ExpertLayout | UnreadLayout]:
        return {
            (folder, owner): read_experts(folder, experts, owner.rpartition(".")[2], plan_files.get(folder))
            for folder, owner in find_consumers(tree, family.locations)
        }

    return read
