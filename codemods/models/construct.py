"""What an assignment in modeling source constructs, told from its text: modules, lists of them, parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from codemods.models.modeling import KINDS, UNKNOWN, ClassSource, ModelingSource, Node

__all__ = ["AttributeResolver"]

_BRACKET = re.compile(rb"[()\[\]{}\n]")
# An instance of a class whose arguments say nothing of it, as those of lists and parameters do.
_INSTANTIATION = re.compile(rb"self\.\w+ = (?!nn\.(?:Parameter|ModuleList|ModuleDict|Sequential)\()(?:nn\.)?[A-Z]\w*\(")
_MAX_DEPTH = 6  # names looked up one through another before a value counts as unknown
_SIZED_FACTORIES = frozenset({"empty", "zeros", "ones", "rand", "randn", "Tensor", "FloatTensor"})
_ONE_DIM_FACTORIES = frozenset({"arange", "linspace"})
_SHAPE_PRESERVING = frozenset({"log", "exp", "float", "to", "clone", "contiguous", "normal_", "fill_", "uniform_"})


class AttributeResolver:
    """Answers what the attributes of a model folder's classes hold; each is read once, and only when asked for."""

    def __init__(self, source: ModelingSource) -> None:
        self.source = source
        self.resolve: Callable[[str, str], frozenset[Node]] = cache(self._resolve_attribute)

    def _resolve_attribute(self, owner: str, name: str) -> frozenset[Node]:
        """Return what instances of a class may hold under a name: nothing if no statement gives it to them."""
        lineage = self.source.mro(owner)
        statements = [(definition, place) for definition in lineage for place in definition.attributes.get(name, ())]
        try:
            nodes = [node for scope, place in statements for node in self._resolve_statement(scope, place, 0)]
        except RecursionError:  # an expression nested deeper than anyone writes
            nodes = [UNKNOWN]
        if statements:
            return _merge_lists(nodes)
        return frozenset({UNKNOWN}) if self.source.external_bases(owner) & self.source.imported_names else frozenset()

    def _resolve_statement(self, scope: ClassSource, offset: int, depth: int) -> Iterable[Node]:
        match _parse_statement_at(scope.data, offset):
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                return self._resolve_expression(value, scope, depth)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append" | "extend", value=held), args=[value])):
                nodes = frozenset(self._resolve_expression(value, scope, depth))
                return nodes if isinstance(held, ast.Name) else [Node("list", elements=nodes)]
            case ast.Expr(value=ast.Call(args=[_, value, *_])):
                return self._resolve_expression(value, scope, depth)
        return [UNKNOWN]

    def _resolve_expression(self, value: ast.expr, scope: ClassSource, depth: int) -> Iterable[Node]:
        """Yield what an expression may be; a class counts as its instances, a display as its elements."""
        match value:
            case ast.Constant():
                return []
            case ast.IfExp(body=body, orelse=orelse):
                return self._resolve_expressions([body, orelse], scope, depth)
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Tuple(elts=values) | ast.Dict(values=values):
                return self._resolve_expressions(values, scope, depth)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.DictComp(value=element):
                return self._resolve_expression(element, scope, depth)
            case ast.Starred(value=inner) | ast.Subscript(value=inner):
                return self._resolve_expression(inner, scope, depth)
            case ast.Name(id=name):
                return self._resolve_name(name, scope, depth)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if depth < _MAX_DEPTH:
                places = scope.attributes.get(name, ())
                return self._resolve_statement(scope, places[0], depth + 1) if places else [UNKNOWN]
            case ast.Call():
                return self._resolve_call(value, scope, depth)
        return [UNKNOWN]

    def _resolve_expressions(self, values: Sequence[ast.expr], scope: ClassSource, depth: int) -> Iterator[Node]:
        for value in values:
            yield from self._resolve_expression(value, scope, depth)

    def _resolve_name(self, name: str, scope: ClassSource, depth: int) -> Iterable[Node]:
        if name in self.source.classes:
            return [self._build_instance(name)]
        values = _find_assigned_values(scope, name) if depth < _MAX_DEPTH else ()
        return self._resolve_expressions(values, scope, depth + 1) if values else [UNKNOWN]

    def _resolve_call(self, call: ast.Call, scope: ClassSource, depth: int) -> Iterable[Node]:
        match call.func:
            case ast.Attribute(value=ast.Name(id="nn") | ast.Attribute(attr="nn"), attr="Parameter"):
                return [Node("parameter", rank=self._find_rank(call.args[0], scope, depth) if call.args else None)]
            case ast.Attribute(value=ast.Name(id="nn") | ast.Attribute(attr="nn"), attr=name):
                kind = KINDS.get(name, "leaf")
                held = self._resolve_expressions(call.args, scope, depth) if kind == "list" else ()
                return [Node(kind, elements=frozenset(held))]
            case ast.Attribute(value=ast.Name(id=name)) if name in self.source.classes:
                return [self._build_instance(name)]
            case ast.Attribute(value=ast.Name(id="torch")):
                return [Node("parameter", rank=self._find_rank(call, scope, depth))]
            case func:
                return self._resolve_expression(func, scope, depth)

    def _build_instance(self, name: str) -> Node:
        return Node(self.source.get_kind(name), name)

    def _find_rank(self, value: ast.expr, scope: ClassSource, depth: int) -> int | None:
        """Return the number of dims of a tensor expression, None where its text does not show it."""
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
            case ast.Name(id=name) if depth < _MAX_DEPTH:
                ranks = {self._find_rank(found, scope, depth + 1) for found in _find_assigned_values(scope, name)}
                return ranks.pop() if len(ranks) == 1 else None
        return None


def _count_dims(call: ast.Call) -> int | None:
    sizes = [keyword.value for keyword in call.keywords if keyword.arg in ("size", "shape")] or call.args
    if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
        sizes = sizes[0].elts
    return None if not sizes or any(isinstance(size, ast.Starred) for size in sizes) else len(sizes)


def _merge_lists(nodes: Iterable[Node]) -> frozenset[Node]:
    """Return the nodes as a set, its lists made one: a list is often made empty and filled later."""
    found = frozenset(nodes)
    lists = [node for node in found if node.kind == "list" and not node.name]
    if len(lists) < 2:
        return found
    elements = frozenset(element for one in lists for element in one.elements)
    return found.difference(lists) | {Node("list", elements=elements)}


def _find_assigned_values(scope: ClassSource, name: str) -> tuple[ast.expr, ...]:
    """Return what a class's methods assign or append to a variable, else what its module assigns to it."""
    rest = rb"(?:(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)|\.append\()"
    inside = re.compile(rb"^[ \t]+" + re.escape(name.encode()) + rest, re.MULTILINE).finditer(
        scope.data, scope.start, scope.end
    )
    places = [match.start() for match in inside]
    if not places:
        outside = re.compile(rb"^" + re.escape(name.encode()) + rest, re.MULTILINE).finditer(scope.data)
        places = [match.start() for match in outside]
    values = (_get_value(_parse_statement_at(scope.data, place)) for place in places)
    return tuple(value for value in values if value is not None)


def _get_value(statement: ast.stmt | None) -> ast.expr | None:
    match statement:
        case ast.Assign(value=value) | ast.AnnAssign(value=value) | ast.Expr(value=ast.Call(args=[value])):
            return value
    return None


def _parse_statement_at(data: bytes, start: int) -> ast.stmt | None:
    """Parse the one statement that begins at a place: up to the first line end outside brackets."""
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
    made = _INSTANTIATION.match(text) if closed == end else None
    return _parse_statement(made[0] + b")" if made else text)


@cache
def _parse_statement(statement: bytes) -> ast.stmt | None:
    """Parse a statement; models write half of theirs alike."""
    try:
        return ast.parse(statement).body[0]
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        return None
