"""From an expression that makes a plan to literals: one for each set of conditions, and for each constant it uses."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from codemods.entries import Entry, read_entries, span, unreadable
from codemods.module import Condition, PlanLiteral, Unread, is_plan_attribute
from codemods.names import Definitions
from codemods.pieces import Piece, mentions_plan, pieces
from codemods.sources import Source

__all__ = ["Target", "written"]

_NEAR = 200  # bytes before a key in which what opens it is looked for


@dataclass(frozen=True)
class Target:
    """What an expression is put into.

    Args:
        class_name: the class around, empty outside of classes.
        attribute: the plan.
        function: the function around, empty in a class body.
        conditions: those around.
        assigned: whether the expression becomes the plan itself, rather than being added to it.
        names: local names that stand for a plan.
    """

    class_name: str
    attribute: str
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    assigned: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Sources:
    """Where the entries of an expression come from.

    Args:
        nodes: by conditions and constant, empty for the expression itself, what writes entries.
        elsewhere: the conditions under which entries come from elsewhere.
        unread: what brings entries that nobody here can read.
        own: whether it takes over the plan as it was.
    """

    nodes: dict[tuple[tuple[Condition, ...], str], list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    elsewhere: list[tuple[Condition, ...]] = field(default_factory=list)
    unread: list[ast.AST] = field(default_factory=list)
    own: bool = False


def written(
    node: ast.expr | ast.stmt, target: Target, source: Source, definitions: Definitions
) -> Iterator[PlanLiteral | Unread]:
    """Yield what an expression, or an item assignment, writes into a plan, and what of it cannot be read.

    Args:
        node: the expression or statement.
        target: what it is put into.
        source: the file.
        definitions: of the file's names.
    """
    sources = _Sources()
    _collect(node, "", (), sources, target, definitions)
    for (conditions, constant), nodes in sources.nodes.items():
        entries = tuple(_placed(entry, source) for entry in read_entries(nodes, source.offset))
        if entries or nodes[0] is node:
            yield PlanLiteral(
                target.class_name,
                target.attribute,
                getattr(nodes[0] if conditions or constant else node, "lineno", 1),
                entries,
                target.function,
                (*target.conditions, *conditions),
                takes_in=not constant and any(_can_both_apply(conditions, other) for other in sources.elsewhere),
                replaces=target.assigned and not sources.own,
            )
    if sources.unread and is_plan_attribute(target.attribute):
        experts = any(_speaks_of_experts(part, source, definitions) for part in sources.unread)
        yield Unread(target.class_name, target.attribute, getattr(node, "lineno", 1), experts)


def _collect(
    node: ast.AST,
    constant: str,
    around: tuple[Condition, ...],
    sources: _Sources,
    target: Target,
    definitions: Definitions,
) -> None:
    for piece in pieces(node, around):
        value = None if piece.writes else definitions.constant(piece.node)
        if piece.writes:
            sources.nodes[piece.conditions, constant].append(piece.node)
            sources.unread += unreadable(piece.node)
        elif _is_own(piece, target):
            sources.own = True
        elif value is not None and not mentions_plan(piece.node):
            _collect(value, ast.unparse(piece.node), piece.conditions, sources, target, definitions)
        else:
            sources.elsewhere.append(piece.conditions)
            sources.unread += [] if mentions_plan(piece.node) else [piece.node]


def _is_own(piece: Piece, target: Target) -> bool:
    """Say whether a piece is a plan of the same object, or a local name that stands for the plan."""
    match piece.node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return is_plan_attribute(name)
        case ast.Name(id=name):
            return name in target.names
    return False


def _can_both_apply(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    return not any(replace(condition, holds=not condition.holds) in other for condition in one)


def _speaks_of_experts(node: ast.AST, source: Source, definitions: Definitions) -> bool:
    return any(b"experts" in source.body[slice(*span(part, source.offset))] for part in definitions.behind(node))


def _placed(entry: Entry, source: Source) -> Entry:
    """Take back what the text around an entry forbids.

    Nothing can precede a key in parentheses: it would land inside of them. A comment in a key or style would be lost.
    """
    start, end = entry.key_span
    opened = source.body[max(0, start - _NEAR) : start].rstrip().endswith(b"(")
    return replace(
        entry,
        can_precede=entry.can_precede and not opened and b"#" not in source.body[start:end],
        replaceable=entry.replaceable and b"#" not in source.body[slice(*entry.style_span)],
    )
