"""From an expression that makes a plan to literals: one for each set of conditions, and for each constant it uses."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from codemods.files.sources import SourceFile
from codemods.reading.entries import PlanEntry, find_unreadable_keys, read_entries, span
from codemods.reading.expressions import PlanPart, has_plan_name, split_expression
from codemods.reading.module import Condition, Conflict, PlanLiteral, Reference, Unresolved
from codemods.reading.names import Definitions
from codemods.reading.scope import Scope, is_plan_attribute
from plans.decompose import find_group_key
from plans.plan import is_expert_parallel

__all__ = ["AssignmentTarget", "read_assignment"]

_LOOKBEHIND = 200  # bytes before a key in which what opens it is looked for


@dataclass(frozen=True)
class AssignmentTarget:
    """What an expression is put into.

    Args:
        class_name: the class whose plan it is, empty outside of classes.
        attribute: the plan.
        scope: where the expression stands.
        is_assigned: whether the expression becomes the plan itself, rather than being added to it.
    """

    class_name: str
    attribute: str
    scope: Scope = field(default_factory=Scope)
    is_assigned: bool = False


@dataclass
class _EntrySources:
    """Where the entries of an expression come from.

    Args:
        nodes: by conditions and constant, empty for the expression itself, what writes entries.
        references: what brings entries from elsewhere.
        unresolved: what brings entries that nobody here can read.
        named_plans: plans that are taken over, by class and attribute, with the piece that names them.
        has_own_plan: whether it takes over the plan as it was.
    """

    nodes: dict[tuple[tuple[Condition, ...], str], list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    references: list[PlanPart] = field(default_factory=list)
    unresolved: list[ast.AST] = field(default_factory=list)
    named_plans: list[tuple[tuple[str, str], PlanPart]] = field(default_factory=list)
    has_own_plan: bool = False


def read_assignment(
    node: ast.expr | ast.stmt, target: AssignmentTarget, source: SourceFile, definitions: Definitions
) -> Iterator[PlanLiteral | Reference | Unresolved | Conflict]:
    """Yield what an expression, or an item assignment, writes into a plan or takes over, and what that does to others.

    Args:
        node: the expression or statement.
        target: what it is put into.
        source: the file.
        definitions: of the file's names.
    """
    sources = _EntrySources()
    _collect_sources(node, "", (), sources, target, definitions)
    literals = list(_build_literals(node, sources, target, source))
    yield from literals
    yield from _build_references(node, sources, target, source)
    yield from _find_conflicts(
        sources, target, sorted({find_group_key(entry.key) for one in literals for entry in one.entries})
    )
    if sources.unresolved and is_plan_attribute(target.attribute):
        experts = any(_has_experts(part, source, definitions) for part in sources.unresolved)
        shared = any(
            definitions.find_values(part, target.scope.find_defining_classes(part)) for part in sources.unresolved
        )
        why = "from a name that is used or assigned more than once" if shared else "that cannot be read"
        yield Unresolved(target.class_name, target.attribute, getattr(node, "lineno", 1), experts, why)


def _build_literals(
    node: ast.expr | ast.stmt, sources: _EntrySources, target: AssignmentTarget, source: SourceFile
) -> Iterator[PlanLiteral]:
    """Yield a literal for every set of conditions and every constant; in each case the first replaces the plan."""
    before: list[tuple[Condition, ...]] = []
    for (conditions, constant), nodes in sources.nodes.items():
        beside = [piece for piece in sources.references if _can_both_apply(conditions, piece.conditions)]
        last = max((span(piece.node, source.offset)[0] for piece in beside if not constant), default=0)
        entries = tuple(_restrict_entry(entry, source, last) for entry in read_entries(nodes, source.offset))
        replaces = (
            target.is_assigned
            and not sources.has_own_plan
            and not any(_can_both_apply(conditions, one) for one in before)
        )
        if entries or nodes[0] is node:
            before.append(conditions)
            yield PlanLiteral(
                target.class_name,
                target.attribute,
                getattr(nodes[0] if conditions or constant else node, "lineno", 1),
                entries,
                target.scope.function,
                (*target.scope.conditions, *conditions),
                is_partial=not constant and bool(beside),
                replaces=replaces,
            )


def _build_references(
    node: ast.AST, sources: _EntrySources, target: AssignmentTarget, source: SourceFile
) -> Iterator[Reference]:
    """Yield what brings entries from elsewhere, or under keys that cannot be read.

    Of what is taken in part only the whole expression tells; it replaces the plan where no display does.
    """
    filtered = [piece for _, piece in sources.named_plans if piece.is_filtered and piece not in sources.references]
    parts = [(one.conditions, node if one.is_filtered else one.node) for one in (*sources.references, *filtered)]
    hidden = [
        (conditions, one)
        for (conditions, _), nodes in sources.nodes.items()
        for one in nodes
        if find_unreadable_keys(one)
    ]
    for conditions, part in (*parts, *hidden):
        start, _ = span(part, source.offset)
        yield Reference(
            target.class_name,
            target.attribute,
            getattr(part, "lineno", 1),
            start,
            ast.unparse(part),
            target.scope.function,
            (*target.scope.conditions, *conditions),
            replaces=target.is_assigned and not sources.has_own_plan and not sources.nodes,
        )


def _find_conflicts(sources: _EntrySources, target: AssignmentTarget, modules: Iterable[str]) -> Iterator[Conflict]:
    """Yield the plans that stay as they are, because only a part of them is taken over, or another plan is made."""
    for (class_name, attribute), piece in sources.named_plans:
        line = getattr(piece.node, "lineno", 1)
        if piece.is_filtered:
            yield Conflict(class_name, attribute, None, f"line {line} leaves some of its entries out")
        elif is_expert_parallel(target.attribute) and not is_expert_parallel(attribute):
            yield Conflict(class_name, attribute, None, f"line {line} makes an expert-parallel plan of it")
        elif (class_name, attribute) != (target.class_name, target.attribute):
            for module in modules:
                yield Conflict(class_name, attribute, module, f"line {line} takes it over and changes it")


def _collect_sources(
    node: ast.AST,
    constant: str,
    conditions: tuple[Condition, ...],
    sources: _EntrySources,
    target: AssignmentTarget,
    definitions: Definitions,
) -> None:
    for piece in split_expression(node, conditions):
        if piece.has_entries and not piece.is_filtered:
            sources.nodes[piece.conditions, constant].append(piece.node)
            sources.unresolved += find_unreadable_keys(piece.node)
            continue
        if plan := target.scope.resolve_named_plan(piece.node):
            sources.named_plans.append((plan, piece))
        homes = target.scope.find_defining_classes(piece.node)
        value = definitions.resolve_constant(piece.node, homes)
        if _is_same_plan(piece, target):
            sources.has_own_plan = True
        elif value is not None and not plan and not piece.is_filtered:
            _collect_sources(value, ast.unparse(piece.node), piece.conditions, sources, target, definitions)
        else:
            sources.references.append(piece)
            values = definitions.find_values(piece.node, homes) if not plan else []
            sources.unresolved += [] if _is_known(piece, node, values, target) else [piece.node]


def _is_known(piece: PlanPart, whole: ast.AST, values: Iterable[ast.expr], target: AssignmentTarget) -> bool:
    """Return whether entries are read where they come from: they are another plan's, or whatever callers give."""
    if isinstance(piece.node, ast.Name) and piece.node.id in target.scope.free_parameters:
        return has_plan_name(piece.node) or (target.is_assigned and piece.node is whole)
    writes = piece.has_entries or any(one.has_entries for value in values for one in split_expression(value))
    return has_plan_name(piece.node) and not writes


def _is_same_plan(piece: PlanPart, target: AssignmentTarget) -> bool:
    """Return whether a piece is a plan of the same object, or a local name that stands for the plan."""
    match piece.node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return is_plan_attribute(name)
        case ast.Name(id=name):
            return name in target.scope.aliases
    return False


def _can_both_apply(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    return not any(replace(condition, holds=not condition.holds) in other for condition in one)


def _has_experts(node: ast.AST, source: SourceFile, definitions: Definitions) -> bool:
    return any(
        b"experts" in source.body[slice(*span(part, source.offset))] for part in definitions.find_dependencies(node)
    )


def _restrict_entry(entry: PlanEntry, source: SourceFile, last: int) -> PlanEntry:
    """Take back what the text around an entry forbids.

    Nothing can precede a key in parentheses: it would land inside of them. A comment in a key or style would be lost.
    What comes from elsewhere, at `last`, may override any entry before it.
    """
    start, end = entry.key_span
    opened = source.body[max(0, start - _LOOKBEHIND) : start].rstrip().endswith(b"(")
    return replace(
        entry,
        can_precede=entry.can_precede and not opened and b"#" not in source.body[start:end],
        replaceable=entry.replaceable and start >= last and b"#" not in source.body[slice(*entry.style_span)],
    )
