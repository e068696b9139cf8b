"""Names that stand for plans: local names of a function, and constants of a module or class."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from codemods.files.sources import SourceFile
from codemods.reading.expressions import iter_bindings, split_expression
from codemods.reading.scope import is_plan_attribute
from plans.plan import is_expert_parallel, plan_kind

__all__ = [
    "Definitions",
    "Function",
    "NameResolver",
    "find_free_parameters",
    "find_local_plans",
    "get_dotted_name",
    "get_identifier",
    "parse_expression",
]


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definitions:
    """What the names of a file are defined as; looked for only where a plan is made from a name.

    Args:
        statements: the file's.
    """

    statements: Sequence[ast.stmt]

    def resolve_constant(self, node: ast.AST, class_names: Iterable[str]) -> ast.expr | None:
        """Return what a name, or an attribute of a class, stands for: assigned once and used once in the file.

        Args:
            node: an expression.
            class_names: the classes, empty for the module, whose bodies may define it.
        """
        values = self.find_values(node, class_names)
        name = get_identifier(node)
        return values[0] if len(values) == 1 and self._use_counts[name] == 1 and self._store_counts[name] == 1 else None

    def find_values(self, node: ast.AST, class_names: Iterable[str]) -> list[ast.expr]:
        """Return all that module and class bodies define a name as."""
        return [value for home in class_names for value in self._constants.get((home, get_identifier(node)), [])]

    def find_dependencies(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield an expression and whatever defines the names in it, or is put into what they name."""
        yield node
        for name in {get_identifier(part) for part in ast.walk(node)} - {""}:
            yield from self._definers.get(name, ())

    @cached_property
    def classes(self) -> frozenset[str]:
        """The names of the classes that stand at the top of the file."""
        return frozenset(one.name for one in self.statements if isinstance(one, ast.ClassDef))

    @cached_property
    def _constants(self) -> Mapping[tuple[str, str], list[ast.expr]]:
        found: dict[tuple[str, str], list[ast.expr]] = defaultdict(list)
        for home, statement in _iter_outside_functions(self.statements):
            for target, value in iter_bindings(statement):
                if isinstance(target, ast.Name):
                    found[home, target.id].append(value)
        return found

    @cached_property
    def _use_counts(self) -> Counter[str]:
        return Counter(
            get_identifier(node) for node in self._iter_nodes() if isinstance(getattr(node, "ctx", None), ast.Load)
        )

    @cached_property
    def _store_counts(self) -> Counter[str]:
        return Counter(name for node in self._iter_nodes() for name in _iter_bound_names(node))

    def _iter_nodes(self) -> Iterator[ast.AST]:
        return (node for statement in self.statements for node in ast.walk(statement))

    @cached_property
    def _definers(self) -> Mapping[str, list[ast.AST]]:
        found: dict[str, list[ast.AST]] = defaultdict(list)
        for node in self._iter_nodes():
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    found[name].append(node)
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    for part in ast.walk(target):
                        found[get_identifier(part)].append(value)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name))):
                    found[name].append(node)
            for target, value in iter_bindings(node):
                found[get_identifier(target)].append(value)
                if isinstance(target, ast.Subscript):
                    found[get_identifier(target.value)].append(target)
        return found


def get_identifier(node: ast.AST) -> str:
    """Return the name that a name or an attribute ends with, empty for any other node."""
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def get_dotted_name(node: ast.AST) -> str | None:
    """Return a dotted name as text, None for any other expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=holder, attr=name):
            before = get_dotted_name(holder)
            return before and f"{before}.{name}"
    return None


def find_free_parameters(function: Function) -> frozenset[str]:
    """Return the parameters of a function that have no value of their own: their callers say what they are."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return frozenset(one.arg for one, value in pairs if value is None or ast.unparse(value) == "None")


def find_local_plans(function: Function) -> dict[str, str]:
    """Return the local names that a function makes from one plan, or makes one plan from, with the plan's attribute.

    A name that stands for plans of two kinds in turn stands for none here; nor does one that is no variable of the
    function, or that is made from a plan, then from something else, and never put into a plan.
    """
    found = _read_local_names(function).items()
    return {name: plan for name, local in found if not is_plan_attribute(name) and (plan := local.plan)}


@dataclass
class _LocalName:
    """What a function does with a name.

    Args:
        assigned: whether it gives the name a value.
        has_other_value: whether one of these values is made from neither a plan nor the name itself.
        source_plans: the plans that the values are made from.
        target_plans: the plans that the name is put into.
    """

    assigned: bool = False
    has_other_value: bool = False
    source_plans: set[str] = field(default_factory=set)
    target_plans: set[str] = field(default_factory=set)

    @property
    def plan(self) -> str | None:
        """The plan that the name stands for, None where there is none, or plans of two kinds."""
        plans = self.source_plans | self.target_plans
        left = self.has_other_value and not self.target_plans
        if not self.assigned or left or len({plan_kind(plan) for plan in plans}) != 1:
            return None
        return min(plans, key=lambda plan: (not is_plan_attribute(plan), plan))


def _read_local_names(function: Function) -> Mapping[str, _LocalName]:
    found: dict[str, _LocalName] = defaultdict(_LocalName)
    for node in ast.walk(function):
        for target, value in iter_bindings(node):
            if isinstance(target, ast.Name):
                read, local = set(_iter_plan_reads(value)), found[target.id]
                local.assigned = True
                local.has_other_value |= not (read or _has_name(value, target.id))
                local.source_plans |= read
        for name, plan in _iter_loop_plans(node):
            found[name].assigned = True
            found[name].source_plans.add(plan)
        for plan, value in _iter_plan_writes(node, function.name):
            for piece in split_expression(value):
                if isinstance(piece.node, ast.Name):
                    found[piece.node.id].target_plans.add(plan)
    return found


def _iter_plan_writes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a node writes into a plan that it names itself: the plan's attribute, and an expression.

    Args:
        node: any part of a function.
        function: its name.
    """
    for target, value in iter_bindings(node):
        if isinstance(target, ast.Attribute) and is_plan_attribute(target.attr):
            yield target.attr, value
    match node:
        case ast.AugAssign(target=ast.Attribute(attr=plan), op=ast.BitOr(), value=value) if is_plan_attribute(plan):
            yield plan, value
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=plan), attr="update")) if is_plan_attribute(plan):
            yield plan, node
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(plan)), value]) if plan_kind(plan):
            yield plan, value
        case ast.Call(keywords=keywords):
            yield from ((one.arg, one.value) for one in keywords if one.arg and plan_kind(one.arg))
        case ast.Return(value=ast.expr() as value) if plan_kind(function):
            yield function, value


def _iter_plan_reads(value: ast.expr) -> Iterator[str]:
    for piece in split_expression(value):
        match piece.node:
            case ast.Attribute(attr=plan) if is_plan_attribute(plan):
                yield plan
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(plan)), *_]) if plan_kind(plan):
                yield plan


def _has_name(value: ast.expr, name: str) -> bool:
    return any(isinstance(piece.node, ast.Name) and piece.node.id == name for piece in split_expression(value))


def _iter_loop_plans(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the name of a loop over plans with the first of them; the others are made of the same entries."""
    match node:
        case ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=plans) | ast.List(elts=plans)):
            read = [plan for element in plans for plan in _iter_plan_reads(element)]
            if len(read) == len(plans) > 0 and len({is_expert_parallel(plan) for plan in read}) == 1:
                yield name, read[0]


def _iter_outside_functions(statements: Sequence[ast.stmt], class_name: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for statement in statements:
        yield class_name, statement
        if isinstance(statement, ast.ClassDef):
            yield from _iter_outside_functions(
                statement.body, f"{class_name}.{statement.name}" if class_name else statement.name
            )


def _iter_bound_names(node: ast.AST) -> Iterator[str]:
    """Yield the name that a node gives a meaning to."""
    match node:
        case ast.Name(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
            yield get_identifier(node)
        case ast.arg(arg=name) | ast.alias(asname=str(name)) | ast.alias(asname=None, name=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name


_MUTATING_METHODS = frozenset(
    {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__", "__ior__"}
)


@dataclass(frozen=True)
class NameResolver:
    """Looks up what a file's names are defined as.

    Args:
        source: the file, which parses.
    """

    source: SourceFile

    @cached_property
    def definitions(self) -> Definitions:
        """What the names of the file are defined as."""
        return Definitions(self._statements)

    def resolve_constant(self, name: str, scope: str = "") -> ast.expr | None:
        """Return what a name always stands for; None where it is assigned twice, is a parameter, or is changed.

        Args:
            name: dotted where it is an attribute of a class.
            scope: the qualified name of the class that it is used in.
        """
        if name.rpartition(".")[2] in self._unstable_names:
            return None
        names = (f"{scope}.{name}", name) if scope else (name,)
        return next((self._constants[one] for one in names if one in self._constants), None)

    def collect_dependencies(self, node: ast.AST) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the texts that an expression is made of, and the names in them.

        Plans' own names are not followed, nor what is defined in classes that are named.
        """
        found: dict[str, None] = {ast.unparse(node): None}
        names: dict[str, None] = dict.fromkeys(_iter_free_names(node))
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            for part in self.definitions.find_dependencies(ast.Name(id=name)):
                text = ast.unparse(part)
                if isinstance(part, ast.Name) or text in found:
                    continue
                found[text] = None
                new = (
                    []
                    if isinstance(part, ast.ClassDef)
                    else [one for one in _iter_free_names(part) if one not in names]
                )
                names |= dict.fromkeys(new)
                waiting += new
        return tuple(sorted(found)), frozenset(names)

    def parse_span(self, span: tuple[int, int]) -> ast.AST:
        """Return the expression that stands at a place in the text."""
        return parse_expression(self.source.body[slice(*span)].decode())

    def find_statement(self, line: int) -> tuple[str, ast.stmt]:
        """Return the innermost statement that holds a line of code, with the function around it, empty without one."""
        function = ""
        found: ast.stmt | None = None
        waiting = list(self._statements)
        while waiting:
            one = waiting.pop()
            if one.lineno <= line <= (one.end_lineno or one.lineno):
                function = found.name if isinstance(found, Function) else function
                found = one
                waiting = [part for part in ast.walk(one) if isinstance(part, ast.stmt) and part is not one]
        assert found is not None
        return function, found

    @cached_property
    def _statements(self) -> Sequence[ast.stmt]:
        return ast.parse(self.source.body).body

    @cached_property
    def _constants(self) -> Mapping[str, ast.expr]:
        return dict(_iter_constants(self._statements, ""))

    @cached_property
    def _unstable_names(self) -> frozenset[str]:
        """The names that are bound more than once, bound by calls, or whose values are changed in place."""
        nodes = [node for statement in self._statements for node in ast.walk(statement)]
        bound = Counter(get_identifier(node) for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store))
        changed = {name for node in nodes for name in _iter_changed_names(node)}
        return frozenset({name for name, times in bound.items() if times > 1} | changed)


def parse_expression(text: str) -> ast.AST:
    """Return an expression, or an item assignment, from its text."""
    try:
        return ast.parse(f"({text}\n)", mode="eval").body
    except SyntaxError:
        return ast.parse(text).body[0]


def _iter_constants(statements: Sequence[ast.stmt], scope: str) -> Iterator[tuple[str, ast.expr]]:
    for statement in statements:
        for target, value in iter_bindings(statement):
            if isinstance(target, ast.Name):
                yield f"{scope}{target.id}", value
        if isinstance(statement, ast.ClassDef):
            yield from _iter_constants(statement.body, f"{scope}{statement.name}.")


def _iter_changed_names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.arg(arg=name):
            yield name
        case ast.Subscript(value=holder, ctx=ast.Store() | ast.Del()):
            yield get_identifier(holder)
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _MUTATING_METHODS:
            yield get_identifier(holder)


def _iter_free_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a piece of code reads, without those that it binds itself and those of plans."""
    parts = list(ast.walk(node))
    own = {get_identifier(part) for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)}
    own |= {part.arg for part in parts if isinstance(part, ast.arg)}
    for part in parts:
        name = get_identifier(part)
        if name and name not in own and not plan_kind(name):
            yield name
            yield get_dotted_name(part) or name
