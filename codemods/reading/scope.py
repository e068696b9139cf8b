"""Where a statement stands: the conditions under which it runs, and which plans its names stand for there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from codemods.reading.module import Condition
from plans.plan import plan_kind

__all__ = [
    "ANY_CLASS",
    "LayerKind",
    "Scope",
    "denies_plan",
    "find_layer_kind",
    "find_plan_mentions",
    "is_exiting",
    "is_plan_attribute",
    "iter_blocks",
    "iter_expressions",
]


LayerKind = Literal["sparse", "dense"]

_DENSE_COUNTS = ("first_k_dense_replace", "num_dense_layers", "first_k_dense", "moe_layer_start_index")
_DENSE_LISTS = ("mlp_only_layers", "dense_layers", "dense_layer_ids")
_SPARSE_LISTS = ("moe_layers", "sparse_layers", "moe_layer_ids")
_DENSE_WORDS = ("dense",)
_SPARSE_WORDS = ("sparse", "moe")


def find_layer_kind(conditions: Sequence[Condition]) -> tuple[LayerKind, Condition] | None:
    """Return which layers the innermost condition on layers selects, and that condition; None if there is none.

    It recognizes comparisons of the layer with the number of leading dense layers, membership in lists of layers, and
    comparisons and names that contain the word `sparse`, `moe` or `dense`.
    """
    for condition in reversed(conditions):
        if (kind := _classify_condition(condition)) is not None:
            return kind, condition
    return None


@cache
def _classify_condition(condition: Condition) -> LayerKind | None:
    test = ast.parse(condition.test, mode="eval").body
    # If `a and b` is false, neither `a` nor `b` is known to be false.
    kind = None if isinstance(test, ast.BoolOp) and not condition.holds else _classify_test(test)
    return kind if kind is None or condition.holds else _invert_kind(kind)


def _invert_kind(kind: LayerKind) -> LayerKind:
    return "dense" if kind == "sparse" else "sparse"


def _classify_test(test: ast.expr) -> LayerKind | None:
    """Return the kind of layers for which a test is true, or None if it is not known."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            kind = _classify_test(operand)
            return None if kind is None else _invert_kind(kind)
        case ast.BoolOp(op=ast.And(), values=values):
            return next((kind for kind in map(_classify_test, values) if kind is not None), None)
        case ast.Compare(ops=[operator], comparators=[right], left=left):
            return _classify_comparison(left, operator, right)
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return _classify_name(ast.unparse(test))
    return None


def _classify_comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> LayerKind | None:
    name = _get_last_name(right)
    if isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        is_less = isinstance(operator, (ast.Lt, ast.LtE))
        if name in _DENSE_COUNTS:
            return "dense" if is_less else "sparse"
        if _get_last_name(left) in _DENSE_COUNTS:
            return "sparse" if is_less else "dense"
    kind: LayerKind | None = "dense" if name in _DENSE_LISTS else "sparse" if name in _SPARSE_LISTS else None
    if kind is not None and isinstance(operator, ast.In):
        return kind
    if kind is not None and isinstance(operator, ast.NotIn):
        return _invert_kind(kind)
    if isinstance(operator, (ast.Eq, ast.NotEq)) and isinstance(right, ast.Constant) and isinstance(right.value, str):
        named = _classify_name(right.value)
        return named if named is None or isinstance(operator, ast.Eq) else _invert_kind(named)
    return None


def _get_last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _classify_name(text: str) -> LayerKind | None:
    words = text.lower().replace(".", "_").split("_")
    if any(word in words for word in _SPARSE_WORDS):
        return "sparse"
    return "dense" if any(word in words for word in _DENSE_WORDS) else None


@cache
def denies_plan(condition: Condition, attribute: str) -> bool:
    """Return whether a condition holds only where a plan is missing or empty, as `if not self._tp_plan`."""
    test, holds = ast.parse(condition.test, mode="eval").body, condition.holds
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, holds = test.operand, not holds
    match test:
        case ast.Compare(left=plan, ops=[ast.Is() | ast.IsNot() as operator], comparators=[ast.Constant(value=None)]):
            test, holds = plan, holds != isinstance(operator, ast.Is)
    match test:
        case (
            ast.Attribute(attr=name)
            | ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_])
        ):
            return not holds and plan_kind(name) is not None and name.strip("_") == attribute.strip("_")
    return False


def iter_blocks(statement: ast.stmt) -> Iterator[tuple[Sequence[ast.stmt], tuple[Condition, ...]]]:
    """Yield the blocks of a compound statement, each with the conditions under which it runs."""
    if isinstance(statement, ast.If):
        test = ast.unparse(statement.test)
        yield statement.body, (Condition(test, True),)
        yield statement.orelse, (Condition(test, False),)
        return
    if isinstance(statement, ast.Match):
        yield from _iter_cases(statement)
        return
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, ()), ()
    for handler in getattr(statement, "handlers", ()):
        yield handler.body, ()


def is_exiting(statements: Sequence[ast.stmt]) -> bool:
    """Return whether a block leaves the enclosing block, so that the statements after it do not run."""
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def iter_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the child nodes of a statement that are not statements."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield child


def _iter_cases(statement: ast.Match) -> Iterator[tuple[Sequence[ast.stmt], tuple[Condition, ...]]]:
    """Yield the blocks of a match statement; each runs only if no case before it matches."""
    unmatched: tuple[Condition, ...] = ()
    for case in statement.cases:
        test = _unparse_case(statement.subject, case)
        yield case.body, (*unmatched, Condition(test, True))
        unmatched = (*unmatched, Condition(test, False))


def _unparse_case(subject: ast.expr, case: ast.match_case) -> str:
    """Return the test of a case as an expression: a comparison with a value, or a call of `matches` with a pattern."""
    match case.pattern:
        case ast.MatchValue(value=value):
            test = f"{ast.unparse(subject)} == {ast.unparse(value)}"
        case pattern:
            test = f"matches({ast.unparse(subject)}, {ast.unparse(pattern)!r})"
    return f"{test} and ({ast.unparse(case.guard)})" if case.guard else test


ANY_CLASS = "?"
"""The class of a plan that belongs to an object of an unknown class, as in `config.base_model_tp_plan`."""

_PLAN_NAME = re.compile(rb"(?:(?:base_model)?_)?(?:tp|sp|ep|tp_ep|sp_ep)_plan")
_COMPUTED_BEFORE = (b"}", b"%s", b'"', b"'")
_PLAN_ENDING = re.compile(rb"_plan\b")
_WORD = re.compile(rb"\w+\Z")
_MAX_PREFIX = len("base_model_tp_ep") + 1


def find_plan_mentions(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each mention of a plan's name in a source.

    Of a name that is put together from parts, as in `f"base_model_{kind}_plan"`, only the last part is yielded. The
    ending of the word is rare and is searched first, which is several times faster than searching for whole words.
    """
    for ending in _PLAN_ENDING.finditer(body):
        beginning = _WORD.search(body, max(0, ending.start() - _MAX_PREFIX), ending.start())
        start = beginning.start() if beginning else ending.start()
        if _PLAN_NAME.fullmatch(body, start, ending.end()) or (
            start == ending.start() and body.endswith(_COMPUTED_BEFORE, 0, start)
        ):
            yield start, ending.end()


def is_plan_attribute(name: str) -> bool:
    """Return whether a class attribute of this name holds a plan."""
    return name.startswith(("_", "base_model_")) and plan_kind(name) is not None


_SELF_NAMES = ("self", "cls")
_OBJECT_ATTRIBUTES = ("__class__", "__dict__")
_OBJECT_FUNCTIONS = ("type", "vars")


@dataclass(frozen=True)
class Scope:
    """What encloses a statement.

    Args:
        class_name: the enclosing class, empty outside of classes.
        function: the enclosing function, empty in a class body.
        conditions: the enclosing conditions in that function, outermost first.
        loops: the enclosing `for` statements in that function, innermost first.
        aliases: the local names that refer to a plan, with the plan's attribute.
        written_names: the local names that are written into plans.
        free_parameters: the parameters of that function without a default, whose values only its callers know.
        object_plans: the variables of that function with a plan's name that hold objects instead of styles.
        classes: the names of the file's classes.
        imported: the names that the file imports.
    """

    class_name: str = ""
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    loops: tuple[ast.For, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    written_names: frozenset[str] = frozenset()
    free_parameters: frozenset[str] = frozenset()
    object_plans: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    imported: frozenset[str] = frozenset()

    def resolve_plan(self, node: ast.expr) -> str | None:
        """Return the attribute of the plan that an expression refers to, or None."""
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name) and node.id not in self.object_plans:
            return self.aliases.get(node.id) or (node.id if is_plan_attribute(node.id) else None)
        return None

    def resolve_class(self, node: ast.expr) -> str:
        """Return the class of the plan that an expression refers to.

        This is a class of the file, the dotted name of an imported one, or `ANY_CLASS` for an object of another class.
        """
        return self.resolve_owner(node.value) if isinstance(node, ast.Attribute) else self.class_name

    def resolve_owner(self, node: ast.AST) -> str:
        """Return the class of an object, as `resolve_class` does, from the expression for the object."""
        match node:
            case ast.Name(id=name) if name in _SELF_NAMES:
                return self.class_name or ANY_CLASS
            case ast.Name(id=name) if name in self.classes and name not in self.free_parameters:
                return name
            case ast.Call(func=ast.Name(id="locals"), args=[]):
                return self.class_name or ANY_CLASS
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in _OBJECT_FUNCTIONS:
                return self.resolve_owner(argument)
            case ast.Attribute(value=holder, attr=name) if name in _OBJECT_ATTRIBUTES:
                return self.resolve_owner(holder)
            case ast.Attribute() | ast.Name():
                text = ast.unparse(node)
                return text if text.partition(".")[0] in self.imported else ANY_CLASS
        return ANY_CLASS

    def resolve_named_plan(self, node: ast.AST) -> tuple[str, str] | None:
        """Return the class, as `resolve_class` does, and the attribute of the plan that an expression is, or None."""
        match node:
            case ast.Attribute(attr=plan) if is_plan_attribute(plan):
                return self.resolve_class(node), plan
            case ast.Name() if attribute := self.resolve_plan(node):
                return self.class_name, attribute
            case (
                ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(plan)), *_])
                | ast.Subscript(value=owner, slice=ast.Constant(value=str(plan)))
            ) if is_plan_attribute(plan):
                return self.resolve_owner(owner), plan
        return None

    def is_known_class(self, name: str) -> bool:
        """Return whether a class that an expression resolves to is the enclosing one or one of the file's classes."""
        return name == self.class_name or name in self.classes

    def find_defining_classes(self, node: ast.AST) -> tuple[str, ...]:
        """Return the classes whose bodies may define a name or an attribute; an empty name stands for the module."""
        match node:
            case ast.Name():
                return ("",) if self.function else tuple(dict.fromkeys((self.class_name, "")))
            case ast.Attribute(value=ast.Name(id=name)):
                return (self.class_name,) if name in _SELF_NAMES else tuple({name} & self.classes)
        return ()
