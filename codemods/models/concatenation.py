"""Whether gate rows stand before up rows, followed from the packed parameter to where its product is halved.

The source must show it: the packed parameter is multiplied, the product is halved along its last dim, and nothing on
the way can reorder its rows. Every use of the parameter is followed, through local names and into methods that take the
product; a use that is not known to keep the order makes the answer unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["is_concatenated"]

_PACKED = "gate_up_proj"
_MODULES = ("nn.Module", "torch.nn.Module")
_EVERY_PARAMETER = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "__dict__"})


class _ValueKind(Enum):
    """What an expression evaluates to, as far as the packed parameter is concerned."""

    SELF = "the module"
    STACKED = "the parameter of all experts"
    EXPERT = "the parameter of one expert"
    PRODUCT = "a product with it, gate and up on the last dim"
    HALVES = "the two halves of a product"
    UNKNOWN = "something computed from it that may be in another order"


_WEIGHTS = (_ValueKind.STACKED, _ValueKind.EXPERT)
"""The kinds that are the parameter itself."""

_FUNCTIONAL = frozenset({"F", "functional", "nn.functional", "torch.nn.functional", "torch"})
"""The modules that hold functions of tensors, as models write them."""

_PRODUCTS = {"linear": 1, "matmul": 1, "bmm": 1, "mm": 1, "einsum": 2}
"""Functions that multiply, with the position of the operand whose rows become the last dim of the result."""

_METADATA_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"}
)
"""Attributes and methods that describe a tensor and return none."""

_KEEPS_ORDER = frozenset(
    {"float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone", "detach", "clamp"}
)
"""Methods that keep the order of the elements."""

_VIEW_ATTRIBUTES = frozenset({"T", "mT", "data"})
"""Attributes that are the same parameter, transposed for the product or not."""

_INITIALIZERS = frozenset({"normal_", "uniform_", "zero_", "fill_", "trunc_normal_"})
"""Methods that fill a parameter with values whose order has no meaning."""

_PURE_FUNCTIONS = frozenset({"super", "isinstance", "hasattr", "type", "id", "len"})
"""Functions that leave their arguments as they are."""

_LAST_DIMS = frozenset({("-1", "-2"), ("-2", "-1"), ("1", "2"), ("2", "1")})
_DIMS_BEFORE_THE_LAST = frozenset({"0", "1", "-2"})

_Bindings = dict[str, _ValueKind]


def is_concatenated(body: Iterable[ast.stmt], flags: Mapping[str, bool], classes: Iterable[str]) -> bool | None:
    """Return whether gate rows stand before up rows, by how a class takes them apart; None if it does not show.

    Args:
        body: the class's statements that take effect, inherited ones included.
        flags: the flags of the class's decorator.
        classes: the names of the class and its bases.
    """
    body = list(body)
    methods = {statement.name: statement for statement in body if isinstance(statement, ast.FunctionDef)}
    if any(isinstance(statement, ast.Assign) and _replaces_method(statement, methods) for statement in body):
        return None
    tracker = _WeightTracker(methods, frozenset({*classes, *_MODULES}))
    for statement in body:
        tracker.follow_statement(statement, {"self": _ValueKind.SELF})
    if tracker.alternates or not flags.get("is_concatenated", True):
        return False
    return True if tracker.halved and not tracker.unclear else None


def _replaces_method(statement: ast.Assign, methods: Mapping[str, ast.FunctionDef]) -> bool:
    names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return not names.isdisjoint({"forward", *methods})


@dataclass
class _WeightTracker:
    """Follows the packed parameter through the statements of a class.

    Args:
        methods: the class's methods by name.
        classes: the names of the class and its bases, on which it may call methods.
        halved: whether the parameter's product is halved.
        alternates: whether every second element of something is taken.
        unclear: whether the parameter is used in a way that may change the order of its rows.
    """

    methods: Mapping[str, ast.FunctionDef]
    classes: frozenset[str]
    halved: bool = False
    alternates: bool = False
    unclear: bool = False
    _active_methods: set[str] = field(default_factory=set)

    def follow_statement(self, statement: ast.stmt, names: _Bindings) -> None:
        """Follow one statement, which may read and rebind local names."""
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._follow_block(statement.body, dict(names))
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value, names)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value, names)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=operator, value=value):
                self._bind(
                    target, self._classify_operation(names.get(name), operator, self._classify(value, names)), names
                )
            case ast.For() | ast.While():
                self._follow_parts(statement, names)
                self._follow_parts(statement, names)  # the next iteration starts with the names that this one has bound
            case _:
                self._follow_parts(statement, names)

    def _follow_block(self, body: Iterable[ast.stmt], names: _Bindings) -> None:
        for statement in body:
            self.follow_statement(statement, names)

    def _follow_parts(self, node: ast.AST, names: _Bindings) -> None:
        """Follow a statement's expressions and blocks; names that a block binds keep their value after it."""
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                inside = dict(names)
                for part in value:
                    self._follow_part(part, names, inside)
                for name, kind in inside.items():
                    self.unclear |= names.setdefault(name, kind) != kind
            else:
                self._follow_part(value, names, names)

    def _follow_part(self, part: object, names: _Bindings, inside: _Bindings) -> None:
        if isinstance(part, ast.expr):
            self._note_escape(self._classify(part, names))
        elif isinstance(part, ast.stmt):
            self.follow_statement(part, inside)
        elif isinstance(part, ast.AST):
            self._follow_parts(part, names)

    def _note_escape(self, kind: _ValueKind | None) -> None:
        """Record a use that is not followed any further."""
        self.unclear |= kind is not None

    def _assign(self, target: ast.expr, value: ast.expr, names: _Bindings) -> None:
        match target, value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                before = dict(names)
                for part, assigned in zip(targets, values, strict=True):
                    self._bind(part, self._classify(assigned, before), names)
            case _:
                self._bind(target, self._classify(value, names), names)

    def _bind(self, target: ast.expr, kind: _ValueKind | None, names: _Bindings) -> None:
        match target:
            case ast.Name(id=name):
                names.pop(name, None)
                if kind is not None:
                    names[name] = kind
                return
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                if kind is _ValueKind.HALVES and len(elements) == 2:
                    self.halved, kind = True, None
                for element in elements:
                    self._bind(element.value if isinstance(element, ast.Starred) else element, None, names)
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
                self.unclear |= attribute in _EVERY_PARAMETER  # how the parameter itself is created shows in the shapes
            case _:
                self._note_escape(self._classify(target, names))
        self._note_escape(kind)

    def _classify(self, node: ast.expr, names: _Bindings) -> _ValueKind | None:
        """Return what an expression evaluates to, None for anything without the packed parameter."""
        match node:
            case ast.Name(id=name):
                return names.get(name)
            case ast.Constant(value=value):
                self.unclear |= value == _PACKED
                return None
            case ast.Attribute():
                return self._classify_attribute(node, names)
            case ast.Subscript(value=value, slice=index):
                return self._classify_item(self._classify(value, names), index, names)
            case ast.BinOp(left=left, op=operator, right=right):
                return self._classify_operation(self._classify(left, names), operator, self._classify(right, names))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
                self._classify(left, names)
                return None
            case ast.Call():
                return self._classify_call(node, names)
            case ast.Slice(step=ast.Constant(value=2)):
                self.alternates = True
        self._follow_parts(node, names)
        return None

    def _classify_attribute(self, node: ast.Attribute, names: _Bindings) -> _ValueKind | None:
        kind = self._classify(node.value, names)
        if kind is _ValueKind.SELF:
            self.unclear |= node.attr in _EVERY_PARAMETER
            return _ValueKind.STACKED if node.attr == _PACKED else None
        if kind in _WEIGHTS and node.attr in _VIEW_ATTRIBUTES:
            return kind
        self.unclear |= node.attr == _PACKED or (kind is not None and node.attr not in _METADATA_ATTRIBUTES)
        return None

    def _classify_item(self, kind: _ValueKind | None, index: ast.expr, names: _Bindings) -> _ValueKind | None:
        self._note_escape(self._classify(index, names))
        if kind is _ValueKind.STACKED and isinstance(index, (ast.Name, ast.Constant, ast.Attribute)):
            return _ValueKind.EXPERT
        self._note_escape(kind)
        return None

    def _classify_operation(
        self, left: _ValueKind | None, operator: ast.operator, right: _ValueKind | None
    ) -> _ValueKind | None:
        if isinstance(operator, ast.MatMult) and left is None and right in _WEIGHTS:
            return _ValueKind.PRODUCT
        if isinstance(operator, (ast.Add, ast.Sub, ast.Mult, ast.Div)) and {left, right} == {None, _ValueKind.PRODUCT}:
            return _ValueKind.PRODUCT
        self._note_escape(left or right)
        return None

    def _classify_call(self, call: ast.Call, names: _Bindings) -> _ValueKind | None:
        """Return what a call evaluates to, after classifying each of its arguments."""
        function = _format_dotted_path(call.func)
        if function == "self.register_parameter":  # how the parameter is created shows in the shapes
            return None
        owner = function.rpartition(".")[0]
        values = (*call.args, *(keyword.value for keyword in call.keywords))
        arguments = [self._classify(value, names) for value in values]
        kinds = [kind for kind in arguments if kind is not None]
        match call.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=method) if names.get("self") is _ValueKind.SELF:
                return self._follow_method(method, call, arguments)
            case ast.Attribute() if kinds == [_ValueKind.SELF] and owner in self.classes:
                return None
            case ast.Attribute(value=receiver, attr=name) if owner not in _FUNCTIONAL:
                kind = self._classify(receiver, names)
                if kind is not None:
                    return self._note_unknown(_classify_method_call(kind, name, call, kinds))
                return self._note_unknown(_classify_function_call(name, call, [None, *arguments]))
            case ast.Attribute(attr=name):
                return self._note_unknown(_classify_function_call(name, call, arguments))
            case ast.Name(id=name) if name in _PURE_FUNCTIONS:
                return None
        self._note_escape(self._classify(call.func, names))
        self.unclear |= bool(kinds)
        return None

    def _note_unknown(self, kind: _ValueKind | None) -> _ValueKind | None:
        """Return what a call evaluates to; if that is unknown, so is the order."""
        self.unclear |= kind is _ValueKind.UNKNOWN
        return None if kind is _ValueKind.UNKNOWN else kind

    def _follow_method(self, name: str, call: ast.Call, arguments: list[_ValueKind | None]) -> _ValueKind | None:
        """Follow the product into a method of the class, whose result must not depend on the order any more."""
        if all(kind is None for kind in arguments):
            self.unclear |= name in _EVERY_PARAMETER
            return None
        method = self.methods.get(name)
        parameters = [parameter.arg for parameter in method.args.args[1:]] if method else []
        simple = method is not None and not method.args.posonlyargs and not method.decorator_list
        positions = [*parameters[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
        if not simple or name in self._active_methods or len(positions) != len(arguments):
            self.unclear = True
            return None
        assert method is not None
        bound = {str(parameter): kind for parameter, kind in zip(positions, arguments, strict=True) if kind is not None}
        self._active_methods.add(name)
        self._follow_block(method.body, {"self": _ValueKind.SELF, **bound})
        self._active_methods.remove(name)
        return None


def _format_dotted_path(node: ast.expr) -> str:
    """Return a dotted name as written, `nn.functional.linear`; empty for any other expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            owner = _format_dotted_path(value)
            return f"{owner}.{attribute}" if owner else ""
    return ""


def _classify_method_call(
    kind: _ValueKind, name: str, call: ast.Call, arguments: Sequence[_ValueKind]
) -> _ValueKind | None:
    """Return what a method call on the packed parameter, or on something computed from it, evaluates to.

    Args:
        kind: what the method is called on.
        name: the method's name.
        call: the call.
        arguments: the kinds of the arguments that involve the packed parameter.
    """
    if arguments:
        return _ValueKind.UNKNOWN
    if name in _METADATA_ATTRIBUTES or (kind in _WEIGHTS and name in _INITIALIZERS):
        return None
    if name in _KEEPS_ORDER or (kind in _WEIGHTS and _transposes_last_dims(name, call)):
        return kind
    if kind is _ValueKind.PRODUCT and name == "chunk":
        return _classify_chunk(call.args, call.keywords)
    return kind if kind is _ValueKind.PRODUCT and _keeps_last_dim(name, call) else _ValueKind.UNKNOWN


def _classify_function_call(name: str, call: ast.Call, operands: Sequence[_ValueKind | None]) -> _ValueKind | None:
    """Return what a call of a tensor function, or of another object's method, evaluates to.

    Args:
        name: the function's name.
        call: the call.
        operands: what a method is called on, if it is one, then what each argument evaluates to.
    """
    kinds = [kind for kind in operands if kind is not None]
    is_initializer = name.endswith("_") and "init" in _format_dotted_path(call.func).split(".")
    if not kinds or is_initializer:
        return None
    if name == "chunk" and kinds == [operands[0]] == [_ValueKind.PRODUCT]:
        return _classify_chunk(call.args[1:], call.keywords)
    position = _PRODUCTS.get(name, len(operands))
    multiplied = len(kinds) == 1 and kinds[0] in _WEIGHTS and operands[position : position + 1] == kinds
    return _ValueKind.PRODUCT if multiplied and (name != "einsum" or _keeps_rows_last(call)) else _ValueKind.UNKNOWN


def _classify_chunk(positional: Sequence[ast.expr], keywords: Iterable[ast.keyword]) -> _ValueKind:
    """Return what `chunk` evaluates to: halves, if it cuts the last dim in two."""
    given = dict(zip(("chunks", "dim"), map(ast.unparse, positional), strict=False))
    given |= {str(keyword.arg): ast.unparse(keyword.value) for keyword in keywords}
    return _ValueKind.HALVES if given == {"chunks": "2", "dim": "-1"} else _ValueKind.UNKNOWN


def _transposes_last_dims(name: str, call: ast.Call) -> bool:
    """Return whether a method transposes each expert's matrix."""
    return name == "t" or (name == "transpose" and tuple(map(ast.unparse, call.args)) in _LAST_DIMS)


def _keeps_last_dim(name: str, call: ast.Call) -> bool:
    """Return whether a method adds or removes a dim before the last."""
    dims = [ast.unparse(dim) for dim in (*call.args, *(keyword.value for keyword in call.keywords))]
    return name in ("squeeze", "unsqueeze") and len(dims) == 1 and dims[0] in _DIMS_BEFORE_THE_LAST


def _keeps_rows_last(call: ast.Call) -> bool:
    """Return whether the result of an `einsum` ends with a dim that only its second operand has: `"te,eoi->to"`."""
    match call.args[:1]:
        case [ast.Constant(value=str(equation))]:
            operands, _, result = equation.replace(" ", "").partition("->")
            first, _, second = operands.partition(",")
            return bool(result) and result[-1] in second and result[-1] not in first
    return False
