"""Whether gate rows stand before up rows, followed from the packed parameter to where its product is halved.

The source must show it: the packed parameter is multiplied, the product is halved along its last dim, and nothing on
the way can reorder its rows. Every use of the parameter is followed, through local names and into methods that take the
product; a use that is not known to keep the order makes the answer unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from codemods.models.value_kinds import (
    METADATA_ATTRIBUTES,
    TRANSPOSED,
    TRANSPOSED_ATTRIBUTES,
    WEIGHTS,
    ValueKind,
    classify_function_call,
    classify_method_call,
    find_sliced_part,
    format_dotted_path,
    is_one_item,
    read_index,
)

__all__ = ["Concatenation", "find_concatenation"]

_PACKED = "gate_up_proj"
_MODULES = ("nn.Module", "torch.nn.Module")
_EVERY_PARAMETER = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "__dict__"})


_FUNCTIONAL = frozenset({"F", "functional", "nn.functional", "torch.nn.functional", "torch"})
"""The modules that hold functions of tensors, as models write them."""

_PURE_FUNCTIONS = frozenset({"super", "isinstance", "hasattr", "type", "id", "len"})
"""Functions that leave their arguments as they are."""

_Bindings = dict[str, ValueKind]


@dataclass(frozen=True)
class Concatenation:
    """Whether gate rows stand before up rows, by how a class takes them apart.

    Args:
        shown: the answer, None if the source does not show it.
        reason: why it does not.
        line: the line that prevents it, 0 if there is none.
        statement: the statement of the class's body with that line.
    """

    shown: bool | None
    reason: str = ""
    line: int = 0
    statement: ast.stmt | None = None


def find_concatenation(
    body: Iterable[ast.stmt], flags: Mapping[str, bool], classes: Iterable[str], half: str
) -> Concatenation:
    """Return whether gate rows stand before up rows, by how a class takes them apart.

    Args:
        body: the class's statements that take effect, inherited ones included.
        flags: the flags of the class's decorator.
        classes: the names of the class and its bases.
        half: the text of half the packed dim, empty if the shape does not show it.
    """
    body = list(body)
    methods = {statement.name: statement for statement in body if isinstance(statement, ast.FunctionDef)}
    for statement in body:
        if isinstance(statement, ast.Assign) and _replaces_method(statement, methods):
            return Concatenation(None, "puts another function in the place of a method", statement.lineno, statement)
    tracker = _WeightTracker(methods, frozenset({*classes, *_MODULES}), half)
    unclear_statement = None
    for statement in body:
        tracker.follow_statement(statement, {"self": ValueKind.SELF})
        unclear_statement = unclear_statement or (statement if tracker.unclear else None)
    if tracker.alternates or not flags.get("is_concatenated", True):
        return Concatenation(False)
    if tracker.unclear:
        reason = "uses `gate_up_proj`, or a product with it, in a way that may change the order of its rows"
        return Concatenation(None, reason, tracker.unclear_line, unclear_statement)
    if tracker.firsts != tracker.seconds:
        only = sorted(tracker.firsts ^ tracker.seconds)[0]
        return Concatenation(None, f"takes only one part of `gate_up_proj` at `{only}`")
    if not tracker.halved and not tracker.firsts:
        return Concatenation(None, "does not show where it takes gate from up")
    return Concatenation(True)


def _replaces_method(statement: ast.Assign, methods: Mapping[str, ast.FunctionDef]) -> bool:
    names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return not names.isdisjoint({"forward", *methods})


@dataclass
class _WeightTracker:
    """Follows the packed parameter through the statements of a class.

    Args:
        methods: the class's methods by name.
        classes: the names of the class and its bases, on which it may call methods.
        half: the text of half the packed dim, empty if the shape does not show it.
        firsts: where first parts of the parameter or its product end, as text.
        seconds: where second parts begin.
        halved: whether the parameter's product is halved.
        alternates: whether every second element of something is taken.
        unclear: whether the parameter is used in a way that may change the order of its rows.
        unclear_line: the line that does, 0 if there is none.
    """

    methods: Mapping[str, ast.FunctionDef]
    classes: frozenset[str]
    half: str = ""
    firsts: set[str] = field(default_factory=set)
    seconds: set[str] = field(default_factory=set)
    halved: bool = False
    alternates: bool = False
    unclear: bool = False
    unclear_line: int = 0
    _active_methods: set[str] = field(default_factory=set)

    def follow_statement(self, statement: ast.stmt, names: _Bindings) -> None:
        """Follow one statement, which may read and rebind local names."""
        self._follow_one(statement, names)
        if self.unclear and not self.unclear_line:
            self.unclear_line = statement.lineno

    def _follow_one(self, statement: ast.stmt, names: _Bindings) -> None:
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

    def _note_escape(self, kind: ValueKind | None) -> None:
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

    def _bind(self, target: ast.expr, kind: ValueKind | None, names: _Bindings) -> None:
        match target:
            case ast.Name(id=name):
                names.pop(name, None)
                if kind is not None:
                    names[name] = kind
                return
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                if kind is ValueKind.HALVES and len(elements) == 2:
                    self.halved, kind = True, None
                for element in elements:
                    self._bind(element.value if isinstance(element, ast.Starred) else element, None, names)
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
                self.unclear |= attribute in _EVERY_PARAMETER  # how the parameter itself is created shows in the shapes
            case _:
                self._note_escape(self._classify(target, names))
        self._note_escape(kind)

    def _classify(self, node: ast.expr, names: _Bindings) -> ValueKind | None:
        """Return what an expression evaluates to, None for anything without the packed parameter."""
        match node:
            case ast.Name(id=name):
                return names.get(name)
            case ast.Constant(value=value):
                self.unclear |= value == _PACKED
                return None
            case ast.Attribute():
                return self._classify_attribute(node, names)
            case ast.Subscript(value=value):
                return self._classify_item(self._classify(value, names), node, names)
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

    def _classify_attribute(self, node: ast.Attribute, names: _Bindings) -> ValueKind | None:
        kind = self._classify(node.value, names)
        if kind is ValueKind.SELF:
            self.unclear |= node.attr in _EVERY_PARAMETER
            return ValueKind.STACKED if node.attr == _PACKED else None
        if kind in WEIGHTS and node.attr in ("data", *TRANSPOSED_ATTRIBUTES):
            return kind if node.attr == "data" else TRANSPOSED[kind]
        self.unclear |= node.attr == _PACKED or (kind is not None and node.attr not in METADATA_ATTRIBUTES)
        return None

    def _classify_item(self, kind: ValueKind | None, item: ast.Subscript, names: _Bindings) -> ValueKind | None:
        """Return what an item or a slice is; a part of gate and up is noted, and followed no further."""
        index = item.slice
        self._note_escape(self._classify(index, names))
        if kind is ValueKind.HALVES and (number := read_index(index)) in (0, 1):
            self._note_part(number, ast.unparse(item.value))
            return None
        if kind is None:
            return None
        if part := find_sliced_part(kind, index):
            self._note_part(*part)
            return None
        if kind in (ValueKind.STACKED, ValueKind.STACKED_TRANSPOSED) and is_one_item(index):
            return ValueKind.EXPERT if kind is ValueKind.STACKED else ValueKind.EXPERT_TRANSPOSED
        self._note_escape(kind)
        return None

    def _note_part(self, number: int, boundary: str) -> None:
        """Note the first or second part, with the boundary between the two."""
        (self.seconds if number else self.firsts).add(boundary)

    def _classify_operation(
        self, left: ValueKind | None, operator: ast.operator, right: ValueKind | None
    ) -> ValueKind | None:
        if isinstance(operator, ast.MatMult) and left is None and right in WEIGHTS:
            return ValueKind.PRODUCT
        if isinstance(operator, (ast.Add, ast.Sub, ast.Mult, ast.Div)) and {left, right} == {None, ValueKind.PRODUCT}:
            return ValueKind.PRODUCT
        self._note_escape(left or right)
        return None

    def _classify_call(self, call: ast.Call, names: _Bindings) -> ValueKind | None:
        """Return what a call evaluates to, after classifying each of its arguments."""
        function = format_dotted_path(call.func)
        if function == "self.register_parameter":  # how the parameter is created shows in the shapes
            return None
        owner = function.rpartition(".")[0]
        values = (*call.args, *(keyword.value for keyword in call.keywords))
        arguments = [self._classify(value, names) for value in values]
        kinds = [kind for kind in arguments if kind is not None]
        match call.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=method) if names.get("self") is ValueKind.SELF:
                return self._follow_method(method, call, arguments)
            case ast.Attribute() if kinds == [ValueKind.SELF] and owner in self.classes:
                return None
            case ast.Attribute(value=receiver, attr=name) if owner not in _FUNCTIONAL:
                kind = self._classify(receiver, names)
                if kind is not None:
                    if not kinds and name == "narrow" and self._note_narrow(kind, call.args):
                        return None
                    return self._note_unknown(classify_method_call(kind, name, call, kinds, self.half))
                return self._note_unknown(classify_function_call(name, call, [None, *arguments], self.half))
            case ast.Attribute(attr=name):
                if name == "narrow" and kinds == [arguments[0]] and self._note_narrow(kinds[0], call.args[1:]):
                    return None
                return self._note_unknown(classify_function_call(name, call, arguments, self.half))
            case ast.Name(id=name) if name in _PURE_FUNCTIONS:
                return None
        self._note_escape(self._classify(call.func, names))
        self.unclear |= bool(kinds)
        return None

    def _note_narrow(self, kind: ValueKind, arguments: Sequence[ast.expr]) -> bool:
        """Note `narrow(-1, 0, size)` and `narrow(-1, size, size)`; return whether a call is one of them."""
        match kind, list(map(ast.unparse, arguments)):
            case ValueKind.PRODUCT, ["-1", "0", size]:
                self._note_part(0, size)
            case ValueKind.PRODUCT, ["-1", start, size] if start == size:
                self._note_part(1, size)
            case _:
                return False
        return True

    def _note_unknown(self, kind: ValueKind | None) -> ValueKind | None:
        """Return what a call evaluates to; if that is unknown, so is the order."""
        self.unclear |= kind is ValueKind.UNKNOWN
        return None if kind is ValueKind.UNKNOWN else kind

    def _follow_method(self, name: str, call: ast.Call, arguments: list[ValueKind | None]) -> ValueKind | None:
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
        self._follow_block(method.body, {"self": ValueKind.SELF, **bound})
        self._active_methods.remove(name)
        return None
