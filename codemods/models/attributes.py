"""What the attributes of a model's classes may hold, resolved from the statements that assign them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from codemods.models.modeling import Assigned, ModelingSource, Outside
from codemods.models.module_text import ClassSource
from codemods.models.value_kinds import format_dotted_path

__all__ = ["AttributeResolver", "Node"]

_MAX_NAME_DEPTH = 6  # names that stand for other names before a value counts as unknown
_AFTER_TARGETS = (b" =", b":", b"=", b"\t=", b".append(")
_BRACKET = re.compile(rb"[()\[\]{}\n]")
# A class that is instantiated with arguments that do not matter, unlike those of lists and parameters.
_INSTANTIATION = re.compile(rb"self\.\w+ = (?!nn\.(?:Parameter|ModuleList|ModuleDict|Sequential)\()(?:nn\.)?[A-Z]\w*\(")
_SIZED_FACTORIES = frozenset({"empty", "zeros", "ones", "rand", "randn", "Tensor", "FloatTensor"})
_ONE_DIM_FACTORIES = frozenset({"arange", "linspace"})
_SHAPE_PRESERVING = frozenset({"log", "exp", "float", "to", "clone", "contiguous", "normal_", "fill_", "uniform_"})

_NodeKind = Literal["class", "linear", "embedding", "list", "leaf", "parameter", "unknown"]
_KINDS: Mapping[str, _NodeKind] = {
    "Linear": "linear",
    "Embedding": "embedding",
    "ModuleList": "list",
    "ModuleDict": "list",
    "Sequential": "list",
}


@dataclass(frozen=True)
class Node:
    """What an attribute can hold.

    Args:
        kind: what it is; a `leaf` is a torch module that is neither a Linear nor an Embedding.
        definition: its class, None for anything but a class in the tree.
        rank: a parameter's number of dims, None where its shape does not show it.
        elements: what a list holds.
        where: the line that assigns something unknown: `modeling_toy.py:12`.
        reason: why it is unknown.
    """

    kind: _NodeKind
    definition: ClassSource | None = None
    rank: int | None = None
    elements: frozenset[Node] = frozenset()
    where: str = ""
    reason: str = ""


_UNKNOWN = Node("unknown", reason="takes a value that cannot be read")


class AttributeResolver:
    """Resolves what the attributes of a model's classes hold; each one is resolved once, when it is needed."""

    def __init__(self, source: ModelingSource) -> None:
        self.source = source
        self.resolve: Callable[[ClassSource, str], frozenset[Node]] = cache(self._resolve_attribute)

    def _resolve_attribute(self, owner: ClassSource, name: str) -> frozenset[Node]:
        """Return what instances of a class may hold under a name; nothing if no statement assigns it."""
        ancestry = self.source.find_ancestry(owner)
        statements = [(scope, offset) for scope in ancestry.classes for offset in scope.attributes.get(name, ())]
        nodes = [node for scope, offset in statements for node in self._resolve_located(scope, offset)]
        if statements:
            return _merge_lists(nodes)
        return frozenset(Node("unknown", where=owner.where, reason=reason) for reason in ancestry.unknown)

    def _resolve_located(self, scope: ClassSource, offset: int) -> Iterator[Node]:
        """Yield what a statement may assign, unknown values with the statement's line."""
        try:
            nodes = list(self._resolve_statement(scope, offset, 0))
        except RecursionError:  # an expression nested deeper than anyone writes
            nodes = [_UNKNOWN]
        yield from _locate_unknown(nodes, scope.format_line(offset)) if _has_unknown(nodes) else nodes

    def _resolve_statement(self, scope: ClassSource, offset: int, depth: int) -> Iterable[Node]:
        match _parse_statement_at(scope.data, offset):
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                return self._resolve_expression(value, scope, depth)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append" | "extend", value=owner), args=[value])):
                nodes = frozenset(self._resolve_expression(value, scope, depth))
                return nodes if isinstance(owner, ast.Name) else [Node("list", elements=nodes)]
            case ast.Expr(value=ast.Call(args=[_, value, *_])):
                return self._resolve_expression(value, scope, depth)
        return [_UNKNOWN]

    def _resolve_expression(self, value: ast.expr, scope: ClassSource, depth: int) -> Iterable[Node]:
        """Return what an expression may evaluate to; a class stands for its instances, a display for its elements."""
        match value:
            case ast.Constant():
                return []
            case ast.IfExp(body=body, orelse=orelse):
                return self._resolve_expressions([body, orelse], scope, depth)
            case ast.BoolOp(op=ast.And(), values=[*_, last]):  # what stands before it is only taken where it is false
                return self._resolve_expression(last, scope, depth)
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Tuple(elts=values) | ast.Dict(values=values):
                return self._resolve_expressions(values, scope, depth)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.DictComp(value=element):
                return self._resolve_expression(element, scope, depth)
            case ast.Starred(value=inner) | ast.Subscript(value=inner):
                return self._resolve_expression(inner, scope, depth)
            case ast.Name(id=name):
                return self._resolve_name(name, scope, depth)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if depth < _MAX_NAME_DEPTH:
                return self._resolve_own_attribute(name, scope, depth)
            case ast.Attribute():
                return self._resolve_name(format_dotted_path(value), scope, depth)
            case ast.Call():
                return self._resolve_call(value, scope, depth)
        return [_UNKNOWN]

    def _resolve_expressions(self, values: Sequence[ast.expr], scope: ClassSource, depth: int) -> Iterator[Node]:
        for value in values:
            yield from self._resolve_expression(value, scope, depth)

    def _resolve_own_attribute(self, name: str, scope: ClassSource, depth: int) -> Iterator[Node]:
        """Yield what another attribute of the same class may hold, known only if the class itself assigns it."""
        offsets = scope.attributes.get(name, ())
        for offset in offsets:
            yield from self._resolve_statement(scope, offset, depth + 1)
        if not offsets:
            yield Node("unknown", reason=f"takes `self.{name}`, which the class does not assign")

    def _resolve_name(self, name: str, scope: ClassSource, depth: int) -> Iterator[Node]:
        """Yield what a name may stand for: a local variable, else what the file binds or imports."""
        if not name or depth >= _MAX_NAME_DEPTH:
            yield _UNKNOWN
            return
        local = _find_local_offsets(scope, name)
        for offset in local:
            yield from self._resolve_values(scope, offset, depth)
        if local and _is_bound_otherwise(scope, name):
            yield Node("unknown", reason=f"takes `{name}`, which is bound in more ways than are read")
        for meaning in self.source.resolve(scope.path, name) if not local else ():
            match meaning:
                case ClassSource():
                    yield self._build_instance(meaning)
                case Assigned(scope=module, offset=offset):
                    yield from self._resolve_values(module, offset, depth)
                case Outside(reason=reason):
                    yield Node("unknown", reason=f"takes `{name}`, which {reason or 'is not read'}")

    def _resolve_values(self, scope: ClassSource, offset: int, depth: int) -> Iterable[Node]:
        value = _get_value(_parse_statement_at(scope.data, offset))
        return [_UNKNOWN] if value is None else self._resolve_expression(value, scope, depth + 1)

    def _resolve_call(self, call: ast.Call, scope: ClassSource, depth: int) -> Iterable[Node]:
        dotted = self._find_framework_name(format_dotted_path(call.func), scope)
        name = dotted.rpartition(".")[2]
        if name == "Parameter":
            return [Node("parameter", rank=self._find_rank(call.args[0], scope, depth) if call.args else None)]
        if dotted.startswith("torch.nn.") and not dotted.startswith("torch.nn.functional."):
            kind = _KINDS.get(name, "leaf")
            elements = self._resolve_expressions(call.args, scope, depth) if kind == "list" else ()
            return [Node(kind, elements=frozenset(elements))]
        if dotted:
            return [Node("parameter", rank=self._find_rank(call, scope, depth))]
        return self._resolve_expression(call.func, scope, depth)

    def _find_framework_name(self, name: str, scope: ClassSource) -> str:
        """Return the full name of something in torch, empty for anything else."""
        if not name or name.startswith("self."):
            return ""
        meanings = self.source.resolve(scope.path, name)
        dotted = {meaning.dotted if isinstance(meaning, Outside) and not meaning.reason else "" for meaning in meanings}
        return next(iter(dotted)) if len(dotted) == 1 and all(one.startswith("torch.") for one in dotted) else ""

    def _build_instance(self, definition: ClassSource) -> Node:
        """Return an instance of a class; one of a class derived from `nn.Linear` counts as a Linear."""
        bases = sorted(base.rpartition(".")[2] for base in self.source.find_ancestry(definition).external)
        return Node(next((_KINDS[base] for base in bases if base in _KINDS), "class"), definition)

    def _find_rank(self, value: ast.expr, scope: ClassSource, depth: int) -> int | None:
        """Return a tensor expression's number of dims, None where its text does not show it."""
        match value:
            case ast.Call(func=ast.Attribute(attr=name)) if name in _ONE_DIM_FACTORIES:
                return 1
            case ast.Call(func=ast.Attribute(attr="full"), args=[ast.Tuple(elts=dims), *_]):
                return len(dims)
            case ast.Call(func=ast.Attribute(attr=name)) if name in _SIZED_FACTORIES:
                return _count_dims(value)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), args=[inner, *_]):
                return self._find_rank(inner, scope, depth) if name in _SHAPE_PRESERVING else None
            case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in _SHAPE_PRESERVING:
                return self._find_rank(inner, scope, depth)
            case ast.BinOp(left=left, right=right):
                return self._find_rank(left, scope, depth) or self._find_rank(right, scope, depth)
            case ast.Name(id=name) if depth < _MAX_NAME_DEPTH:
                values = [_get_value(_parse_statement_at(scope.data, one)) for one in _find_local_offsets(scope, name)]
                ranks = {self._find_rank(value, scope, depth + 1) for value in values if value is not None}
                return ranks.pop() if len(ranks) == 1 else None
        return None


def _count_dims(call: ast.Call) -> int | None:
    sizes = [keyword.value for keyword in call.keywords if keyword.arg in ("size", "shape")] or call.args
    if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
        sizes = sizes[0].elts
    return None if not sizes or any(isinstance(size, ast.Starred) for size in sizes) else len(sizes)


def _merge_lists(nodes: Iterable[Node]) -> frozenset[Node]:
    """Return the nodes with their lists merged into one: a list is often created empty and filled later."""
    distinct = frozenset(nodes)
    lists = [node for node in distinct if node.kind == "list" and node.definition is None]
    if len(lists) < 2:
        return distinct
    elements = frozenset(element for node in lists for element in node.elements)
    return distinct.difference(lists) | {Node("list", elements=elements)}


def _has_unknown(nodes: Iterable[Node]) -> bool:
    return any((node.kind == "unknown" and not node.where) or _has_unknown(node.elements) for node in nodes)


def _locate_unknown(nodes: Iterable[Node], where: str) -> Iterator[Node]:
    """Yield the nodes, unknown ones with the line that assigns them."""
    for node in nodes:
        if node.kind == "unknown" and not node.where:
            node = replace(node, where=where)
        yield replace(node, elements=frozenset(_locate_unknown(node.elements, where))) if node.elements else node


def _find_local_offsets(scope: ClassSource, name: str) -> list[int]:
    """Return the offsets of the statements of a class's methods that assign or append to a variable."""
    encoded = name.encode(errors="replace")
    if not any(scope.data.find(encoded + follows, scope.start, scope.end) >= 0 for follows in _AFTER_TARGETS):
        return []
    assignment = rb"\n[ \t]+%b(?:(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)|\.append\()" % re.escape(encoded)
    return [match.start() + 1 for match in re.compile(assignment).finditer(scope.data, scope.start, scope.end)]


def _is_bound_otherwise(scope: ClassSource, name: str) -> bool:
    """Return whether a variable of a class's methods may also be bound by a loop, a tuple, `with` or `:=`."""
    word = rb"(?<![\w.])%b\b" % re.escape(name.encode())
    binding = rb"%b[ \t]*(?::=|,[^=\n()]*=(?!=))|,[ \t]*%b[ \t]*=(?!=)|\bfor\b[^\n]*%b[^\n]*\bin\b|\bas %b"
    return re.compile(binding % ((word,) * 4)).search(scope.data, scope.start, scope.end) is not None


def _get_value(statement: ast.stmt | None) -> ast.expr | None:
    match statement:
        case ast.Assign(value=value) | ast.AnnAssign(value=value) | ast.Expr(value=ast.Call(args=[value])):
            return value
    return None


def _parse_statement_at(data: bytes, start: int) -> ast.stmt | None:
    """Parse the statement that begins at an offset and ends at the first line end outside brackets."""
    depth = 0
    end = len(data)
    closed = None
    for match in _BRACKET.finditer(data, start):
        if match[0] in b"([{":
            depth += 1
        elif match[0] in b")]}":
            depth -= 1
            closed = match.end() if depth == 0 and closed is None else closed
        elif depth <= 0:
            end = match.start()
            break
    text = data[start:end].strip()
    instantiation = _INSTANTIATION.match(text) if closed == end else None
    return _parse_statement(instantiation[0] + b")" if instantiation else text)


@cache
def _parse_statement(statement: bytes) -> ast.stmt | None:
    """Parse a statement, cached because models repeat half of theirs."""
    try:
        return ast.parse(statement).body[0]
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        return None
