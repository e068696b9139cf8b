"""Resolving names: what the definitions of a file give a name, and the values of constants in modules and classes."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from codemods.files.sources import SourceFile
from codemods.reading.entries import span
from codemods.reading.expressions import is_empty, is_plan_reference, iter_bindings, split_expression, walk_statements
from codemods.reading.scope import is_plan_attribute
from plans.plan import plan_kind

__all__ = [
    "CHANGING_METHODS",
    "Definitions",
    "Function",
    "NameResolver",
    "get_dotted_name",
    "get_identifier",
    "parse_expression",
]


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definitions:
    """The definitions of the names in a file; collected only if a plan is made from a name.

    Args:
        statements: the statements of the file.
    """

    statements: Sequence[ast.stmt]

    def resolve_constant(self, node: ast.AST, class_names: Iterable[str]) -> ast.expr | None:
        """Return the value of a name or a class attribute that is assigned once and used once in the file, or None.

        Args:
            node: the expression that names it.
            class_names: the classes whose bodies may define it; an empty name stands for the module.
        """
        values = self.find_values(node, class_names)
        name = get_identifier(node)
        return values[0] if len(values) == 1 and self._use_counts[name] == 1 and self._store_counts[name] == 1 else None

    def find_values(self, node: ast.AST, class_names: Iterable[str]) -> list[ast.expr]:
        """Return all values that module and class bodies assign to a name."""
        return [value for name in class_names for value in self._constants.get((name, get_identifier(node)), [])]

    def find_all_values(self, name: str) -> list[ast.AST]:
        """Return all values that assignments and loops of the file give to a name."""
        return [value for value in self._definers.get(name, ()) if isinstance(value, ast.expr)]

    def find_dependencies(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield an expression, and the nodes that define the names in it or change what they refer to."""
        yield node
        for name in {get_identifier(part) for part in ast.walk(node)} - {""}:
            yield from self._definers.get(name, ())

    def is_defined(self, name: str) -> bool:
        """Return whether the file binds a name in any other way than by an import."""
        return self._store_counts[name] > self._import_counts[name]

    def imports_from(self, name: str, package: str) -> bool:
        """Return whether a name is imported from a package that the file names absolutely."""
        return package in {module.partition(".")[0] for module in self._imported_modules.get(name, ())}

    def has_entries_in_class(self, node: ast.AST) -> bool:
        """Return whether an expression is an attribute that is no plan and to which a class body assigns entries."""
        name = get_identifier(node)
        return not is_plan_attribute(name) and any(
            part.has_entries
            for (class_name, constant), values in self._constants.items()
            if class_name and constant == name
            for value in values
            for part in split_expression(value)
        )

    def is_plan(self, node: ast.AST) -> bool:
        """Return whether an expression is a plan, or a name whose values are all plans, of any kind."""
        match node:
            case ast.Call(func=ast.Name(id="getattr") as function, args=[owner, name, ast.Name(id=default)]):
                values = self.find_all_values(default)
                node = ast.Call(function, [owner, name], []) if values and all(map(is_empty, values)) else node
        if is_plan_reference(node):
            return True
        values = self.find_all_values(node.id) if isinstance(node, ast.Name) else []
        return bool(values) and all(is_plan_reference(value) or _reads_other_plan(value) for value in values)

    @cached_property
    def imported(self) -> frozenset[str]:
        """The names that the file imports, at any depth; of dotted ones the first part."""
        return frozenset(name.partition(".")[0] for name in self._import_counts)

    @cached_property
    def _import_counts(self) -> Counter[str]:
        imports = (
            one for one in _iter_all_statements(self.statements) if isinstance(one, (ast.Import, ast.ImportFrom))
        )
        return Counter(name for one in imports for alias in one.names for name in _iter_bound_names(alias))

    @cached_property
    def _imported_modules(self) -> Mapping[str, Sequence[str]]:
        """The modules that each imported name comes from, those of relative imports empty."""
        modules: dict[str, list[str]] = defaultdict(list)
        for one in _iter_all_statements(self.statements):
            if isinstance(one, (ast.Import, ast.ImportFrom)):
                for alias in one.names:
                    source = alias.name if isinstance(one, ast.Import) else "" if one.level else one.module or ""
                    for name in _iter_bound_names(alias):
                        modules[name.partition(".")[0]].append(source)
        return modules

    @cached_property
    def classes(self) -> frozenset[str]:
        """The names of the classes at the top level of the file."""
        return frozenset(statement.name for statement in self.statements if isinstance(statement, ast.ClassDef))

    @cached_property
    def _constants(self) -> Mapping[tuple[str, str], list[ast.expr]]:
        constants: dict[tuple[str, str], list[ast.expr]] = defaultdict(list)
        for class_name, statement in _iter_outside_functions(self.statements):
            for target, value in iter_bindings(statement):
                if isinstance(target, ast.Name):
                    constants[class_name, target.id].append(value)
        return constants

    @cached_property
    def _use_counts(self) -> Counter[str]:
        return Counter(get_identifier(node) for node in self._nodes if isinstance(getattr(node, "ctx", None), ast.Load))

    @cached_property
    def _store_counts(self) -> Counter[str]:
        return Counter(name for node in self._nodes for name in _iter_bound_names(node))

    @cached_property
    def _nodes(self) -> Sequence[ast.AST]:
        return tuple(walk_statements(self.statements))

    @cached_property
    def _definers(self) -> Mapping[str, list[ast.AST]]:
        definers: dict[str, list[ast.AST]] = defaultdict(list)
        for node in self._nodes:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    definers[name].append(node)
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    for part in ast.walk(target):
                        definers[get_identifier(part)].append(value)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name))):
                    definers[name].append(node)
            for target, value in iter_bindings(node):
                definers[get_identifier(target)].append(value)
                if isinstance(target, ast.Subscript):
                    definers[get_identifier(target.value)].append(target)
        return definers


def _reads_other_plan(node: ast.AST) -> bool:
    match node:
        case (
            ast.Attribute(attr=name)
            | ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_])
        ):
            return name.endswith("_plan")
    return False


def get_identifier(node: ast.AST) -> str:
    """Return the last part of a name or an attribute, empty for any other node."""
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def get_dotted_name(node: ast.AST) -> str | None:
    """Return the text of a dotted name, None for any other expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=holder, attr=name):
            prefix = get_dotted_name(holder)
            return prefix and f"{prefix}.{name}"
    return None


def _iter_outside_functions(statements: Sequence[ast.stmt], class_name: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for statement in statements:
        yield class_name, statement
        if isinstance(statement, ast.ClassDef):
            yield from _iter_outside_functions(
                statement.body, f"{class_name}.{statement.name}" if class_name else statement.name
            )


def _iter_all_statements(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements and those in their blocks, without a look at their expressions."""
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.stmt):
            yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            block = getattr(node, name, ())
            pending += block if isinstance(block, list) else ()


def _iter_bound_names(node: ast.AST) -> Iterator[str]:
    """Yield the name that a node binds."""
    match node:
        case ast.Name(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
            yield get_identifier(node)
        case ast.arg(arg=name) | ast.alias(asname=str(name)) | ast.alias(asname=None, name=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name


CHANGING_METHODS = frozenset(
    {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__", "__ior__"}
)
"""Methods that change a dict."""


@dataclass(frozen=True)
class NameResolver:
    """Resolves the names in a file.

    Args:
        source: the file.
        statements: the statements that it consists of.
    """

    source: SourceFile
    statements: Sequence[ast.stmt]

    @cached_property
    def definitions(self) -> Definitions:
        """The definitions of the names in the file."""
        return Definitions(self.statements)

    def resolve_constant(self, name: str, scope: str = "") -> ast.expr | None:
        """Return the only value of a name, or None if it is assigned twice, is a parameter, or is changed in place.

        Args:
            name: the name, dotted for an attribute of a class.
            scope: the qualified name of the class in which it is used.
        """
        if name.rpartition(".")[2] in self._unstable_names:
            return None
        names = (f"{scope}.{name}", name) if scope else (name,)
        return next((self._constants[key] for key in names if key in self._constants), None)

    def collect_dependencies(self, node: ast.AST) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the source texts of an expression and everything it depends on, and the names in them.

        The names of plans are not followed, nor are the names in the bodies of classes.
        """
        texts: dict[str, None] = {ast.unparse(node): None}
        names: dict[str, None] = dict.fromkeys(_iter_free_names(node))
        pending = list(names)
        while pending:
            for part in self.definitions.find_dependencies(ast.Name(id=pending.pop())):
                text = ast.unparse(part)
                if isinstance(part, ast.Name) or text in texts:
                    continue
                texts[text] = None
                if not isinstance(part, ast.ClassDef):
                    new_names = [name for name in _iter_free_names(part) if name not in names]
                    names |= dict.fromkeys(new_names)
                    pending += new_names
        return tuple(sorted(texts)), frozenset(names)

    def parse_span(self, place: tuple[int, int]) -> ast.AST:
        """Return the expression at a span of the text."""
        return self._expressions.get(place) or parse_expression(self.source.body[slice(*place)].decode())

    def find_statement(self, line: int) -> tuple[str, ast.stmt]:
        """Return the name of the enclosing function, empty if there is none, and the innermost statement on a line."""
        function = ""
        innermost: ast.stmt | None = None
        pending = list(self.statements)
        while pending:
            statement = pending.pop()
            if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
                function = innermost.name if isinstance(innermost, Function) else function
                innermost = statement
                pending = [node for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement]
        assert innermost is not None
        return function, innermost

    @cached_property
    def _expressions(self) -> Mapping[tuple[int, int], ast.expr]:
        nodes = (node for node in walk_statements(self.statements) if isinstance(node, ast.expr))
        return {span(node, self.source.offset): node for node in nodes}

    @cached_property
    def _constants(self) -> Mapping[str, ast.expr]:
        return dict(_iter_constants(self.statements, ""))

    @cached_property
    def _unstable_names(self) -> frozenset[str]:
        """The names that are bound more than once or are parameters, or whose values are changed in place."""
        nodes = [node for statement in self.statements for node in ast.walk(statement)]
        bound = Counter(get_identifier(node) for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store))
        changed = {name for node in nodes for name in _iter_changed_names(node)}
        return frozenset({name for name, times in bound.items() if times > 1} | changed)


def parse_expression(text: str) -> ast.AST:
    """Return the node of an expression, or of an item assignment, from its text."""
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
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in CHANGING_METHODS:
            yield get_identifier(holder)


def _iter_free_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node reads, without the names that it binds itself and the names of plans."""
    parts = list(ast.walk(node))
    own = {get_identifier(part) for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)}
    own |= {part.arg for part in parts if isinstance(part, ast.arg)}
    for part in parts:
        name = get_identifier(part)
        if name and name not in own and not plan_kind(name):
            yield name
            yield get_dotted_name(part) or name
