"""Escape analysis: where the code of a file hands a plan to something that may change it unread.

What statements write into the plans that they name is read by `statements`. A plan is a dict, however, and whoever
holds it can change it: under another name, in a container, in a function that receives it. Each reference to a plan is
followed through the file until it is only read or copied; every other end is an escape. Names are followed without
regard to the order of statements, so that an escape may be found where there is none, but none is missed.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from codemods.reading.expressions import iter_bindings, iter_children, walk_statements
from codemods.reading.local_names import find_local_plans
from codemods.reading.names import CHANGING_METHODS, Function, get_identifier
from codemods.reading.scope import is_plan_attribute

__all__ = ["Escape", "EscapeFinder", "index_parents", "is_reading_function"]

_READING_METHODS = frozenset({"items", "keys", "values", "get", "copy", "__contains__", "__getitem__", "__len__"})
_ACCESSORS = frozenset({"getter", "setter", "deleter"})
_READING_FUNCTIONS = frozenset(
    [
        "OrderedDict",
        "MappingProxyType",
        "all",
        "any",
        "bool",
        "copy",
        "deepcopy",
        "dict",
        "dumps",
        "enumerate",
        "filter",
        "frozenset",
        "hasattr",
        "hash",
        "id",
        "isinstance",
        "issubclass",
        "iter",
        "len",
        "list",
        "map",
        "max",
        "min",
        "print",
        "repr",
        "reversed",
        "set",
        "sorted",
        "str",
        "sum",
        "tuple",
        "type",
        "zip",
    ]
)
"""Functions that read or copy a dict."""
_READING_PREFIXES = ("assert", "check", "compare", "validate", "verify")
_PASSING_FUNCTIONS = frozenset({"cast", "getattr", "field", "property", "cached_property", "staticmethod"})
"""Functions that return an argument, or make an attribute from it."""


@dataclass(frozen=True)
class Escape:
    """Where a plan escapes.

    Args:
        node: the expression for the plan there.
        is_write: whether the code certainly changes it there.
    """

    node: ast.AST
    is_write: bool = False


def index_parents(statements: Sequence[ast.stmt]) -> Mapping[ast.AST, ast.AST]:
    """Return the parent of each node below some statements."""
    return {child: node for node in walk_statements(statements) for child in iter_children(node)}


@dataclass(frozen=True)
class _Flow:
    """The way of one plan through a file.

    Args:
        attribute: the plan.
        is_read: whether changes under the plan's own name are read elsewhere.
        are_aliases_read: whether changes under the local names of a function are, too.
        seen: the names that were followed already.
    """

    attribute: str
    is_read: bool
    are_aliases_read: bool
    seen: set[object] = field(default_factory=set)

    def enter(self, step: object) -> bool:
        """Return whether a step is new, and remember it."""
        is_new = step not in self.seen
        self.seen.add(step)
        return is_new

    @property
    def unread(self) -> _Flow:
        """The same way where no change is read elsewhere."""
        return replace(self, is_read=False, are_aliases_read=False)


@dataclass
class EscapeFinder:
    """Follows references to plans through a file.

    Args:
        statements: the statements of the file.
        parents: the parent of each node.
    """

    statements: Sequence[ast.stmt]
    parents: Mapping[ast.AST, ast.AST]
    _local_plans: dict[ast.AST, Mapping[str, str]] = field(default_factory=dict)

    def find_escapes(self, node: ast.expr, attribute: str, *, is_known: bool) -> Iterator[Escape]:
        """Yield the escapes of the plan that an expression refers to.

        Args:
            node: the expression.
            attribute: the plan.
            is_known: whether the plan belongs to a class of the file, for which changes under local names are read.
        """
        return self._follow(node, _Flow(attribute, is_read=True, are_aliases_read=is_known))

    def find_alias_escapes(self, target: ast.expr, attribute: str) -> Iterator[Escape]:
        """Yield the escapes of a plan that is assigned to another name or attribute as well."""
        return self._follow_target(target, _Flow(attribute, is_read=True, are_aliases_read=True))

    def find_function(self, node: ast.AST) -> Function | None:
        """Return the function around a node, None in the body of a class or module."""
        parent = self.parents.get(node)
        while parent is not None and not isinstance(parent, (Function, ast.ClassDef)):
            parent = self.parents.get(parent)
        return parent if isinstance(parent, Function) else None

    def _follow(self, node: ast.AST, flow: _Flow) -> Iterator[Escape]:
        parent = self.parents.get(node)
        match parent:
            case ast.Subscript(value=holder, ctx=context) if holder is node:
                if not isinstance(context, ast.Load) and not self._is_read_holder(node, flow):
                    yield Escape(node, is_write=True)
            case ast.Attribute():
                yield from self._follow_method(node, parent, flow)
            case ast.Call(func=function) if function is not node:
                yield from self._follow_argument(node, parent, None, flow)
            case ast.keyword(arg=str(name)):
                call = self.parents[parent]
                if isinstance(call, ast.Call):
                    yield from self._follow_argument(node, call, name, flow)
                else:
                    yield Escape(node)
            case ast.Call() | ast.BoolOp():
                yield from self._follow(parent, flow)
            case ast.IfExp(test=test):
                yield from self._follow(parent, flow) if test is not node else ()
            case ast.Lambda() | ast.arguments() | ast.Yield() | ast.YieldFrom() | ast.withitem():
                yield Escape(node)
            case ast.Dict(keys=keys, values=values):
                if any(value is node and key is not None for key, value in zip(keys, values, strict=True)):
                    yield from self._follow_element(node, parent, flow)
            case ast.List() | ast.Tuple() | ast.Set():
                yield from self._follow_element(node, parent, flow)
            case ast.NamedExpr(target=target):
                yield from self._follow_target(target, flow)
                yield from self._follow(parent, flow)
            case ast.Assign() | ast.AnnAssign():
                for bound, value in iter_bindings(parent):
                    yield from self._follow_target(bound, flow) if value is node else ()
            case ast.Return():
                yield from self._follow_result(parent, flow)
            case ast.DictComp() | ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                yield Escape(node)

    def _follow_method(self, node: ast.AST, method: ast.Attribute, flow: _Flow) -> Iterator[Escape]:
        call = self.parents.get(method)
        is_called = isinstance(call, ast.Call) and call.func is method
        is_reading = method.attr in _ACCESSORS or (is_called and method.attr in _READING_METHODS)
        is_changing = method.attr in CHANGING_METHODS
        if not is_reading and not (is_called and is_changing and self._is_read_holder(node, flow)):
            yield Escape(node, is_write=is_changing)

    def _is_read_holder(self, node: ast.AST, flow: _Flow) -> bool:
        """Return whether changes of the plan are read elsewhere where an expression is its name."""
        if not isinstance(node, (ast.Attribute, ast.Name)):
            return False
        if is_plan_attribute(get_identifier(node)):
            return flow.is_read
        names = self._iter_local_plans(node) if isinstance(node, ast.Name) and flow.are_aliases_read else ()
        return any(node.id in plans for plans in names if isinstance(node, ast.Name))

    def _iter_local_plans(self, node: ast.AST) -> Iterator[Mapping[str, str]]:
        """Yield the local names for plans in each function around a node."""
        parent = self.parents.get(node)
        while parent is not None:
            if isinstance(parent, Function):
                if parent not in self._local_plans:
                    self._local_plans[parent] = find_local_plans(parent)
                yield self._local_plans[parent]
            parent = self.parents.get(parent)

    def _follow_target(self, target: ast.expr, flow: _Flow) -> Iterator[Escape]:
        """Yield the escapes of a plan through a name that it is assigned to: a function's variable only in it."""
        name = get_identifier(target)
        function = self.find_function(target) if isinstance(target, ast.Name) else None
        if not name:
            yield Escape(target)  # an item of another object
            return
        if is_plan_attribute(name) and name != flow.attribute:
            flow = flow.unread  # what is written into one plan also is in the other
        for load in self._loads.get(name, ()) if flow.enter((name, function)) else ():
            is_same = isinstance(load, ast.Attribute) or isinstance(target, ast.Name)
            if is_same and (function is None or self._is_inside(load, function)):
                yield from self._follow(load, flow)

    def _follow_argument(self, node: ast.AST, call: ast.Call, keyword: str | None, flow: _Flow) -> Iterator[Escape]:
        name = get_identifier(call.func)
        functions = self._functions.get(name, [])
        parameter = self._find_parameter(functions[0], call, node, keyword) if len(functions) == 1 else None
        if parameter is not None:
            for load in self._loads.get(parameter, ()) if flow.enter((parameter, functions[0])) else ():
                if isinstance(load, ast.Name) and self._is_inside(load, functions[0]):
                    yield from self._follow(load, flow.unread)
        elif name in _PASSING_FUNCTIONS:
            yield from self._follow(call, flow)
        elif name in CHANGING_METHODS:
            # `other.update(plan)` copies entries, `dict.update(plan, …)` changes it, `x.setdefault(key, plan)` keeps it
            is_changed = isinstance(call.func, ast.Attribute) and get_identifier(call.func.value) == "dict"
            if is_changed or name in ("setdefault", "__setitem__"):
                yield Escape(node, is_write=is_changed)
        elif not is_reading_function(call.func):
            yield Escape(node)

    def _find_parameter(self, function: Function, call: ast.Call, node: ast.AST, keyword: str | None) -> str | None:
        """Return the parameter that receives an argument, None if that is not certain."""
        arguments = [*function.args.posonlyargs, *function.args.args]
        if keyword is not None:
            names = [argument.arg for argument in (*arguments, *function.args.kwonlyargs)]
            return keyword if keyword in names else None
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return None
        is_method = isinstance(self.parents.get(function), ast.ClassDef)
        is_static = any(get_identifier(decorator) == "staticmethod" for decorator in function.decorator_list)
        index = next(number for number, argument in enumerate(call.args) if argument is node)
        index += is_method and not is_static and isinstance(call.func, ast.Attribute)
        return arguments[index].arg if index < len(arguments) else None

    def _follow_element(self, node: ast.AST, display: ast.AST, flow: _Flow) -> Iterator[Escape]:
        """Yield the escapes of an element of a display: of a loop over it, or of the unpacked value."""
        parent = self.parents.get(display)
        match parent:
            case ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values) if (
                values is display
            ):
                for part in ast.walk(target):
                    yield from self._follow_target(part, flow) if isinstance(part, ast.Name) else ()
            case ast.Assign() if any(value is node for _, value in iter_bindings(parent)):
                for target, value in iter_bindings(parent):
                    yield from self._follow_target(target, flow) if value is node else ()
            case ast.Compare():
                return
            case _:
                yield Escape(node)

    def _follow_result(self, statement: ast.AST, flow: _Flow) -> Iterator[Escape]:
        """Yield the escapes of the result of the function around a `return`: of its calls, or of a property's reads."""
        function = self.find_function(statement)
        if function is None or not flow.enter(("result", function)):
            return
        for load in self._loads.get(function.name, ()):
            call = self.parents.get(load)
            is_called = isinstance(call, ast.Call) and call.func is load
            yield from self._follow(call if is_called and call is not None else load, flow.unread)

    def _is_inside(self, node: ast.AST, function: ast.AST) -> bool:
        parent = self.parents.get(node)
        while parent is not None and parent is not function:
            parent = self.parents.get(parent)
        return parent is function

    @cached_property
    def _loads(self) -> Mapping[str, Sequence[ast.expr]]:
        loads: dict[str, list[ast.expr]] = defaultdict(list)
        for node in self.parents:
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                loads[get_identifier(node)].append(node)
        return loads

    @cached_property
    def _functions(self) -> Mapping[str, Sequence[Function]]:
        functions: dict[str, list[Function]] = defaultdict(list)
        for node in (*self.statements, *self.parents):
            if isinstance(node, Function):
                functions[node.name].append(node)
        return functions


def is_reading_function(function: ast.expr) -> bool:
    """Return whether a function is known to read or copy its arguments only."""
    name = get_identifier(function)
    return name in _READING_FUNCTIONS or name.startswith(_READING_PREFIXES) or _is_logger(function)


def _is_logger(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and any(
        word in ast.unparse(function.value).lower() for word in ("log", "warnings")
    )
