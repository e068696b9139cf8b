"""From an expression that makes a plan to literals: one for each set of conditions, and for each constant it uses."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from codemods.files.sources import Source
from codemods.reading.entries import Entry, read_entries, span, unreadable
from codemods.reading.module import Condition, Hold, PlanLiteral, Taken, Unread
from codemods.reading.names import Definitions
from codemods.reading.pieces import Piece, mentions_plan, pieces
from codemods.reading.plan_names import is_plan_attribute
from codemods.reading.scope import Scope
from plans.decompose import decided_with
from plans.plan import is_expert_parallel

__all__ = ["Target", "written"]

_NEAR = 200  # bytes before a key in which what opens it is looked for


@dataclass(frozen=True)
class Target:
    """What an expression is put into.

    Args:
        class_name: the class whose plan it is, empty outside of classes.
        attribute: the plan.
        scope: where the expression stands.
        assigned: whether the expression becomes the plan itself, rather than being added to it.
    """

    class_name: str
    attribute: str
    scope: Scope = field(default_factory=Scope)
    assigned: bool = False


@dataclass
class _Sources:
    """Where the entries of an expression come from.

    Args:
        nodes: by conditions and constant, empty for the expression itself, what writes entries.
        elsewhere: what brings entries from elsewhere.
        unread: what brings entries that nobody here can read.
        taken: plans that are taken over, by class and attribute, with the piece that names them.
        own: whether it takes over the plan as it was.
    """

    nodes: dict[tuple[tuple[Condition, ...], str], list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    elsewhere: list[Piece] = field(default_factory=list)
    unread: list[ast.AST] = field(default_factory=list)
    taken: list[tuple[tuple[str, str], Piece]] = field(default_factory=list)
    own: bool = False


def written(
    node: ast.expr | ast.stmt, target: Target, source: Source, definitions: Definitions
) -> Iterator[PlanLiteral | Taken | Unread | Hold]:
    """Yield what an expression, or an item assignment, writes into a plan or takes over, and what that does to others.

    Args:
        node: the expression or statement.
        target: what it is put into.
        source: the file.
        definitions: of the file's names.
    """
    sources = _Sources()
    _collect(node, "", (), sources, target, definitions)
    literals = list(_literals(node, sources, target, source))
    yield from literals
    yield from _taken(node, sources, target, source)
    yield from _holds(sources, target, sorted({decided_with(entry.key) for one in literals for entry in one.entries}))
    if sources.unread and is_plan_attribute(target.attribute):
        experts = any(_speaks_of_experts(part, source, definitions) for part in sources.unread)
        shared = any(definitions.defined(part, target.scope.home_of(part)) for part in sources.unread)
        why = "from a name that is used or assigned more than once" if shared else "that cannot be read"
        yield Unread(target.class_name, target.attribute, getattr(node, "lineno", 1), experts, why)


def _literals(node: ast.expr | ast.stmt, sources: _Sources, target: Target, source: Source) -> Iterator[PlanLiteral]:
    """Yield a literal for every set of conditions and every constant; in each case the first replaces the plan."""
    before: list[tuple[Condition, ...]] = []
    for (conditions, constant), nodes in sources.nodes.items():
        beside = [piece for piece in sources.elsewhere if _can_both_apply(conditions, piece.conditions)]
        last = max((span(piece.node, source.offset)[0] for piece in beside if not constant), default=0)
        entries = tuple(_placed(entry, source, last) for entry in read_entries(nodes, source.offset))
        replaces = target.assigned and not sources.own and not any(_can_both_apply(conditions, one) for one in before)
        if entries or nodes[0] is node:
            before.append(conditions)
            yield PlanLiteral(
                target.class_name,
                target.attribute,
                getattr(nodes[0] if conditions or constant else node, "lineno", 1),
                entries,
                target.scope.function,
                (*target.scope.conditions, *conditions),
                takes_in=not constant and bool(beside),
                replaces=replaces,
            )


def _taken(node: ast.AST, sources: _Sources, target: Target, source: Source) -> Iterator[Taken]:
    """Yield what brings entries from elsewhere, or under keys that cannot be read.

    Of what is taken in part only the whole expression tells; it replaces the plan where no display does.
    """
    filtered = [piece for _, piece in sources.taken if piece.partial and piece not in sources.elsewhere]
    parts = [(one.conditions, node if one.partial else one.node) for one in (*sources.elsewhere, *filtered)]
    hidden = [(conditions, one) for (conditions, _), nodes in sources.nodes.items() for one in nodes if unreadable(one)]
    for conditions, part in (*parts, *hidden):
        start, _ = span(part, source.offset)
        yield Taken(
            target.class_name,
            target.attribute,
            getattr(part, "lineno", 1),
            start,
            ast.unparse(part),
            target.scope.function,
            (*target.scope.conditions, *conditions),
            replaces=target.assigned and not sources.own and not sources.nodes,
        )


def _holds(sources: _Sources, target: Target, changed: Iterable[str]) -> Iterator[Hold]:
    """Yield the plans that stay as they are, because only a part of them is taken over, or another plan is made."""
    for (class_name, attribute), piece in sources.taken:
        line = getattr(piece.node, "lineno", 1)
        if piece.partial:
            yield Hold(class_name, attribute, None, f"line {line} leaves some of its entries out")
        elif is_expert_parallel(target.attribute) and not is_expert_parallel(attribute):
            yield Hold(class_name, attribute, None, f"line {line} makes an expert-parallel plan of it")
        elif (class_name, attribute) != (target.class_name, target.attribute):
            for module in changed:
                yield Hold(class_name, attribute, module, f"line {line} takes it over and changes it")


def _collect(
    node: ast.AST,
    constant: str,
    around: tuple[Condition, ...],
    sources: _Sources,
    target: Target,
    definitions: Definitions,
) -> None:
    for piece in pieces(node, around):
        if piece.writes and not piece.partial:
            sources.nodes[piece.conditions, constant].append(piece.node)
            sources.unread += unreadable(piece.node)
            continue
        if plan := target.scope.named_plan(piece.node):
            sources.taken.append((plan, piece))
        homes = target.scope.home_of(piece.node)
        value = definitions.constant(piece.node, homes)
        if _is_own(piece, target):
            sources.own = True
        elif value is not None and not plan and not piece.partial:
            _collect(value, ast.unparse(piece.node), piece.conditions, sources, target, definitions)
        else:
            sources.elsewhere.append(piece)
            values = definitions.defined(piece.node, homes) if not plan else []
            sources.unread += [] if _is_known(piece, node, values, target) else [piece.node]


def _is_known(piece: Piece, whole: ast.AST, values: Iterable[ast.expr], target: Target) -> bool:
    """Say whether entries are read where they come from: they are another plan's, or whatever callers give."""
    if isinstance(piece.node, ast.Name) and piece.node.id in target.scope.given:
        return mentions_plan(piece.node) or (target.assigned and piece.node is whole)
    writes = piece.writes or any(one.writes for value in values for one in pieces(value))
    return mentions_plan(piece.node) and not writes


def _is_own(piece: Piece, target: Target) -> bool:
    """Say whether a piece is a plan of the same object, or a local name that stands for the plan."""
    match piece.node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return is_plan_attribute(name)
        case ast.Name(id=name):
            return name in target.scope.names
    return False


def _can_both_apply(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    return not any(replace(condition, holds=not condition.holds) in other for condition in one)


def _speaks_of_experts(node: ast.AST, source: Source, definitions: Definitions) -> bool:
    return any(b"experts" in source.body[slice(*span(part, source.offset))] for part in definitions.behind(node))


def _placed(entry: Entry, source: Source, last: int) -> Entry:
    """Take back what the text around an entry forbids.

    Nothing can precede a key in parentheses: it would land inside of them. A comment in a key or style would be lost.
    What comes from elsewhere, at `last`, may override any entry before it.
    """
    start, end = entry.key_span
    opened = source.body[max(0, start - _NEAR) : start].rstrip().endswith(b"(")
    return replace(
        entry,
        can_precede=entry.can_precede and not opened and b"#" not in source.body[start:end],
        replaceable=entry.replaceable and start >= last and b"#" not in source.body[slice(*entry.style_span)],
    )
