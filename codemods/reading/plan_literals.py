"""Turning an expression that makes a plan into literals: one for each set of conditions and each constant it uses."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from codemods.files.sources import SourceFile
from codemods.reading.entries import (
    PlanEntry,
    find_computed_modules,
    find_placeholder,
    find_unreadable_keys,
    read_entries,
    span,
)
from codemods.reading.expressions import PlanPart, find_renamed_plan, has_plan_name, split_expression
from codemods.reading.module import Condition, Conflict, PlanCopy, PlanLiteral, Reference, Unresolved
from codemods.reading.names import Definitions, get_dotted_name, get_identifier
from codemods.reading.scope import Scope, is_plan_attribute
from plans.decompose import find_group_key
from plans.plan import is_expert_parallel

__all__ = ["AssignmentTarget", "WriteKind", "find_incomplete_modules", "mention_experts", "read_assignment"]

_PARAMETERS = ("gate_up_proj", "down_proj")
_LOOKBEHIND = 200  # bytes before a key that are searched for an opening parenthesis

WriteKind = Literal["added", "assigned", "default", "read"]
"""What becomes of an expression.

- `added`: its entries are added to the plan.
- `assigned`: it becomes the plan.
- `default`: it stands in for a plan that is missing, as in `getattr(model, "_tp_plan", {})`, and takes no entries away.
- `read`: it becomes a local name that is not written into a plan; other plans in it are only read.
"""


@dataclass(frozen=True)
class AssignmentTarget:
    """The plan that an expression is written into.

    Args:
        class_name: the class that has the plan, empty outside of classes.
        attribute: the plan.
        scope: the scope of the expression.
        kind: what becomes of the expression.
    """

    class_name: str
    attribute: str
    scope: Scope = field(default_factory=Scope)
    kind: WriteKind = "added"

    @property
    def is_assigned(self) -> bool:
        """Whether the expression becomes the plan, instead of being added to it."""
        return self.kind in ("assigned", "default")


@dataclass
class _EntrySources:
    """The origins of the entries of an expression.

    Args:
        nodes: the nodes that write entries, by conditions and the name of the constant that contains them, which is
            empty for the expression itself.
        references: the parts whose entries are written elsewhere.
        unresolved: the nodes whose entries cannot be read.
        unreadable: the expressions with such a node.
        named_plans: the plans that are copied, by class and attribute, with the part that names them.
        has_own_plan: whether the expression contains the previous value of the plan.
        template: a key or a style that something else fills in, empty if there is none.
    """

    nodes: dict[tuple[tuple[Condition, ...], str], list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    references: list[PlanPart] = field(default_factory=list)
    unresolved: list[ast.AST] = field(default_factory=list)
    unreadable: list[ast.AST] = field(default_factory=list)
    named_plans: list[tuple[tuple[str, str], PlanPart]] = field(default_factory=list)
    has_own_plan: bool = False
    template: str = ""


def read_assignment(
    node: ast.expr | ast.stmt, target: AssignmentTarget, source: SourceFile, definitions: Definitions
) -> Iterator[PlanLiteral | Reference | Unresolved | Conflict | PlanCopy]:
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
    yield from _find_conflicts(sources, target, literals)
    for plan, part in sources.named_plans:
        if plan != (target.class_name, target.attribute):
            line = getattr(part.node, "lineno", 1)
            yield PlanCopy(target.class_name, target.attribute, *plan, line, target.scope.function)
    if sources.unresolved and is_plan_attribute(target.attribute):
        mentions_experts = bool(sources.template) or any(
            _is_template(part) or mention_experts(part, source, definitions) for part in sources.unresolved
        )
        is_shared = any(
            definitions.find_values(part, target.scope.find_defining_classes(part)) for part in sources.unresolved
        )
        reason = "from a name that is used or assigned more than once" if is_shared else "that cannot be read"
        if sources.template:
            reason = f"that something else fills in: {sources.template}"
        is_known_class = target.scope.is_known_class(target.class_name)
        yield Unresolved(
            target.class_name if is_known_class else target.scope.class_name,
            target.attribute,
            getattr(node, "lineno", 1),
            mentions_experts,
            reason,
            target.scope.function,
            "" if is_known_class else target.class_name,
            target.is_assigned,
        )


def _is_template(node: ast.AST) -> bool:
    """Return whether a plan's value is no dict but text that something else replaces, as in `plan = {{ tp_plan }}`."""
    return isinstance(node, (ast.Set, ast.List)) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


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
            target.kind == "assigned"
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
    named = [part for _, part in sources.named_plans]
    filtered = [part for part in named if part.is_filtered and part not in sources.references]
    referring = [
        (part.conditions, node if part.is_filtered else part.node)
        for part in (*sources.references, *filtered)
        if not (target.kind == "read" and part in named)
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
            replaces=target.kind == "assigned" and not sources.has_own_plan and not sources.nodes,
        )


def _find_conflicts(
    sources: _EntrySources, target: AssignmentTarget, literals: Iterable[PlanLiteral]
) -> Iterator[Conflict]:
    """Yield the plans that must stay as they are, because they are copied in part or into another plan.

    A copy that replaces both parameters of an experts module does not depend on the plan that it is made from.
    """
    modules = sorted(find_incomplete_modules(literals))
    changes = "copies it and changes the copy"
    for (class_name, attribute), part in sources.named_plans:
        line = getattr(part.node, "lineno", 1)
        conflict = partial(Conflict, class_name, attribute, line=line, function=target.scope.function)
        if part.is_filtered:
            yield conflict(module=None, reason="copies only some of its entries")
        elif is_expert_parallel(target.attribute) and not is_expert_parallel(attribute):
            yield conflict(module=None, reason="makes an expert-parallel plan from it")
        elif find_renamed_plan(part.node):
            if any("experts" in module for module in modules):
                yield conflict(module=None, reason=changes)
        elif (class_name, attribute) != (target.class_name, target.attribute):
            yield from (conflict(module=module, reason=changes) for module in modules)
    for part in sources.references:
        if _is_imported(part.node, target.scope) and not target.scope.resolve_named_plan(part.node):
            conflict = partial(Conflict, ast.unparse(part.node), "*", line=getattr(part.node, "lineno", 1))
            yield from (conflict(module=module, reason=changes) for module in modules)
    is_added = target.kind == "added"
    added = [part for part in sources.references if is_added and not _is_parent_plan(part.node, target)]
    if added and not sources.has_own_plan:
        yield Conflict(
            target.class_name,
            target.attribute,
            None,
            getattr(added[0].node, "lineno", 1),
            "adds entries of another plan to it",
            target.scope.function,
        )
    for expression in sources.unreadable:
        for node in ast.walk(expression):
            if plan := target.scope.resolve_named_plan(node):
                line = getattr(node, "lineno", 1)
                reason = "makes a plan from it in a way that cannot be read"
                yield Conflict(*plan, None, line, reason, target.scope.function)


def find_incomplete_modules(literals: Iterable[PlanLiteral]) -> set[str]:
    """Return the modules of a plan's entries, without experts modules whose parameters all have an entry."""
    keys = {entry.key for literal in literals for entry in literal.entries}
    modules = {find_group_key(key) for key in keys}
    return {module for module in modules if not keys.issuperset(f"{module}.{name}" for name in _PARAMETERS)}


def _collect_sources(
    node: ast.AST,
    constant: str,
    conditions: tuple[Condition, ...],
    sources: _EntrySources,
    target: AssignmentTarget,
    definitions: Definitions,
) -> None:
    for part in split_expression(node, conditions):
        if isinstance(part.node, ast.Constant) and not is_plan_attribute(target.attribute):
            continue  # `from_pretrained(tp_plan="auto")`, which asks for the model's own plan
        if template := find_placeholder(part.node):
            sources.template = sources.template or template
            sources.references.append(part)
            sources.unresolved.append(part.node)
            sources.unreadable.append(part.node)
            continue
        if part.has_entries and not part.is_filtered:
            sources.nodes[part.conditions, constant].append(part.node)
            if unread := [*find_unreadable_keys(part.node), *_find_hidden_experts(part.node, definitions)]:
                sources.unresolved += unread
                sources.unreadable.append(part.node)
            continue
        renamed = find_renamed_plan(part.node)
        plan = target.scope.resolve_named_plan(renamed or part.node)
        if plan:
            sources.named_plans.append((plan, part))
        is_readable = plan is not None and target.scope.is_known_class(plan[0])
        defining_classes = target.scope.find_defining_classes(part.node)
        value = definitions.resolve_constant(part.node, defining_classes)
        if _is_same_plan(part, target):
            sources.has_own_plan = True
        elif value is not None and not is_readable and not part.is_filtered:
            _collect_sources(value, ast.unparse(part.node), part.conditions, sources, target, definitions)
        else:
            sources.references.append(part)
            values = definitions.find_values(part.node, defining_classes) if not is_readable else []
            if not _is_known(part, node, values, target, definitions):
                sources.unresolved.append(part.node)
                sources.unreadable.append(part.node)


def _is_known(
    part: PlanPart, whole: ast.AST, values: Iterable[ast.expr], target: AssignmentTarget, definitions: Definitions
) -> bool:
    """Return whether entries are read where they are written: in another plan, or at the callers of the function."""
    node = part.node
    if isinstance(node, ast.Name) and node.id in target.scope.free_parameters:
        return has_plan_name(node) or (target.is_assigned and node is whole)
    if isinstance(node, ast.Name) and node.id in target.scope.aliases:
        return True
    if any(value_part.has_entries for value in values for value_part in split_expression(value)):
        return False
    plan = find_renamed_plan(node) or node
    is_foreign = isinstance(plan, ast.Name) and not definitions.is_defined(plan.id)
    is_constant = _is_imported(plan, target.scope) and not is_plan_attribute(get_identifier(plan))
    return definitions.is_plan(plan) and not (is_foreign or is_constant or definitions.has_entries_in_class(plan))


def _is_imported(node: ast.AST, scope: Scope) -> bool:
    """Return whether an expression is a dotted name whose first part the file imports."""
    first = (get_dotted_name(node) or "").partition(".")[0]
    return first in scope.imported and first not in scope.free_parameters


def _find_hidden_experts(node: ast.AST, definitions: Definitions) -> Iterator[ast.expr]:
    """Yield the computed parts of keys that may name an experts module: before the name of one of its parameters."""
    for part in find_computed_modules(node, _PARAMETERS):
        values = list(definitions.find_all_values(part.id)) if isinstance(part, ast.Name) else []
        strings = [value.value for value in values if isinstance(value, ast.Constant)]
        if len(strings) != len(values) or not strings or any("experts" in str(string) for string in strings):
            yield part


def _is_same_plan(part: PlanPart, target: AssignmentTarget) -> bool:
    """Return whether a part is a plan of the same object, or a local name for the plan."""
    if isinstance(part.node, ast.Name):
        is_alias = part.node.id in target.scope.aliases
        return is_alias or (part.node.id == target.attribute and not target.scope.function)
    plan = target.scope.resolve_named_plan(part.node)
    return plan is not None and plan[0] == target.class_name


def _is_parent_plan(node: ast.AST, target: AssignmentTarget) -> bool:
    """Return whether an expression is a plan of another kind of object, as models add the plan of their configuration.

    The keys of such a plan under other names count, too.
    """
    plan = target.scope.resolve_named_plan(find_renamed_plan(node) or node)
    return find_renamed_plan(node) is not None or (plan is not None and plan[1] != target.attribute)


def _can_both_apply(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    return not any(replace(condition, holds=not condition.holds) in other for condition in one)


def mention_experts(node: ast.AST, source: SourceFile, definitions: Definitions) -> bool:
    """Return whether an expression, or what defines the names in it, contains the word `experts`."""
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
