"""Plan literals: every place in a file that writes plan entries down, and the entries it writes.

In a class body a plan attribute is assigned a dict display. In functions plans are also built by code: `self.plan =`,
`|=`, `.update(…)`, `.setdefault(…)`, `plan[key] = style`, through a local name, in loops and branches, with f-strings
for keys; and calls are given plans as arguments, `from_pretrained(tp_plan={…})`. What one expression writes is one
literal.
"""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from codemods.entries import Entry, read_entries
from codemods.module import ClassPlans, Condition, Module, Opaque, PlanLiteral, is_plan_attribute, plan_words
from codemods.sources import Source, shown
from plans.errors import SourceError
from plans.plan import plan_kind

__all__ = ["read_module"]

_NEAR = 200  # bytes before a key in which what opens it is looked for


def read_module(source: Source) -> Module:
    """Read a file's classes with their plans, and where it imports names from.

    Raises:
        SourceError: the file does not parse.
    """
    try:
        return _read(source, _parse(source).body)
    except RecursionError as error:
        raise SourceError(
            f"{shown(source.path)}: nested too deeply to be read", hint="leave it out", path=str(source.path)
        ) from error


def _read(source: Source, statements: Sequence[ast.stmt]) -> Module:
    lines = tuple(bisect_right(source.line_offsets, start) for start, _ in plan_words(source.body))
    reader = _Reader(source, lines)
    classes = {found.name: found for found in reader.classes(statements)}
    if outside := tuple(reader.literals(statements, "", "", ())):
        classes[""] = ClassPlans("", code=outside)
    return Module(classes, dict(_imports(statements)))


def _parse(source: Source) -> ast.Module:
    try:
        return ast.parse(source.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        raise SourceError(
            f"{shown(source.path)}:{line}: does not parse: {reason}",
            hint="mend the file or leave it out",
            path=str(source.path),
            line=line,
        ) from error


def _imports(statements: Sequence[ast.stmt]) -> Iterator[tuple[str, tuple[int, str]]]:
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                yield alias.asname or alias.name, (statement.level, statement.module)


@dataclass(frozen=True)
class _Reader:
    """Walks a file, into those statements only that a line with a plan's name lies in.

    Args:
        source: the file.
        lines: the lines with a plan's name, in order.
        names: local names that stand for a plan, with its attribute.
    """

    source: Source
    lines: tuple[int, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def classes(self, statements: Sequence[ast.stmt], outer: str = "") -> Iterator[ClassPlans]:
        """Yield the classes among statements, however deep, under their qualified names."""
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                name = f"{outer}{statement.name}"
                bases = tuple(filter(None, map(_dotted, statement.bases)))
                if self._mentions(statement):
                    yield self._class(statement, name, bases)
                    yield from self.classes(statement.body, f"{name}.")
                else:
                    yield ClassPlans(name, bases)
            elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for block, _ in _blocks(statement):
                    yield from self.classes(block, outer)

    def literals(
        self, statements: Sequence[ast.stmt], owner: str, function: str, conditions: tuple[Condition, ...]
    ) -> Iterator[PlanLiteral]:
        """Yield the literals of functions and calls below some statements, classes left out."""
        for statement in statements:
            if isinstance(statement, ast.ClassDef) or not (self.names or self._mentions(statement)):
                continue
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = _Reader(self.source, self.lines, _aliases(statement))
                yield from inner.literals(statement.body, owner, statement.name, ())
                continue
            for attribute, expression in self._assigned(statement, function):
                if literal := self._literal(expression, owner, attribute, function, conditions):
                    yield literal
            for block, around in _blocks(statement):
                yield from self.literals(block, owner, function, (*conditions, *around))

    def _class(self, definition: ast.ClassDef, qualified: str, bases: tuple[str, ...]) -> ClassPlans:
        plans: dict[str, PlanLiteral | Opaque] = {}
        others: list[ast.stmt] = []
        for statement in definition.body:
            target = _class_level_plan(statement)
            if target is None:
                others.append(statement)
                continue
            name, value = target
            literal = self._literal(value, qualified, name, "", ())
            plans[name] = literal or Opaque(qualified, name, statement.lineno)
        code = tuple(self.literals(others, qualified, "", ()))
        return ClassPlans(qualified, bases, plans, code)

    def _literal(
        self, node: ast.AST, owner: str, attribute: str, function: str, conditions: tuple[Condition, ...]
    ) -> PlanLiteral | None:
        entries = tuple(map(self._placed, read_entries(node, self.source.offset)))
        if not entries and not isinstance(node, ast.Dict):
            return None
        line = getattr(node, "lineno", 1)
        return PlanLiteral(owner, attribute, line, entries, function, conditions, _takes_in(node))

    def _placed(self, entry: Entry) -> Entry:
        """Take back that an entry can precede one whose key stands in parentheses: it would land inside of them."""
        start = entry.key_span[0]
        opened = self.source.body[max(0, start - _NEAR) : start].rstrip().endswith(b"(")
        return replace(entry, can_precede=False) if opened else entry

    def _mentions(self, node: ast.stmt) -> bool:
        following = bisect_left(self.lines, _first_line(node))
        return following < len(self.lines) and self.lines[following] <= (node.end_lineno or node.lineno)

    def _assigned(self, statement: ast.stmt, function: str) -> Iterator[tuple[str, ast.AST]]:
        """Yield what a statement itself, not the blocks in it, writes into plans: attribute and expression."""
        match statement:
            case ast.Assign(targets=[ast.Subscript(value=holder)]) if plan := self._plan_of(holder):
                yield plan, statement
            case ast.Assign(targets=targets, value=value) if plan := self._plan_among(targets):
                yield plan, value
            case ast.AnnAssign(target=target, value=ast.expr() as value) if plan := self._plan_of(target):
                yield plan, value
            case ast.AugAssign(target=target, op=ast.BitOr(), value=value) if plan := self._plan_of(target):
                yield plan, value
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder, attr="update" | "setdefault")) as call):
                if plan := self._plan_of(holder):
                    yield plan, call
            case ast.Return(value=ast.expr() as value) if plan_kind(function):
                yield function, value
        yield from _plan_arguments(statement)

    def _plan_among(self, nodes: Sequence[ast.expr]) -> str | None:
        return next(filter(None, map(self._plan_of, nodes)), None)

    def _plan_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name):
            return self.names.get(node.id) or (node.id if is_plan_attribute(node.id) else None)
        return None


def _class_level_plan(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    match statement:
        case ast.Assign(targets=targets, value=value):
            names = (target.id for target in targets if isinstance(target, ast.Name))
            name = next(filter(is_plan_attribute, names), None)
            return (name, value) if name else None
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if is_plan_attribute(name):
            return name, value
    return None


def _takes_in(node: ast.AST) -> bool:
    """Say whether an expression takes in entries from elsewhere than plans of the same object: `{**BASE, …}`."""
    taken: list[ast.expr] = []
    for part in ast.walk(node):
        match part:
            case ast.Dict(keys=keys, values=values):
                taken += [value for key, value in zip(keys, values, strict=True) if key is None]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                taken += [left, right]
            case ast.Call(func=ast.Name(id="dict"), args=arguments):
                taken += arguments
    return not all(_is_written_here(value) for value in taken)


def _is_written_here(value: ast.expr) -> bool:
    """Say whether what is taken in is written out in place, or is this object's own plan or a copy of it."""
    match value:
        case ast.Dict() | ast.DictComp() | ast.List() | ast.Tuple() | ast.BinOp():
            return True
        case ast.Call(func=ast.Attribute(value=holder, attr="copy"), args=[]):
            return _is_written_here(holder)
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return is_plan_attribute(name)
    return False


def _aliases(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    """Return the local names that a function makes from one plan, or makes one plan from, with the plan's attribute.

    A name that stands for two plans in turn stands for none here.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            match node.targets[0], node.value:
                case ast.Attribute(attr=plan), ast.Name(id=name) if is_plan_attribute(plan):
                    names[name].add(plan)
                case ast.Name(id=name), value if not is_plan_attribute(name):
                    read = [part.attr for part in ast.walk(value) if isinstance(part, ast.Attribute)]
                    names[name].update(filter(is_plan_attribute, read))
    return {name: next(iter(plans)) for name, plans in names.items() if len(plans) == 1}


def _plan_arguments(statement: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    for expression in _own_expressions(statement):
        for node in ast.walk(expression):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg and plan_kind(keyword.arg):
                    yield keyword.arg, keyword.value


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield child


def _blocks(statement: ast.stmt) -> Iterator[tuple[Sequence[ast.stmt], tuple[Condition, ...]]]:
    """Yield the blocks of a compound statement with the condition that each adds."""
    if isinstance(statement, ast.If):
        test = ast.unparse(statement.test)
        yield statement.body, (Condition(test, True),)
        yield statement.orelse, (Condition(test, False),)
        return
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, ()), ()
    for handler in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        yield handler.body, ()


def _first_line(node: ast.stmt) -> int:
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", ())
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        prefix = _dotted(node.value)
        return prefix and f"{prefix}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None
