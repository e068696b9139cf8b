"""Conditions around plan entries: the blocks of compound statements, and which layers a condition selects."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

from codemods.reading.module import Condition

__all__ = ["LayerKind", "find_layer_kind", "is_exiting", "iter_blocks", "iter_expressions"]


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
