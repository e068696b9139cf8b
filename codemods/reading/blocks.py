"""Compound statements: their blocks, and the conditions under which each of them runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from codemods.reading.module import Condition

__all__ = ["is_exiting", "iter_blocks", "iter_expressions"]


def iter_blocks(statement: ast.stmt) -> Iterator[tuple[Sequence[ast.stmt], tuple[Condition, ...]]]:
    """Yield the blocks of a compound statement with the conditions that each adds."""
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
    """Say whether what follows a block does not run after it."""
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def iter_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield what a statement holds besides other statements."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield child


def _iter_cases(statement: ast.Match) -> Iterator[tuple[Sequence[ast.stmt], tuple[Condition, ...]]]:
    """Yield the blocks of a match statement; each runs only where no case before it did."""
    before: tuple[Condition, ...] = ()
    for case in statement.cases:
        test = _unparse_case(statement.subject, case)
        yield case.body, (*before, Condition(test, True))
        before = (*before, Condition(test, False))


def _unparse_case(subject: ast.expr, case: ast.match_case) -> str:
    """Return a case as a test, a true expression; patterns that are more than values are named in a call."""
    match case.pattern:
        case ast.MatchValue(value=value):
            test = f"{ast.unparse(subject)} == {ast.unparse(value)}"
        case pattern:
            test = f"matches({ast.unparse(subject)}, {ast.unparse(pattern)!r})"
    return f"{test} and ({ast.unparse(case.guard)})" if case.guard else test
