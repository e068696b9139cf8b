"""The lines that decide whether code runs: the head of its function, and the tests around it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from codemods.files.sources import SourceFile
from codemods.inheritance.effective import PlanBranch

__all__ = ["find_guard_lines"]


def find_guard_lines(source: SourceFile, line: int, branch: PlanBranch) -> frozenset[int]:
    """Return the lines of a function's head and of the conditions that decide over what is written on a line.

    Args:
        source: the file.
        line: where it is written, counted from 1.
        branch: the plan, the function and the conditions.
    """
    _, function, conditions = branch
    found: set[int] = set()
    holder: ast.AST = ast.parse(source.body)
    for node in ast.walk(holder):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and _contains_line(node, line)
            and node.name == function
        ):
            found.update(range(node.lineno, max(node.lineno + 1, node.body[0].lineno)))
            holder = node
    tests = {condition.test for condition in conditions}
    for node in ast.walk(holder):
        for test in _iterate_tests(node, line):
            if isinstance(node, ast.Match) or ast.unparse(test) in tests:
                found.update(range(test.lineno, (test.end_lineno or test.lineno) + 1))
    return frozenset(found)


def _iterate_tests(node: ast.AST, line: int) -> Iterator[ast.expr | ast.pattern]:
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            yield test
        case ast.BoolOp(values=values):
            yield from values
        case ast.Match(subject=subject, cases=cases) if _contains_line(node, line):
            yield subject
            for case in cases:
                yield case.pattern
                yield from [case.guard] if case.guard else []


def _contains_line(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)
