"""Style flow: which names of a file may refer to the styles of a plan, and to which plans these belong.

A style is followed from `plan.items()`, `plan.values()` or `plan[key]` through loops, comprehensions, containers,
arguments and results of the file's functions. Names are followed without regard to the order of statements, so that a
name may seem to hold a style where it does not, but no style is lost in code that the file contains.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from codemods.reading.expressions import iter_bindings
from codemods.reading.names import Function, get_identifier

__all__ = ["Carried", "StyleFlow"]

PlanNames = frozenset[tuple[str, str]]
"""Plans by class and attribute, as `Scope.resolve_class` names classes."""


@dataclass(frozen=True)
class Carried:
    """What an expression may refer to.

    Args:
        plans: the plans that it may be itself, or a copy of; what iterates over one sees keys.
        styles: the plans whose styles it may be, contain or be made from.
    """

    plans: PlanNames = frozenset()
    styles: PlanNames = frozenset()

    def __or__(self, other: Carried) -> Carried:
        return Carried(self.plans | other.plans, self.styles | other.styles)

    @property
    def values(self) -> Carried:
        """What a value of the dict is, or anything that is taken out of a container of styles."""
        return Carried(styles=self.plans | self.styles)


_NOTHING = Carried()
_SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SILENT_FUNCTIONS = frozenset(["all", "any", "bool", "hasattr", "hash", "id", "isinstance", "issubclass", "len"])
"""Functions whose result depends on no style's name."""
_KEY_FUNCTIONS = frozenset(["enumerate", "frozenset", "iter", "list", "reversed", "set", "sorted", "tuple", "zip"])
"""Functions that iterate over their arguments."""
_WRAPPERS = frozenset(["enumerate", "iter", "list", "reversed", "sorted", "tuple"])
_ADDING_METHODS = frozenset(["add", "append", "appendleft", "extend", "insert"])
_ENTRY_METHODS = frozenset(["setdefault", "update"])

_Callable = Function | ast.Lambda

_Scope = ast.AST | None
_Variable = tuple[_Scope, str]


@dataclass
class StyleFlow:
    """The styles in the names of one file.

    Args:
        nodes: the nodes of the file.
        parents: the parent of each node.
        resolve: returns what an expression names by itself, None if nothing that is known.
    """

    nodes: Sequence[ast.AST]
    parents: Mapping[ast.AST, ast.AST]
    resolve: Callable[[ast.AST], Carried | None]
    _carried: dict[_Variable, Carried] = field(default_factory=lambda: defaultdict(Carried))
    _active: set[ast.Lambda] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Steps are repeated until none brings news, so that none of them need do all of its work at once.
        steps = [step for node in self.nodes for step in self._find_steps(node)]
        has_changed = True
        while has_changed:
            has_changed = False
            for step in steps:
                has_changed |= step()

    def read(self, node: ast.AST) -> Carried:
        """Return what an expression may refer to."""
        if named := self.resolve(node):
            return named
        match node:
            case ast.Name(id=name):
                return self._carried.get((self._find_scope(node, name), name), _NOTHING)
            case ast.Attribute(value=value, attr=name):
                own = self._carried.get((None, f".{name}"), _NOTHING)
                return own | Carried(styles=self.read(value).styles)
            case ast.Call():
                return self._read_call(node)
            case ast.Subscript(value=value):
                return self.read(value).values
            case ast.DictComp(key=key, value=value):
                return Carried(self._read_all(value).styles, self.read(key).styles)
            case ast.ListComp(elt=element) | ast.SetComp(elt=element) | ast.GeneratorExp(elt=element):
                return self.read(element).values
            case ast.Dict(keys=keys, values=values):
                merged = _join(self.read(value) for key, value in zip(keys, values, strict=True) if key is None)
                styles = _join(self.read(value) for key, value in zip(keys, values, strict=True) if key is not None)
                return merged | Carried(styles.styles, styles.plans) | _join(self.read(key) for key in keys if key)
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                return self._read_all(*elements).values
            case ast.IfExp(body=body, orelse=orelse):
                return self._read_all(body, orelse)
            case ast.BoolOp(values=values):
                return self._read_all(*values)
            case ast.BinOp(left=left, right=right):
                return self._read_all(left, right)
            case ast.JoinedStr(values=values):
                return self._read_all(*values).values
            case (
                ast.NamedExpr(value=value)
                | ast.Starred(value=value)
                | ast.Await(value=value)
                | ast.FormattedValue(value=value)
                | ast.Lambda(body=value)
                | ast.keyword(value=value)
            ):
                return self.read(value)
        return _NOTHING

    def list_exports(self) -> Mapping[str, Carried]:
        """Return what other files may get from this one: by a function's, an attribute's or a variable's name."""
        exports: dict[str, Carried] = defaultdict(Carried)
        for (scope, name), carried in self._carried.items():
            if scope is None and carried != _NOTHING:
                exports[name.strip(".()")] |= carried
        return exports

    def find_functions(self, node: ast.expr) -> Sequence[_Callable]:
        """Return the functions of the file that an expression may be, by their name."""
        return [node] if isinstance(node, ast.Lambda) else self._functions.get(get_identifier(node), ())

    def _read_all(self, *nodes: ast.AST) -> Carried:
        return _join(map(self.read, nodes))

    def _read_call(self, call: ast.Call) -> Carried:
        name = get_identifier(call.func)
        arguments = self._read_all(*call.args, *call.keywords)
        if isinstance(call.func, ast.Attribute):
            owner = self.read(call.func.value)
            if owner.plans | owner.styles:
                if name in ("keys", "clear", "update"):
                    return Carried(styles=owner.styles)
                return owner if name == "copy" else owner.values
        if functions := self.find_functions(call.func):
            return _join(map(self._read_result, functions))
        if name in _SILENT_FUNCTIONS:
            return _NOTHING
        if isinstance(call.func, (ast.Name, ast.Call)):
            arguments |= self.read(call.func)  # a function of another file that gives styles, under another name
        return Carried(styles=arguments.styles) if name in _KEY_FUNCTIONS else arguments

    def _read_result(self, function: _Callable) -> Carried:
        if not isinstance(function, ast.Lambda):
            return self._carried[None, f"{function.name}()"]
        if function in self._active:  # its name is that of a method which it calls, or it calls itself
            return _NOTHING
        self._active.add(function)
        try:
            return self.read(function.body)
        finally:
            self._active.discard(function)

    def _find_steps(self, node: ast.AST) -> Iterator[Callable[[], bool]]:
        """Yield what a node does with styles: functions that bind names, and return whether that is news."""
        for bound, made in iter_bindings(node):
            yield partial(self._bind_value, bound, made)
        match node:
            case ast.AugAssign(target=target, value=value):
                yield partial(self._bind_value, target, value)
            case ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values):
                yield lambda: self._bind_loop(target, values)
            case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
                yield partial(self._bind_value, target, value)
            case ast.match_case(pattern=pattern):
                subject = getattr(self.parents.get(node), "subject", None)
                names = [name for part in ast.walk(pattern) if (name := _get_captured_name(part))]
                if subject is not None and names:
                    yield lambda: any(self._add(pattern, name, self.read(subject)) for name in names)
            case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value):
                yield partial(self._bind_result, node, value)
            case ast.YieldFrom(value=value):
                yield partial(self._bind_result, node, value)
            case ast.Call(func=ast.Attribute(value=holder, attr=method), args=[*_, value]) if method in _ADDING_METHODS:
                yield lambda: self._bind(holder, self.read(value).values)
            case ast.Call(func=ast.Attribute(value=holder, attr=method), args=[*_, value]) if method in _ENTRY_METHODS:
                yield lambda: self._bind(holder, self._hold(self.read(value)))
        if isinstance(node, ast.Call):
            yield lambda: self._bind_arguments(node)

    def _bind_result(self, node: ast.AST, value: ast.AST) -> bool:
        """Add what a function returns or yields, or a property is; return whether it is news."""
        function = self._find_function(node)
        if function is None:
            return False
        carried = self.read(value)
        if isinstance(node, ast.YieldFrom):
            carried = Carried(styles=carried.styles)
        return self._merge((None, f"{function.name}()"), carried) | self._merge((None, f".{function.name}"), carried)

    def _bind_value(self, target: ast.AST, value: ast.AST) -> bool:
        return self._bind(target, self.read(value))

    def _bind(self, target: ast.AST, carried: Carried) -> bool:
        """Add what a target refers to; return whether it is news."""
        match target:
            case ast.Name(id=name):
                return self._add(target, name, carried)
            case ast.Attribute(attr=name):
                return not self.resolve(target) and self._merge((None, f".{name}"), carried)
            case ast.Subscript(value=holder, slice=key):
                inverse = Carried(styles=self.read(key).styles)
                return self._bind(holder, self._hold(carried) | inverse)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return any(self._bind(element, carried.values) for element in elements)
            case ast.Starred(value=value):
                return self._bind(value, carried.values)
        return False

    def _hold(self, carried: Carried) -> Carried:
        """Return what a container refers to into which something is put: a dict of styles is like a plan."""
        return Carried(carried.styles, carried.plans)

    def _bind_loop(self, target: ast.expr, values: ast.expr) -> bool:
        while isinstance(values, ast.Call) and get_identifier(values.func) in _WRAPPERS and values.args:
            if get_identifier(values.func) == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
                target = target.elts[1]
            values = values.args[0]
        match values:
            case ast.Call(func=ast.Attribute(value=plan, attr="items")) if isinstance(target, ast.Tuple):
                return any(self._bind(element, self.read(plan).values) for element in target.elts[1:])
        carried = self.read(values)
        return self._bind(target, Carried(carried.styles & carried.plans, carried.styles))

    def _bind_arguments(self, call: ast.Call) -> bool:
        """Bind the parameters of the file's functions that a call may be of; return whether that is news."""
        news = False
        mapped = get_identifier(call.func) in ("map", "filter") and len(call.args) > 1
        named = self.find_functions(call.args[0]) if mapped else ()
        for function in (*self.find_functions(call.func), *named):
            arguments = function.args
            parameters = [*arguments.posonlyargs, *arguments.args]
            if isinstance(self.parents.get(function), ast.ClassDef) and isinstance(call.func, ast.Attribute):
                parameters = parameters[not _is_static(function) :]
            given = call.args[1:] if named else call.args
            for parameter, value in zip(parameters, given, strict=False):
                carried = self.read(value).values if named else self.read(value)
                news |= self._merge((function, parameter.arg), carried)
            if rest := arguments.vararg:
                more = given[len(parameters) :]
                news |= any(self._merge((function, rest.arg), self.read(one).values) for one in more)
            names = {parameter.arg for parameter in (*parameters, *arguments.kwonlyargs)}
            for keyword in call.keywords:
                if keyword.arg in names:
                    news |= self._merge((function, keyword.arg), self.read(keyword.value))
        return news

    def _add(self, node: ast.AST, name: str, carried: Carried) -> bool:
        return self._merge((self._find_scope(node, name), name), carried)

    def _merge(self, variable: _Variable, carried: Carried) -> bool:
        """Add what a variable refers to; return whether it is news."""
        merged = self._carried[variable] | carried
        is_news = merged != self._carried[variable]
        self._carried[variable] = merged
        return is_news

    def _find_scope(self, node: ast.AST, name: str) -> _Scope:
        """Return the innermost function or comprehension around a node that binds a name, None for the module."""
        parent: ast.AST | None = node
        while parent is not None:
            if isinstance(parent, _SCOPES) and name in self._bound.get(parent, ()):
                return parent
            parent = self.parents.get(parent)
        return None

    def _find_function(self, node: ast.AST) -> Function | None:
        parent = self.parents.get(node)
        while parent is not None and not isinstance(parent, Function):
            parent = self.parents.get(parent)
        return parent

    @cached_property
    def _bound(self) -> Mapping[ast.AST, set[str]]:
        """The names that each function and comprehension binds; `global` and `nonlocal` are not looked at."""
        bound: dict[ast.AST, set[str]] = defaultdict(set)
        for node in self.nodes:
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    pass
                case _:
                    name = _get_captured_name(node) or ""
            parent = self.parents.get(node) if name else None
            while parent is not None and not isinstance(parent, _SCOPES):
                parent = self.parents.get(parent)
            if parent is not None:
                bound[parent].add(name)
        return bound

    @cached_property
    def _functions(self) -> Mapping[str, Sequence[_Callable]]:
        functions: dict[str, list[_Callable]] = defaultdict(list)
        for node in self.nodes:
            if isinstance(node, Function):
                functions[node.name].append(node)
            for target, value in iter_bindings(node):
                if isinstance(value, ast.Lambda) and get_identifier(target):
                    functions[get_identifier(target)].append(value)
        return functions


def _join(parts: Iterable[Carried]) -> Carried:
    joined = _NOTHING
    for part in parts:
        joined |= part
    return joined


def _is_static(function: _Callable) -> bool:
    return isinstance(function, ast.Lambda) or any(
        get_identifier(decorator) == "staticmethod" for decorator in function.decorator_list
    )


def _get_captured_name(node: ast.AST) -> str | None:
    match node:
        case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
            return name
    return None
