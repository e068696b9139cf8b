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
    FACTS,
    FUNCTIONAL,
    HARMLESS,
    TURNS,
    WEIGHTS,
    Form,
    dotted,
    of_function,
    of_method,
)

__all__ = ["is_concatenated"]

_PACKED = "gate_up_proj"
_MODULES = ("nn.Module", "torch.nn.Module")
_EVERY_PARAMETER = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "__dict__"})


_Names = dict[str, Form]


def is_concatenated(body: Iterable[ast.stmt], flags: Mapping[str, bool], classes: Iterable[str]) -> bool | None:
    """Say whether gate rows stand before up rows, by how a class takes them apart; None where it does not show.

    Args:
        body: the statements of the class that take effect, those it inherits among them.
        flags: of its decorator.
        classes: the names of the class and its bases.
    """
    body = list(body)
    methods = {one.name: one for one in body if isinstance(one, ast.FunctionDef)}
    if any(isinstance(one, ast.Assign) and _replaces(one, methods) for one in body):
        return None
    found = _Follower(methods, frozenset({*classes, *_MODULES}))
    for statement in body:
        found.statement(statement, {"self": Form.SELF})
    if found.alternates or not flags.get("is_concatenated", True):
        return False
    return True if found.halved and not found.unclear else None


def _replaces(statement: ast.Assign, methods: Mapping[str, ast.FunctionDef]) -> bool:
    names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return not names.isdisjoint({"forward", *methods})


@dataclass
class _Follower:
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
    _entered: set[str] = field(default_factory=set)

    def statement(self, statement: ast.stmt, names: _Names) -> None:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._block(statement.body, dict(names))
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value, names)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value, names)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=operator, value=value):
                self._bind(target, self._operation(names.get(name), operator, self._form(value, names)), names)
            case ast.For() | ast.While():
                self._parts(statement, names)
                self._parts(statement, names)  # what one round leaves in a name the next one finds there
            case _:
                self._parts(statement, names)

    def _block(self, body: Iterable[ast.stmt], names: _Names) -> None:
        for statement in body:
            self.statement(statement, names)

    def _parts(self, node: ast.AST, names: _Names) -> None:
        """Follow what a statement is made of; what one of its blocks leaves in a name counts after it."""
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            inside = dict(names)
            for part in parts:
                if isinstance(part, ast.stmt):
                    self.statement(part, inside)
                elif isinstance(part, ast.expr):
                    self._leave(self._form(part, names))
                elif isinstance(part, ast.AST):
                    self._parts(part, names)
            for name, form in inside.items():
                self.unclear |= names.setdefault(name, form) != form

    def _leave(self, form: Form | None) -> None:
        """Take note of a use that is not followed any further."""
        self.unclear |= form is not None

    def _assign(self, target: ast.expr, value: ast.expr, names: _Names) -> None:
        match target, value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                before = dict(names)
                for one, held in zip(targets, values, strict=True):
                    self._bind(one, self._form(held, before), names)
            case _:
                self._bind(target, self._form(value, names), names)

    def _bind(self, target: ast.expr, form: Form | None, names: _Names) -> None:
        match target:
            case ast.Name(id=name):
                names.pop(name, None)
                if form is not None:
                    names[name] = form
                return
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                if form is Form.HALVES and len(elements) == 2:
                    self.halved, form = True, None
                for element in elements:
                    self._bind(element.value if isinstance(element, ast.Starred) else element, None, names)
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
                self.unclear |= attribute in _EVERY_PARAMETER  # the shapes tell how the parameter itself is made
            case _:
                self._leave(self._form(target, names))
        self._leave(form)

    def _form(self, node: ast.expr, names: _Names) -> Form | None:
        """Return what an expression holds of the packed parameter, None for nothing."""
        match node:
            case ast.Name(id=name):
                return names.get(name)
            case ast.Constant(value=value):
                self.unclear |= value == _PACKED
                return None
            case ast.Attribute():
                return self._attribute(node, names)
            case ast.Subscript(value=value, slice=index):
                return self._item(self._form(value, names), index, names)
            case ast.BinOp(left=left, op=operator, right=right):
                return self._operation(self._form(left, names), operator, self._form(right, names))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
                self._form(left, names)
                return None
            case ast.Call():
                return self._call(node, names)
            case ast.Slice(step=ast.Constant(value=2)):
                self.alternates = True
        self._parts(node, names)
        return None

    def _attribute(self, node: ast.Attribute, names: _Names) -> Form | None:
        form = self._form(node.value, names)
        if form is Form.SELF:
            self.unclear |= node.attr in _EVERY_PARAMETER
            return Form.STACKED if node.attr == _PACKED else None
        if form in WEIGHTS and node.attr in TURNS:
            return form
        self.unclear |= node.attr == _PACKED or (form is not None and node.attr not in FACTS)
        return None

    def _item(self, form: Form | None, index: ast.expr, names: _Names) -> Form | None:
        self._leave(self._form(index, names))
        if form is Form.STACKED and isinstance(index, (ast.Name, ast.Constant, ast.Attribute)):
            return Form.EXPERT
        self._leave(form)
        return None

    def _operation(self, left: Form | None, operator: ast.operator, right: Form | None) -> Form | None:
        if isinstance(operator, ast.MatMult) and left is None and right in WEIGHTS:
            return Form.PRODUCT
        if isinstance(operator, (ast.Add, ast.Sub, ast.Mult, ast.Div)) and {left, right} == {None, Form.PRODUCT}:
            return Form.PRODUCT
        self._leave(left or right)
        return None

    def _call(self, call: ast.Call, names: _Names) -> Form | None:
        """Return what a call gives, all of its arguments looked at."""
        called = dotted(call.func)
        if called == "self.register_parameter":  # as above, the shapes tell
            return None
        owner = called.rpartition(".")[0]
        arguments = [self._form(one, names) for one in (*call.args, *(keyword.value for keyword in call.keywords))]
        held = [form for form in arguments if form is not None]
        match call.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=method) if names.get("self") is Form.SELF:
                return self._own_method(method, call, arguments)
            case ast.Attribute() if held == [Form.SELF] and owner in self.classes:
                return None
            case ast.Attribute(value=receiver, attr=name) if owner not in FUNCTIONAL:
                form = self._form(receiver, names)
                if form is not None:
                    return self._known(of_method(form, name, call, held))
                return self._known(of_function(name, call, [None, *arguments]))
            case ast.Attribute(attr=name):
                return self._known(of_function(name, call, arguments))
            case ast.Name(id=name) if name in HARMLESS:
                return None
        self._leave(self._form(call.func, names))
        self.unclear |= bool(held)
        return None

    def _known(self, form: Form | None) -> Form | None:
        """Return what a call gives; where that is not known, it leaves the order open."""
        self.unclear |= form is Form.UNKNOWN
        return None if form is Form.UNKNOWN else form

    def _own_method(self, name: str, call: ast.Call, arguments: list[Form | None]) -> Form | None:
        """Follow the product into a method of the class, which must make something else of it."""
        if all(form is None for form in arguments):
            self.unclear |= name in _EVERY_PARAMETER
            return None
        method = self.methods.get(name)
        parameters = [one.arg for one in method.args.args[1:]] if method else []
        simple = method is not None and not method.args.posonlyargs and not method.decorator_list
        positions = [*parameters[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
        if not simple or name in self._entered or len(positions) != len(arguments):
            self.unclear = True
            return None
        assert method is not None
        bound = {str(one): form for one, form in zip(positions, arguments, strict=True) if form is not None}
        self._entered.add(name)
        self._block(method.body, {"self": Form.SELF, **bound})
        self._entered.remove(name)
        return None
