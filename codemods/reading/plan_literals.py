"""Turning an expression that makes a plan into literals: one for each set of conditions and each constant it uses."""

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

_LOOKBEHIND = 200  # bytes before a key that are searched for an opening parenthesis


@dataclass(frozen=True)
class AssignmentTarget:
    """The plan that an expression is written into.

    Args:
        class_name: the class that has the plan, empty outside of classes.
        attribute: the plan.
        scope: the scope of the expression.
        is_assigned: whether the expression becomes the plan, instead of being added to it.
    """

    class_name: str
    attribute: str
    scope: Scope = field(default_factory=Scope)
    is_assigned: bool = False


@dataclass
class _EntrySources:
    """The origins of the entries of an expression.

    Args:
        nodes: the nodes that write entries, by conditions and the name of the constant that contains them, which is
            empty for the expression itself.
        references: the parts whose entries are written elsewhere.
        unresolved: the nodes whose entries cannot be read.
        named_plans: the plans that are copied, by class and attribute, with the part that names them.
        has_own_plan: whether the expression contains the previous value of the plan.
    """

    nodes: dict[tuple[tuple[Condition, ...], str], list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    references: list[PlanPart] = field(default_factory=list)
    unresolved: list[ast.AST] = field(default_factory=list)
    named_plans: list[tuple[tuple[str, str], PlanPart]] = field(default_factory=list)
    has_own_plan: bool = False


def read_assignment(
    node: ast.expr | ast.stmt, target: AssignmentTarget, source: SourceFile, definitions: Definitions
) -> Iterator[PlanLiteral | Reference | Unresolved | Conflict]:
    """Yield what an expression or an item assignment writes into a plan, and the conflicts that this causes.

    Args:
        node: the expression or statement.
        target: the plan that it is written into.
        source: the file.
        definitions: the definitions of the names in the file.
    """
    sources = _EntrySources()
    _collect_sources(node, "", (), sources, target, definitions)
    literals = list(_build_literals(node, sources, target, source))
    yield from literals
    yield from _build_references(node, sources, target, source)
    yield from _find_conflicts(
        sources, target, sorted({find_group_key(entry.key) for literal in literals for entry in literal.entries})
    )
    if sources.unresolved and is_plan_attribute(target.attribute):
        mentions_experts = any(_has_experts(part, source, definitions) for part in sources.unresolved)
        is_shared = any(
            definitions.find_values(part, target.scope.find_defining_classes(part)) for part in sources.unresolved
        )
        reason = "from a name that is used or assigned more than once" if is_shared else "that cannot be read"
        yield Unresolved(target.class_name, target.attribute, getattr(node, "lineno", 1), mentions_experts, reason)


def _build_literals(
    node: ast.expr | ast.stmt, sources: _EntrySources, target: AssignmentTarget, source: SourceFile
) -> Iterator[PlanLiteral]:
    """Yield a literal for each set of conditions and each constant; the first that applies replaces the plan."""
    previous: list[tuple[Condition, ...]] = []
    for (conditions, constant), nodes in sources.nodes.items():
        references = [part for part in sources.references if _can_both_apply(conditions, part.conditions)]
        last = max((span(part.node, source.offset)[0] for part in references if not constant), default=0)
        entries = tuple(_restrict_entry(entry, source, last) for entry in read_entries(nodes, source.offset))
        replaces = (
            target.is_assigned
            and not sources.has_own_plan
            and not any(_can_both_apply(conditions, earlier) for earlier in previous)
        )
        if entries or nodes[0] is node:
            previous.append(conditions)
            yield PlanLiteral(
                target.class_name,
                target.attribute,
                getattr(nodes[0] if conditions or constant else node, "lineno", 1),
                entries,
                target.scope.function,
                (*target.scope.conditions, *conditions),
                is_partial=not constant and bool(references),
                replaces=replaces,
            )


def _build_references(
    node: ast.AST, sources: _EntrySources, target: AssignmentTarget, source: SourceFile
) -> Iterator[Reference]:
    """Yield the expressions whose entries are written elsewhere or have keys that cannot be read.

    For a plan that is copied in part this is the whole expression. It replaces the plan unless a display does.
    """
    filtered = [part for _, part in sources.named_plans if part.is_filtered and part not in sources.references]
    referring = [
        (part.conditions, node if part.is_filtered else part.node) for part in (*sources.references, *filtered)
    ]
    unreadable = [
        (conditions, writer)
        for (conditions, _), nodes in sources.nodes.items()
        for writer in nodes
        if find_unreadable_keys(writer)
    ]
    for conditions, expression in (*referring, *unreadable):
        start, _ = span(expression, source.offset)
        yield Reference(
            target.class_name,
            target.attribute,
            getattr(expression, "lineno", 1),
            start,
            ast.unparse(expression),
            target.scope.function,
            (*target.scope.conditions, *conditions),
            replaces=target.is_assigned and not sources.has_own_plan and not sources.nodes,
        )


def _find_conflicts(sources: _EntrySources, target: AssignmentTarget, modules: Iterable[str]) -> Iterator[Conflict]:
    """Yield the plans that must stay as they are, because they are copied in part or into another plan."""
    for (class_name, attribute), part in sources.named_plans:
        line = getattr(part.node, "lineno", 1)
        if part.is_filtered:
            yield Conflict(class_name, attribute, None, f"line {line} copies only some of its entries")
        elif is_expert_parallel(target.attribute) and not is_expert_parallel(attribute):
            yield Conflict(class_name, attribute, None, f"line {line} makes an expert-parallel plan from it")
        elif (class_name, attribute) != (target.class_name, target.attribute):
            for module in modules:
                yield Conflict(class_name, attribute, module, f"line {line} copies it and changes the copy")


def _collect_sources(
    node: ast.AST,
    constant: str,
    conditions: tuple[Condition, ...],
    sources: _EntrySources,
    target: AssignmentTarget,
    definitions: Definitions,
) -> None:
    for part in split_expression(node, conditions):
        if part.has_entries and not part.is_filtered:
            sources.nodes[part.conditions, constant].append(part.node)
            sources.unresolved += find_unreadable_keys(part.node)
            continue
        if plan := target.scope.resolve_named_plan(part.node):
            sources.named_plans.append((plan, part))
        defining_classes = target.scope.find_defining_classes(part.node)
        value = definitions.resolve_constant(part.node, defining_classes)
        if _is_same_plan(part, target):
            sources.has_own_plan = True
        elif value is not None and not plan and not part.is_filtered:
            _collect_sources(value, ast.unparse(part.node), part.conditions, sources, target, definitions)
        else:
            sources.references.append(part)
            values = definitions.find_values(part.node, defining_classes) if not plan else []
            sources.unresolved += [] if _is_known(part, node, values, target) else [part.node]


def _is_known(part: PlanPart, whole: ast.AST, values: Iterable[ast.expr], target: AssignmentTarget) -> bool:
    """Return whether entries are read where they are written: in another plan, or at the callers of the function."""
    if isinstance(part.node, ast.Name) and part.node.id in target.scope.free_parameters:
        return has_plan_name(part.node) or (target.is_assigned and part.node is whole)
    has_entries = part.has_entries or any(
        value_part.has_entries for value in values for value_part in split_expression(value)
    )
    return has_plan_name(part.node) and not has_entries


def _is_same_plan(part: PlanPart, target: AssignmentTarget) -> bool:
    """Return whether a part is a plan of the same object, or a local name for the plan."""
    match part.node:
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
    """Return an entry without the edits that the text around it rules out.

    An entry inserted before a parenthesized key would be inside the parentheses. A comment in a key or a style would be
    lost. Entries from elsewhere, at offset `last`, may override every entry before them.
    """
    start, end = entry.key_span
    is_parenthesized = source.body[max(0, start - _LOOKBEHIND) : start].rstrip().endswith(b"(")
    return replace(
        entry,
        can_precede=entry.can_precede and not is_parenthesized and b"#" not in source.body[start:end],
        replaceable=entry.replaceable and start >= last and b"#" not in source.body[slice(*entry.style_span)],
    )
