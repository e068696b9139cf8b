"""Whether gate rows stand before up rows, followed from the packed parameter to where its product is halved.

It must be shown: what the packed parameter is multiplied with, the product, is halved on its last dim, and nothing on
the way can put rows into another order. Every use of the parameter is followed, through local names and into methods
that take the product; one that is not known to keep the order leaves it open.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from codemods.models.tensor_calls import (
    FUNCTIONAL,
    METADATA_ATTRIBUTES,
    PURE_FUNCTIONS,
    VIEW_ATTRIBUTES,
    WEIGHTS,
    ValueKind,
    classify_function_call,
    classify_method_call,
    format_dotted_path,
)

__all__ = ["is_concatenated"]

_PACKED = "gate_up_proj"
_MODULES = ("nn.Module", "torch.nn.Module")
_EVERY_PARAMETER = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "__dict__"})


_Bindings = dict[str, ValueKind]


def is_concatenated(body: Iterable[ast.stmt], flags: Mapping[str, bool], classes: Iterable[str]) -> bool | None:
    """Say whether gate rows stand before up rows, by how a class takes them apart; None where it does not show.

    Args:
        body: the statements of the class that take effect, those it inherits among them.
        flags: of its decorator.
        classes: the names of the class and its bases.
    """
    body = list(body)
    methods = {one.name: one for one in body if isinstance(one, ast.FunctionDef)}
    if any(isinstance(one, ast.Assign) and _replaces_method(one, methods) for one in body):
        return None
    found = _WeightTracker(methods, frozenset({*classes, *_MODULES}))
    for statement in body:
        found.follow_statement(statement, {"self": ValueKind.SELF})
    if found.alternates or not flags.get("is_concatenated", True):
        return False
    return True if found.halved and not found.unclear else None


def _replaces_method(statement: ast.Assign, methods: Mapping[str, ast.FunctionDef]) -> bool:
    names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return not names.isdisjoint({"forward", *methods})


@dataclass
class _WeightTracker:
    """Follows the packed parameter through the statements of a class.

    Args:
        methods: of the class, by name.
        classes: the class and its bases, whose methods it may call by their names.
        halved: whether its product was seen to be halved.
        alternates: whether every second element of something was taken.
        unclear: whether it was used in a way that may change the order of its rows.
    """

    methods: Mapping[str, ast.FunctionDef]
    classes: frozenset[str]
    halved: bool = False
    alternates: bool = False
    unclear: bool = False
    _active_methods: set[str] = field(default_factory=set)

    def follow_statement(self, statement: ast.stmt, names: _Bindings) -> None:
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
                self._follow_parts(statement, names)  # what one round leaves in a name the next one finds there
            case _:
                self._follow_parts(statement, names)

    def _follow_block(self, body: Iterable[ast.stmt], names: _Bindings) -> None:
        for statement in body:
            self.follow_statement(statement, names)

    def _follow_parts(self, node: ast.AST, names: _Bindings) -> None:
        """Follow what a statement is made of; what one of its blocks leaves in a name counts after it."""
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            inside = dict(names)
            for part in parts:
                if isinstance(part, ast.stmt):
                    self.follow_statement(part, inside)
                elif isinstance(part, ast.expr):
                    self._note_escape(self._classify(part, names))
                elif isinstance(part, ast.AST):
                    self._follow_parts(part, names)
            for name, form in inside.items():
                self.unclear |= names.setdefault(name, form) != form

    def _note_escape(self, kind: ValueKind | None) -> None:
        """Take note of a use that is not followed any further."""
        self.unclear |= kind is not None

    def _assign(self, target: ast.expr, value: ast.expr, names: _Bindings) -> None:
        match target, value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                before = dict(names)
                for one, held in zip(targets, values, strict=True):
                    self._bind(one, self._classify(held, before), names)
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
                self.unclear |= attribute in _EVERY_PARAMETER  # the shapes tell how the parameter itself is made
            case _:
                self._note_escape(self._classify(target, names))
        self._note_escape(kind)

    def _classify(self, node: ast.expr, names: _Bindings) -> ValueKind | None:
        """Return what an expression holds of the packed parameter, None for nothing."""
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

    def _classify_attribute(self, node: ast.Attribute, names: _Bindings) -> ValueKind | None:
        form = self._classify(node.value, names)
        if form is ValueKind.SELF:
            self.unclear |= node.attr in _EVERY_PARAMETER
            return ValueKind.STACKED if node.attr == _PACKED else None
        if form in WEIGHTS and node.attr in VIEW_ATTRIBUTES:
            return form
        self.unclear |= node.attr == _PACKED or (form is not None and node.attr not in METADATA_ATTRIBUTES)
        return None

    def _classify_item(self, kind: ValueKind | None, index: ast.expr, names: _Bindings) -> ValueKind | None:
        self._note_escape(self._classify(index, names))
        if kind is ValueKind.STACKED and isinstance(index, (ast.Name, ast.Constant, ast.Attribute)):
            return ValueKind.EXPERT
        self._note_escape(kind)
        return None

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
        """Return what a call gives, all of its arguments looked at."""
        called = format_dotted_path(call.func)
        if called == "self.register_parameter":  # as above, the shapes tell
            return None
        owner = called.rpartition(".")[0]
        arguments = [self._classify(one, names) for one in (*call.args, *(keyword.value for keyword in call.keywords))]
        held = [form for form in arguments if form is not None]
        match call.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=method) if names.get("self") is ValueKind.SELF:
                return self._follow_method(method, call, arguments)
            case ast.Attribute() if held == [ValueKind.SELF] and owner in self.classes:
                return None
            case ast.Attribute(value=receiver, attr=name) if owner not in FUNCTIONAL:
                form = self._classify(receiver, names)
                if form is not None:
                    return self._note_unknown(classify_method_call(form, name, call, held))
                return self._note_unknown(classify_function_call(name, call, [None, *arguments]))
            case ast.Attribute(attr=name):
                return self._note_unknown(classify_function_call(name, call, arguments))
            case ast.Name(id=name) if name in PURE_FUNCTIONS:
                return None
        self._note_escape(self._classify(call.func, names))
        self.unclear |= bool(held)
        return None

    def _note_unknown(self, kind: ValueKind | None) -> ValueKind | None:
        """Return what a call gives; where that is not known, it leaves the order open."""
        self.unclear |= kind is ValueKind.UNKNOWN
        return None if kind is ValueKind.UNKNOWN else kind

    def _follow_method(self, name: str, call: ast.Call, arguments: list[ValueKind | None]) -> ValueKind | None:
        """Follow the product into a method of the class, which must make something else of it."""
        if all(form is None for form in arguments):
            self.unclear |= name in _EVERY_PARAMETER
            return None
        method = self.methods.get(name)
        parameters = [one.arg for one in method.args.args[1:]] if method else []
        simple = method is not None and not method.args.posonlyargs and not method.decorator_list
        positions = [*parameters[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
        if not simple or name in self._active_methods or len(positions) != len(arguments):
            self.unclear = True
            return None
        assert method is not None
        bound = {str(one): form for one, form in zip(positions, arguments, strict=True) if form is not None}
        self._active_methods.add(name)
        self._follow_block(method.body, {"self": ValueKind.SELF, **bound})
        self._active_methods.remove(name)
        return None
