"""How a forward takes the outputs of its layers apart, read from its source, which is parsed and never run.

Several matrices may share one layer, such as query, key and value in a `qkv_proj`. What tells is not its name but its
forward: the layer's output is chunked, split, sliced or unbound along its features. Outputs are followed through local
names, methods of tensors, layers that are applied to them and methods of the same class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Split", "SplitKind", "find_splits"]

SplitKind = Literal["parts", "sizes", "blocks"]
"""`parts` are equal and one after the other, whatever their width (`chunk`). `blocks` are rows of a view of any length,
each of which is taken apart by itself. `sizes` are those of the whole output (`split`, slices, views of a fixed
length): no part of the output has them."""

_DIVIDING_METHODS = frozenset({"chunk", "tensor_split", "split", "split_with_sizes", "unbind", "narrow"})
_SHAPING_METHODS = frozenset({"view", "reshape", "unflatten"})
_FUNCTIONAL = frozenset({"torch", "F", "nn.functional", "torch.nn.functional"})
_COMBINING = frozenset({"bmm", "cat", "concat", "concatenate", "einsum", "matmul", "scaled_dot_product_attention"})
_HEAD_WIDTH = re.compile(r"(self\.)?\w*head\w*")
_COUNT = re.compile(r"[2-9]|[1-9]\d+")
_MAX_PASSES = 2  # over a loop's body: the second sees the names that the first has bound


@dataclass(frozen=True)
class Split:
    """How the output of one layer is taken apart.

    Args:
        kind: what the parts are relative to.
        text: the expression that does it.
        count: the number of parts, if the source states it.
    """

    kind: SplitKind
    text: str
    count: int | None = None


@dataclass(frozen=True)
class _Output:
    """A layer's output, or what was made of it.

    Args:
        layer: the layer's name in its class.
        sizes: the sizes of its last view, as text; empty if it was not viewed.
    """

    layer: str
    sizes: tuple[str, ...] = ()


_Outputs = frozenset[_Output]
_NOTHING: _Outputs = frozenset()


def find_splits(methods: Mapping[str, ast.FunctionDef], layers: Collection[str]) -> dict[str, tuple[Split, ...]]:
    """Return how a class's forward takes its layers' outputs apart, by layer; layers used whole are left out.

    Args:
        methods: the methods of the class by name, inherited ones included.
        layers: the names of the class's layers.
    """
    follower = _Follower(methods, frozenset(layers))
    if "forward" in methods:
        follower.follow_method("forward", [], {})
    return {layer: tuple(splits) for layer, splits in follower.splits.items()}


@dataclass
class _Follower:
    """Follows layers' outputs through the methods of a class."""

    methods: Mapping[str, ast.FunctionDef]
    layers: frozenset[str]
    splits: dict[str, dict[Split, None]] = field(default_factory=dict)
    _active: list[str] = field(default_factory=list)

    def follow_method(self, name: str, arguments: Iterable[_Outputs], keywords: Mapping[str, _Outputs]) -> _Outputs:
        """Follow the outputs that a method is given, and return those that it returns."""
        if name in self._active:
            return _NOTHING
        function = self.methods[name]
        is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
        positions = [each.arg for each in (*function.args.posonlyargs, *function.args.args)][0 if is_static else 1 :]
        names = dict(zip(positions, arguments, strict=False)) | dict(keywords)
        self._active.append(name)
        returned = self._follow_block(function.body, names, {})
        self._active.pop()
        return returned

    def _follow_block(
        self, body: Iterable[ast.stmt], names: dict[str, _Outputs], texts: dict[str, ast.expr]
    ) -> _Outputs:
        """Follow statements that may bind names to outputs, or to the sizes of views; return what they return."""
        returned = _NOTHING
        for statement in body:
            match statement:
                case ast.Assign(targets=targets, value=value):
                    outputs = self._read(value, names, texts)
                    for target in targets:
                        _bind(target, outputs, value, names, texts)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    _bind(target, self._read(value, names, texts), value, names, texts)
                case ast.Return(value=ast.expr() as value):
                    returned |= self._read(value, names, texts)
                case ast.FunctionDef() | ast.ClassDef():
                    continue
                case _:
                    returned |= self._follow_parts(statement, names, texts)
        return returned

    def _follow_parts(self, node: ast.AST, names: dict[str, _Outputs], texts: dict[str, ast.expr]) -> _Outputs:
        """Follow a statement's expressions and blocks; after a branch, a name has what it had before it too."""
        returned = _NOTHING
        for _ in range(_MAX_PASSES if isinstance(node, ast.For | ast.While) else 1):
            for _, value in ast.iter_fields(node):
                parts = value if isinstance(value, list) else [value]
                if parts and isinstance(parts[0], ast.stmt):
                    inside = dict(names)
                    returned |= self._follow_block(parts, inside, texts)
                    for name, outputs in inside.items():
                        names[name] = names.get(name, _NOTHING) | outputs
                    continue
                for part in parts:
                    if isinstance(part, ast.expr):
                        self._read(part, names, texts)
                    elif isinstance(part, ast.AST):
                        returned |= self._follow_parts(part, names, texts)
        return returned

    def _read(self, node: ast.expr, names: dict[str, _Outputs], texts: Mapping[str, ast.expr]) -> _Outputs:
        """Return the outputs that an expression holds, and note where it takes one apart."""
        match node:
            case ast.Name(id=name):
                return names.get(name, _NOTHING)
            case ast.Call():
                return self._read_call(node, names, texts)
            case ast.Subscript(value=value, slice=index):
                outputs = self._read(value, names, texts)
                self._read(index, names, texts)
                has_rows = any(_COUNT.fullmatch(size) for output in outputs for size in output.sizes)
                if outputs and (_divides(index) or (has_rows and _takes_row(index))):
                    self._note(outputs, node, None)
                    return _NOTHING
                return outputs
            case ast.Attribute(value=value):
                return self._read(value, names, texts) if node.attr in ("mT", "T", "data") else _NOTHING
            case ast.Lambda():
                return _NOTHING
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                names[name] = self._read(value, names, texts)
                return names[name]
            case ast.ListComp() | ast.GeneratorExp():
                inside = dict(names)
                for each in node.generators:
                    _bind(each.target, self._read(each.iter, inside, texts), each.iter, inside, {})
                return self._read(node.elt, inside, texts)
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        found = [self._read(part, names, texts) for part in parts]
        is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
        return _NOTHING if is_product else frozenset[_Output]().union(*found)

    def _read_call(self, call: ast.Call, names: dict[str, _Outputs], texts: Mapping[str, ast.expr]) -> _Outputs:
        arguments = [self._read(value, names, texts) for value in call.args]
        keywords = {str(each.arg): self._read(each.value, names, texts) for each in call.keywords}
        given = frozenset[_Output]().union(*arguments, *keywords.values())
        match call.func:
            case (
                ast.Attribute(value=ast.Name("self"), attr=name)
                | ast.Subscript(value=ast.Attribute(value=ast.Name("self"), attr=name))
            ) if name in self.layers:
                return frozenset({_Output(name)})
            case ast.Attribute(value=ast.Name("self"), attr=name) if name in self.methods:
                return self.follow_method(name, arguments, keywords)
            case ast.Attribute(value=ast.Name("self")):
                return given  # an activation, a norm or a dropout
            case ast.Attribute(value=owner, attr=name) if ast.unparse(owner) in _FUNCTIONAL:
                receiver, values = (arguments[0] if arguments else _NOTHING), call.args[1:]
            case ast.Attribute(value=owner, attr=name):
                receiver, values = self._read(owner, names, texts), call.args
            case _:
                return _NOTHING  # another function: what it does is not followed
        if receiver and name in _DIVIDING_METHODS:
            if any(output.sizes for output in receiver) or _read_dim(name, values, call.keywords) != "0":
                count = _read_number(values[0]) if name == "chunk" and values else None
                self._note(receiver, call, count)
            return _NOTHING
        if receiver and name in _SHAPING_METHODS:
            sizes = _read_sizes(values, call.keywords, texts)
            return frozenset(_Output(output.layer, sizes) for output in receiver)
        return _NOTHING if name in _COMBINING else receiver or given

    def _note(self, outputs: _Outputs, node: ast.expr, count: int | None) -> None:
        for output in outputs:
            split = _describe_split(output.sizes, ast.unparse(node), count)
            if split is not None:
                self.splits.setdefault(output.layer, {})[split] = None


def _describe_split(sizes: Sequence[str], text: str, count: int | None) -> Split | None:
    """Return what taking an output apart means for its layer, None if that only takes one head apart.

    Args:
        sizes: the sizes of the output's last view, empty if it was not viewed.
        text: the expression that takes it apart.
        count: the number of parts, if it takes any output apart in equal ones.
    """
    if not sizes:
        return Split("sizes" if count is None else "parts", text, count)
    is_head = sizes[-1] == "-1" or _HEAD_WIDTH.fullmatch(sizes[-1]) is not None
    match sizes[-3:-1]:
        case (*_, matrices, "-1") if _COUNT.fullmatch(matrices):
            return Split("sizes", text)  # several matrices of heads: of each, a rank needs whole heads
        case ("-1", matrices) if _COUNT.fullmatch(matrices):
            return Split("blocks", text)
        case (*_, "-1"):
            return None if is_head else Split("blocks", text)
        case middle:
            is_whole_head = is_head and not any(map(_COUNT.fullmatch, middle))
            return None if is_whole_head else Split("sizes", text)


def _bind(
    target: ast.expr,
    outputs: _Outputs,
    value: ast.expr,
    names: dict[str, _Outputs],
    texts: dict[str, ast.expr],
) -> None:
    match target, value:
        case ast.Name(id=name), _:
            names[name], texts[name] = outputs, value
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            for part, each in zip(targets, values, strict=True):
                _bind(part, outputs, each, names, texts)
        case ast.Tuple(elts=targets), _:
            for part in targets:
                _bind(part, outputs, value, names, texts)


def _read_dim(method: str, values: Sequence[ast.expr], keywords: Iterable[ast.keyword]) -> str:
    """Return the dim along which a method takes a tensor apart, as text."""
    position = 0 if method in ("unbind", "narrow") else 1
    named = {each.arg: each.value for each in keywords}
    dim = named.get("dim") or named.get("axis") or (values[position] if len(values) > position else None)
    return "0" if dim is None else ast.unparse(dim)


def _read_sizes(
    values: Iterable[ast.expr], keywords: Iterable[ast.keyword], texts: Mapping[str, ast.expr]
) -> tuple[str, ...]:
    """Return the sizes that a view is given; empty if its last dim is the rest, and so may be all features again."""
    sizes = tuple(_flatten_sizes((*values, *(each.value for each in keywords)), texts))
    is_rest = len(sizes) < 2 or (sizes[-1] == "-1" and "head" not in sizes[-2])
    return () if is_rest else sizes


def _flatten_sizes(values: Iterable[ast.expr], texts: Mapping[str, ast.expr], depth: int = 0) -> Iterator[str]:
    for value in values:
        if isinstance(value, ast.Starred):
            value = value.value
        if isinstance(value, ast.Name) and isinstance(texts.get(value.id), ast.Tuple | ast.BinOp) and depth < 4:
            value = texts[value.id]
        if isinstance(value, ast.Tuple | ast.List):
            yield from _flatten_sizes(value.elts, texts, depth + 1)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and isinstance(value.right, ast.Tuple):
            yield from _flatten_sizes([value.left, value.right], texts, depth + 1)
        else:
            yield ast.unparse(value)


def _takes_row(index: ast.expr) -> bool:
    """Return whether an index takes one of several rows, such as the query of a view by query, key and value."""
    return any(_read_number(part) is not None for part in _get_index_parts(index))


def _get_index_parts(index: ast.expr) -> list[ast.expr]:
    return index.elts if isinstance(index, ast.Tuple) else [index]


def _divides(index: ast.expr) -> bool:
    """Return whether an index takes a part of the last dim."""
    parts = _get_index_parts(index)
    is_whole = [isinstance(part, ast.Slice) and part.lower is None and part.upper is None for part in parts]
    names_last = isinstance(parts[0], ast.Constant) and parts[0].value is Ellipsis
    return (names_last or len(parts) > 2) and isinstance(parts[-1], ast.Slice) and not is_whole[-1]


def _read_number(node: ast.expr) -> int | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int) else None
