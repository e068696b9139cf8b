"""Code that tells styles apart by their names, and so changes its meaning when a plan's styles are renamed.

A comparison, a `match`, a lookup in a table and a test of a string's parts are read; what else a style is handed to may
read its name. What the library around the models does with names is left out by those who ask: it is part of a dialect.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from codemods.reading.escapes import is_reading_function
from codemods.reading.module import Conflict, StyleReading
from codemods.reading.names import Definitions, get_dotted_name, get_identifier
from codemods.reading.scope import ANY_CLASS, is_plan_attribute
from codemods.reading.style_flow import PlanNames, StyleFlow
from plans.plan import plan_kind

__all__ = ["StyleReader"]

_REGISTRY = "ALL_PARALLEL_STYLES"
"""The framework's own table of styles, which has the new names too."""
_FRAMEWORK = "transformers"
_LOOKUPS = frozenset(["__contains__", "__getitem__", "get", "pop"])
_PART_TESTS = frozenset(["startswith", "endswith"])
_PART_METHODS = frozenset(["find", "partition", "removeprefix", "removesuffix", "replace", "rpartition", "split"])
_STRING_METHODS = frozenset(["casefold", "lower", "removeprefix", "removesuffix", "replace", "str", "strip", "upper"])
_MEMBER_METHODS = frozenset(["count", "index", "remove"])
_CONTAINER_FUNCTIONS = frozenset(["dict", "frozenset", "items", "list", "set", "sorted", "tuple", "values"])
_OPERATORS = frozenset(["__call__", "__enter__", "__getitem__", "__iter__", "__missing__", "__next__", "__reversed__"])
"""Methods that other files call without their names."""
_COUNTING = frozenset(["Counter", "OrderedDict", "defaultdict", "dict", "set"])
_WRITING_METHODS = frozenset(
    ["add", "append", "discard", "extend", "format", "insert", "join", "setdefault", "update", "write", "writerow"]
)
_TELLS = "tells styles apart by name"
_UNKNOWN = "compares styles with names that cannot be read"
_LOOKS_UP = "looks styles up by name"
_HANDS = "hands styles to code that may tell them apart by name"


@dataclass(frozen=True)
class StyleReader:
    """Finds the code of a file that tells the styles of plans apart by name.

    Args:
        flow: the styles in the names of the file.
        definitions: the definitions of the names in the file.
        get_function: returns the name of the function around a node, empty outside of functions.
    """

    flow: StyleFlow
    definitions: Definitions
    get_function: Callable[[ast.AST], str]

    def find_conflicts(self) -> Iterator[Conflict]:
        """Yield why plans must keep the names of their styles."""
        for conflict in self.find_readings():
            yield from self._reach(conflict)

    def find_readings(self) -> Iterator[Conflict]:
        """Yield the same, each once for every plan whose styles may arrive there."""
        for node in self.flow.nodes:
            for plans, reason, reading in self._find_readings(node):
                line, function = getattr(node, "lineno", 1), self.get_function(node)
                for class_name, attribute in sorted(plans):
                    if reading.is_known or is_plan_attribute(attribute):
                        yield Conflict(class_name, attribute, None, line, reason, function, reading)

    def _reach(self, conflict: Conflict) -> Iterator[Conflict]:
        """Yield a conflict for the plans whose styles arrive where one is read.

        A model's plan has the styles of its configuration's plan, which is in the same folder if the class is of this
        file, and anywhere in the tree if it is not.
        """
        is_unknown = conflict.class_name == ANY_CLASS
        if not is_unknown:
            yield conflict
        if is_unknown or not conflict.attribute.startswith("base_model_"):
            is_own = not is_unknown and conflict.class_name in (*self.definitions.classes, "")
            attribute = conflict.attribute
            if not attribute.startswith("base_model_"):
                attribute = f"*{plan_kind(attribute)}_plan"
            reading = replace(conflict.reading or StyleReading(), reaches_tree=not is_own)
            yield replace(conflict, class_name=ANY_CLASS, attribute=attribute, reading=reading)

    def _find_readings(self, node: ast.AST) -> Iterator[tuple[PlanNames, str, StyleReading]]:
        match node:
            case ast.Compare(left=left, ops=operators, comparators=others):
                operands = [left, *others]
                for operator, one, other in zip(operators, operands, others, strict=False):
                    yield from self._read_comparison(node, operator, one, other)
            case ast.Match(subject=subject):
                carried = self.flow.read(subject)
                names = self._read_cases(node)
                if names is None:
                    yield carried.plans | carried.styles, _UNKNOWN, StyleReading(is_known=False)
                elif names:
                    yield carried.plans | carried.styles, _TELLS, names
            case ast.Subscript(value=table, slice=key, ctx=ast.Load()):
                yield from self._read_lookup(table, key, is_required=True)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, key, *_]):
                yield self.flow.read(key).styles, _LOOKS_UP, StyleReading(is_known=False)
            case ast.Call(func=ast.Attribute(value=table, attr=method), args=[key, *_]) if method in _LOOKUPS:
                yield from self._read_lookup(table, key, is_required=method == "__getitem__")
            case ast.Call(func=ast.Attribute(value=style, attr=method), args=[part, *_]) if method in (
                _PART_TESTS | _PART_METHODS | _MEMBER_METHODS
            ) and (plans := self.flow.read(style).styles):
                yield from self._read_part(plans, style, method, part)
            case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value):
                if self.get_function(node) in _OPERATORS:
                    carried = self.flow.read(value)
                    yield carried.plans | carried.styles, _HANDS, StyleReading(is_known=False)
            case ast.Call(args=arguments, keywords=keywords) if not self._is_harmless(node):
                for value in (*arguments, *(keyword.value for keyword in keywords)):
                    yield self.flow.read(value).styles, _HANDS, StyleReading(is_known=False)

    def _read_comparison(
        self, node: ast.Compare, operator: ast.cmpop, one: ast.expr, other: ast.expr
    ) -> Iterator[tuple[PlanNames, str, StyleReading]]:
        first, second = self.flow.read(one), self.flow.read(other)
        if isinstance(operator, (ast.In, ast.NotIn)):
            if second.styles and not first.styles:
                yield from self._read_part(second.styles, other, "__contains__", one)
            elif first.styles and not (second.styles or second.plans):
                yield from self._read_names(first.styles, one, other)
        elif isinstance(operator, (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)):
            plans, others = first.styles | first.plans, second.styles | second.plans
            if plans and not others:
                yield from self._read_names(plans, one, other, self._find_alternatives(node, operator))
            elif others and not plans:
                yield from self._read_names(others, other, one, self._find_alternatives(node, operator))

    def _find_alternatives(self, node: ast.Compare, operator: ast.cmpop) -> list[ast.expr]:
        """Return what else the same condition compares with, `style == "a" or style == "b"`."""
        parent = self.flow.parents.get(node)
        joining = ast.Or if isinstance(operator, (ast.Eq, ast.Is)) else ast.And
        if not isinstance(parent, ast.BoolOp) or not isinstance(parent.op, joining):
            return []
        compared = [part for part in parent.values if isinstance(part, ast.Compare) and len(part.ops) == 1]
        return [part.comparators[0] for part in compared if isinstance(part.ops[0], type(operator))]

    def _read_names(
        self, plans: PlanNames, style: ast.expr, names: ast.expr, more: Iterable[ast.expr] = ()
    ) -> Iterator[tuple[PlanNames, str, StyleReading]]:
        """Yield the reading of a style that is compared with names."""
        found = self._find_names(names)
        if found is None:
            if not _is_registry(names):
                yield plans, _UNKNOWN, StyleReading(is_known=False)
            return
        found += [name for node in more for name in self._find_names(node) or ()]
        is_plain = isinstance(style, (ast.Name, ast.Attribute, ast.Subscript)) and not self._is_part(style)
        is_whole_plan = bool(self.flow.read(style).plans)
        outcomes = tuple((name, name if is_whole_plan else "=") for name in dict.fromkeys(found))
        if found:
            yield plans, _TELLS, StyleReading(outcomes, () if is_plain else _test_parts(found))

    def _is_part(self, style: ast.expr) -> bool:
        """Return whether an item of something is a part of a style, `style.split("_")[0]`."""
        return isinstance(style, ast.Subscript) and not self.flow.read(style.value).plans

    def _read_part(
        self, plans: PlanNames, style: ast.expr, method: str, part: ast.expr
    ) -> Iterator[tuple[PlanNames, str, StyleReading]]:
        """Yield the reading of a style, or of a container of styles, that is searched for a string."""
        found = self._find_names(part)
        if found is None:
            yield plans, _UNKNOWN, StyleReading(is_known=False)
            return
        if method in _PART_TESTS:
            yield plans, _TELLS, StyleReading(tests=tuple((method, name) for name in found))
            return
        is_container = self._is_container(style)
        if is_container is not False:
            yield plans, _TELLS, StyleReading(tuple((name, "=") for name in found))
        if found and not is_container:
            yield plans, _TELLS, StyleReading(tests=_test_parts(found))

    def _is_container(self, node: ast.AST, depth: int = 3) -> bool | None:
        """Return whether what is searched is a container of styles, False for a style, None if it may be both."""
        match node:
            case ast.Call(func=function):
                name = get_identifier(function)
                return name in _CONTAINER_FUNCTIONS or (False if name in _LOOKUPS | _STRING_METHODS else None)
            case ast.List() | ast.Tuple() | ast.Set() | ast.Dict() | ast.ListComp() | ast.SetComp() | ast.DictComp():
                return True
            case ast.GeneratorExp():
                return True
            case ast.Name(id=name):
                values: Sequence[ast.AST] = self._assigned.get(name, ())
            case ast.Attribute(attr=name):
                values = self.definitions.find_all_values(name)
            case _:
                return False
        kinds = {self._is_container(value, depth - 1) for value in values} if depth else {None}
        if not kinds:
            return None if isinstance(node, ast.Attribute) else False
        return True if True in kinds else None if None in kinds else False

    @cached_property
    def _assigned(self) -> dict[str, list[ast.expr]]:
        """The values that assignments give to names, without those of loops."""
        assigned: dict[str, list[ast.expr]] = {}
        for node in self.flow.nodes:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                    | ast.NamedExpr(target=ast.Name(id=name), value=value)
                ):
                    assigned.setdefault(name, []).append(value)
        return assigned

    def _read_lookup(
        self, table: ast.expr, key: ast.expr, *, is_required: bool
    ) -> Iterator[tuple[PlanNames, str, StyleReading]]:
        """Yield the reading of a style that is the key of a table."""
        carried = self.flow.read(table)
        styles = self.flow.read(key).styles
        if not styles:
            if carried.styles and isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield carried.styles, _TELLS, StyleReading(((key.value, "="),))  # a table whose keys are styles
            return
        if _is_registry(table) or carried.plans or carried.styles:
            return
        tables = self._find_tables(table)
        if tables is None:
            yield styles, _LOOKS_UP, StyleReading(is_known=False)
        for one in tables or ():
            outcomes = [
                (part.value, ast.dump(value))
                for part, value in zip(one.keys, one.values, strict=True)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            if len(outcomes) == len(one.keys):
                if outcomes:
                    yield styles, _TELLS, StyleReading(tuple(outcomes), needs_outcome=is_required)
            else:
                yield styles, _LOOKS_UP, StyleReading(is_known=False)

    def _find_tables(self, node: ast.expr) -> list[ast.Dict] | None:
        """Return the displays that a table may be, None if there may be others; what only counts has none."""
        if isinstance(node, ast.Dict):
            return [node]
        values: Sequence[ast.AST] = self._assigned.get(node.id, []) if isinstance(node, ast.Name) else []
        if isinstance(node, ast.Attribute):
            values = self.definitions.find_all_values(node.attr)
        displays = [value for value in values if isinstance(value, ast.Dict)]
        counting = [
            value
            for value in values
            if isinstance(value, ast.Call)
            and get_identifier(value.func) in _COUNTING
            and not any(isinstance(part, (ast.Dict, ast.keyword)) for part in ast.walk(value))
        ]
        return displays if values and len(displays) + len(counting) == len(values) else None

    def _read_cases(self, node: ast.Match) -> StyleReading | None:
        """Return what each case of a `match` compares with, None if that cannot be read."""
        outcomes: dict[str, str] = {}
        for number, case in enumerate(node.cases):
            for part in ast.walk(case.pattern):
                if isinstance(part, ast.MatchValue):
                    names = self._find_names(part.value)
                    if names is None:
                        return None
                    outcomes |= {name: str(number) for name in names if name not in outcomes}
        return StyleReading(tuple(outcomes.items()))

    def _find_names(self, node: ast.AST, depth: int = 3) -> list[str] | None:
        """Return the strings that an expression contains, None if it may contain others."""
        match node:
            case ast.Constant(value=value):
                return [value] if isinstance(value, str) else []
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return self._find_all_names(parts, depth)
            case ast.Dict(keys=keys, values=values):
                return self._find_all_names([*filter(None, keys), *values], depth)
            case ast.Starred(value=value) | ast.Attribute(value=ast.Attribute() as value, attr="value"):
                return self._find_names(value, depth)
            case ast.BinOp(left=left, op=ast.BitOr() | ast.Add(), right=right):
                return self._find_all_names([left, right], depth)
            case ast.Call(func=ast.Name(id="set" | "frozenset" | "tuple" | "list"), args=[value], keywords=[]):
                return self._find_names(value, depth)
            case ast.Name() | ast.Attribute() if depth:
                defined = self.definitions.find_all_values(get_identifier(node))
                return self._find_all_names(defined, depth - 1) if defined else None
        return None

    def _find_all_names(self, nodes: Sequence[ast.AST], depth: int) -> list[str] | None:
        found = [self._find_names(node, depth) for node in nodes]
        return None if None in found else [name for names in found if names for name in names]

    def _is_harmless(self, call: ast.Call) -> bool:
        """Return whether a call does not depend on a style's name, or whether its function is followed."""
        name = get_identifier(call.func)
        root = (get_dotted_name(call.func) or "").partition(".")[0]
        is_class = name.lstrip("_")[:1].isupper()
        return (
            is_class
            or name in _WRITING_METHODS | _LOOKUPS | _COUNTING
            or is_reading_function(call.func)
            or bool(self.flow.find_functions(call.func))
            or not name
            or self.definitions.imports_from(root, _FRAMEWORK)
        )


def _test_parts(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple(("__contains__", name) for name in names)


def _is_registry(node: ast.expr) -> bool:
    return any(get_identifier(part) == _REGISTRY for part in ast.walk(node))
