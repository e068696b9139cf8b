"""What a plan key names, worked out from the model's own modeling source.

A key is walked part by part: from a class to what its attributes hold, which is read from the assignments in its
methods. Only the statements on that way are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from codemods.models.modeling import ELEMENT, ClassSource, ModelingSource, load_modeling
from plans.model_facts import KeyTarget, TargetKind

__all__ = ["Model", "describe"]

_MAX_KEY_DEPTH = 64  # parts of a key; no model nests like that
_MAX_NAME_DEPTH = 6  # names that stand for other names before a value counts as unknown
_WEIGHT_RANK = 2
_STACKED_RANK = 3
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
class _Node:
    """What an attribute can hold.

    Args:
        kind: what it is; a `leaf` is a torch module that is neither a Linear nor an Embedding.
        name: the class's name, empty for anything but a class of the model.
        rank: a parameter's number of dims, None where its shape does not show it.
        elements: what a list holds.
    """

    kind: _NodeKind
    name: str = ""
    rank: int | None = None
    elements: frozenset[_Node] = frozenset()


_UNKNOWN = _Node("unknown")


class Model:
    """Answers what plan keys name in one model.

    Args:
        folder: the model's folder, whose modeling files are read now.

    Raises:
        SourceError: a modeling file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._source = load_modeling(folder)
        self._attributes = _AttributeResolver(self._source)
        self.find_nodes = cache(self._walk_key)

    def describe(self, key: str, class_name: str = "") -> KeyTarget | None:
        """Return what a key names, None where the source does not show it or shows two different things.

        Args:
            key: a plan key, relative to any class of the model: `layers.*.self_attn.q_proj`.
            class_name: the class that has the plan; it decides where a key means different things in text and vision
                models.
        """
        targets = self._describe_nodes(self.find_nodes(key, ""))
        if len(targets) != 1 and class_name:
            targets = self._describe_nodes(self.find_nodes(key, class_name))
        return targets.pop() if len(targets) == 1 else None

    def can_exist(self, key: str) -> bool:
        """Return whether any class of the model could create what a key names; True if no class could be read."""
        return not self._source.classes or bool(self.find_nodes(key, ""))

    def _walk_key(self, key: str, class_name: str) -> frozenset[_Node]:
        """Return what a key leads to, starting from the classes that it may be relative to."""
        owner, _, part = key.rpartition(".")
        if owner.count(".") > _MAX_KEY_DEPTH:
            return frozenset()
        nodes = self.find_nodes(owner, class_name) if owner else self._find_roots(part, class_name)
        return frozenset(node for start in nodes for node in self._follow_part(start, part))

    def _find_roots(self, part: str, class_name: str) -> frozenset[_Node]:
        """Return the classes that a key beginning with `part` may be relative to.

        They are the named class itself or those that take it as their `config`; without a name, all classes. Those that
        inherit from other models could have any attribute, so they count only if no class assigns this one.
        """
        classes = self._source.classes
        takes_config = re.compile(rb"\bconfig: [\w| ]*\b" + re.escape(class_name.encode()) + rb"\b")
        names = (
            [class_name]
            if class_name in classes
            else [
                owner.name
                for owner in classes.values()
                if not class_name or takes_config.search(owner.data, owner.start, owner.end)
            ]
        )
        assigning = [name for name in names if any(one.has_attribute(part) for one in self._source.mro(name))]
        return frozenset(_Node("class", name) for name in assigning or names)

    def _describe_nodes(self, nodes: frozenset[_Node]) -> set[KeyTarget]:
        targets = map(self._build_target, sorted(nodes - {_UNKNOWN}, key=str))
        return set({(target.kind, target.ndim): target for target in targets}.values())

    def _follow_part(self, node: _Node, part: str) -> Iterable[_Node]:
        is_index = part == "*" or part.isdecimal()
        if node.kind == "unknown":
            return [_UNKNOWN]
        if node.kind == "list":
            return node.elements | self._read_attribute(node, ELEMENT if is_index else part)
        if node.kind in ("linear", "embedding") and part in ("weight", "bias"):
            return [_Node("parameter", rank=_WEIGHT_RANK if part == "weight" else 1)]
        if node.kind == "leaf":
            return [_Node("parameter")] if part in ("weight", "bias") else []
        return self._read_attribute(node, part)

    def _read_attribute(self, node: _Node, part: str) -> frozenset[_Node]:
        return self._attributes.resolve(node.name, part) if node.name else frozenset()

    def _build_target(self, node: _Node) -> KeyTarget:
        return KeyTarget(self._classify_node(node), node.rank, self._locate(node))

    def _classify_node(self, node: _Node) -> TargetKind:
        match node.kind:
            case "linear" | "embedding" | "parameter":
                return node.kind
            case "class" if any(held.rank == _STACKED_RANK for held in self._iter_attribute_nodes(node.name)):
                return "experts"
        return "module"

    def _iter_attribute_nodes(self, name: str) -> Iterator[_Node]:
        for definition in self._source.mro(name):
            for attribute in definition.attributes:
                yield from self._attributes.resolve(name, attribute)

    def _locate(self, node: _Node) -> str:
        definition = self._source.classes.get(node.name)
        return f"{definition.path.name}:{definition.name}" if definition else ""


def describe(folder: Path, key: str, class_name: str = "") -> KeyTarget | None:
    """Return what a plan key names in a model, None where its source does not show it.

    Args:
        folder: the model's folder.
        key: the plan key.
        class_name: the class that has the plan.
    """
    return _load_model(folder, load_modeling(folder)).describe(key, class_name)


@lru_cache(maxsize=1024)
def _load_model(folder: Path, _source: ModelingSource) -> Model:
    return Model(folder)


class _AttributeResolver:
    """Resolves what the attributes of a model's classes hold; each one is resolved once, when it is needed."""

    def __init__(self, source: ModelingSource) -> None:
        self.source = source
        self.resolve: Callable[[str, str], frozenset[_Node]] = cache(self._resolve_attribute)

    def _resolve_attribute(self, owner: str, name: str) -> frozenset[_Node]:
        """Return what instances of a class may hold under a name; nothing if no statement assigns it."""
        statements = [(scope, offset) for scope in self.source.mro(owner) for offset in scope.attributes.get(name, ())]
        try:
            nodes = [node for scope, offset in statements for node in self._resolve_statement(scope, offset, 0)]
        except RecursionError:  # an expression nested deeper than anyone writes
            nodes = [_UNKNOWN]
        if statements:
            return _merge_lists(nodes)
        return frozenset({_UNKNOWN}) if self.source.inherits_unread(owner) else frozenset()

    def _resolve_statement(self, scope: ClassSource, offset: int, depth: int) -> Iterable[_Node]:
        match _parse_statement_at(scope.data, offset):
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                return self._resolve_expression(value, scope, depth)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append" | "extend", value=owner), args=[value])):
                nodes = frozenset(self._resolve_expression(value, scope, depth))
                return nodes if isinstance(owner, ast.Name) else [_Node("list", elements=nodes)]
            case ast.Expr(value=ast.Call(args=[_, value, *_])):
                return self._resolve_expression(value, scope, depth)
        return [_UNKNOWN]

    def _resolve_expression(self, value: ast.expr, scope: ClassSource, depth: int) -> Iterable[_Node]:
        """Return what an expression may evaluate to; a class stands for its instances, a display for its elements."""
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
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if depth < _MAX_NAME_DEPTH:
                offsets = scope.attributes.get(name, ())
                return self._resolve_statement(scope, offsets[0], depth + 1) if offsets else [_UNKNOWN]
            case ast.Call():
                return self._resolve_call(value, scope, depth)
        return [_UNKNOWN]

    def _resolve_expressions(self, values: Sequence[ast.expr], scope: ClassSource, depth: int) -> Iterator[_Node]:
        for value in values:
            yield from self._resolve_expression(value, scope, depth)

    def _resolve_name(self, name: str, scope: ClassSource, depth: int) -> Iterable[_Node]:
        if name in self.source.classes:
            return [self._build_instance(name)]
        values = _find_assigned_values(scope, name) if depth < _MAX_NAME_DEPTH else ()
        return self._resolve_expressions(values, scope, depth + 1) if values else [_UNKNOWN]

    def _resolve_call(self, call: ast.Call, scope: ClassSource, depth: int) -> Iterable[_Node]:
        match call.func:
            case ast.Attribute(value=ast.Name(id="nn") | ast.Attribute(attr="nn"), attr="Parameter"):
                return [_Node("parameter", rank=self._find_rank(call.args[0], scope, depth) if call.args else None)]
            case ast.Attribute(value=ast.Name(id="nn") | ast.Attribute(attr="nn"), attr=name):
                kind = _KINDS.get(name, "leaf")
                elements = self._resolve_expressions(call.args, scope, depth) if kind == "list" else ()
                return [_Node(kind, elements=frozenset(elements))]
            case ast.Attribute(value=ast.Name(id=name)) if name in self.source.classes:
                return [self._build_instance(name)]
            case ast.Attribute(value=ast.Name(id="torch")):
                return [_Node("parameter", rank=self._find_rank(call, scope, depth))]
            case func:
                return self._resolve_expression(func, scope, depth)

    def _build_instance(self, name: str) -> _Node:
        """Return an instance of a class; one of a class derived from `nn.Linear` counts as a Linear."""
        bases = sorted(self.source.external_bases(name))
        return _Node(next((_KINDS[base] for base in bases if base in _KINDS), "class"), name)

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
                ranks = {self._find_rank(assigned, scope, depth + 1) for assigned in _find_assigned_values(scope, name)}
                return ranks.pop() if len(ranks) == 1 else None
        return None


def _count_dims(call: ast.Call) -> int | None:
    sizes = [keyword.value for keyword in call.keywords if keyword.arg in ("size", "shape")] or call.args
    if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
        sizes = sizes[0].elts
    return None if not sizes or any(isinstance(size, ast.Starred) for size in sizes) else len(sizes)


def _merge_lists(nodes: Iterable[_Node]) -> frozenset[_Node]:
    """Return the nodes with their lists merged into one: a list is often created empty and filled later."""
    distinct = frozenset(nodes)
    lists = [node for node in distinct if node.kind == "list" and not node.name]
    if len(lists) < 2:
        return distinct
    elements = frozenset(element for node in lists for element in node.elements)
    return distinct.difference(lists) | {_Node("list", elements=elements)}


def _find_assigned_values(scope: ClassSource, name: str) -> tuple[ast.expr, ...]:
    """Return what a class's methods assign or append to a variable, else what its module assigns to it."""
    assignment = re.escape(name.encode()) + rb"(?:(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)|\.append\()"
    inside = re.compile(rb"^[ \t]+" + assignment, re.MULTILINE)
    offsets = [match.start() for match in inside.finditer(scope.data, scope.start, scope.end)]
    if not offsets:
        outside = re.compile(rb"^" + assignment, re.MULTILINE)
        offsets = [match.start() for match in outside.finditer(scope.data)]
    values = (_get_value(_parse_statement_at(scope.data, offset)) for offset in offsets)
    return tuple(value for value in values if value is not None)


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
