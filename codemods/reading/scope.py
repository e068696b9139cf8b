"""Where statements stand: what is around them, and which plans their names mean there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from codemods.reading.module import Condition
from plans.plan import plan_kind

__all__ = ["Scope", "find_plan_mentions", "is_plan_attribute"]


_PLAN_NAME = re.compile(rb"(?:(?:base_model)?_)?(?:tp|sp|ep|tp_ep|sp_ep)_plan")
_PLAN_ENDING = re.compile(rb"_plan\b")
_WORD = re.compile(rb"\w+\Z")
_MAX_PREFIX = len("base_model_tp_ep") + 1


def find_plan_mentions(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where a source mentions a plan by name: start and end of each word.

    The rare end of the word is looked for first, which is several times faster than looking for whole words.
    """
    for ending in _PLAN_ENDING.finditer(body):
        beginning = _WORD.search(body, max(0, ending.start() - _MAX_PREFIX), ending.start())
        start = beginning.start() if beginning else ending.start()
        if _PLAN_NAME.fullmatch(body, start, ending.end()):
            yield start, ending.end()


def is_plan_attribute(name: str) -> bool:
    """Return whether a class attribute of this name holds a plan."""
    return name.startswith(("_", "base_model_")) and plan_kind(name) is not None


_SELF_NAMES = ("self", "cls")


@dataclass(frozen=True)
class Scope:
    """Where statements stand.

    Args:
        class_name: the class around, empty outside of classes.
        function: the function around, empty in a class body.
        conditions: those around in that function.
        loops: the `for` statements around in that function, innermost first.
        aliases: local names that stand for a plan, with its attribute.
        free_parameters: parameters of that function of which nothing is known but their callers.
        classes: the names of the file's classes.
    """

    class_name: str = ""
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    loops: tuple[ast.For, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    free_parameters: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()

    def resolve_plan(self, node: ast.expr) -> str | None:
        """Return the plan that an expression stands for."""
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id) or (node.id if is_plan_attribute(node.id) else None)
        return None

    def resolve_class(self, node: ast.expr) -> str:
        """Return the class whose plan an expression stands for: the one that it names, or else the one around."""
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in self.classes:
                return name
        return self.class_name

    def resolve_named_plan(self, node: ast.AST) -> tuple[str, str] | None:
        """Return class and attribute of a plan that an expression names beyond doubt."""
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=plan) if is_plan_attribute(plan):
                owner = self.class_name if name in _SELF_NAMES else name
                return (owner, plan) if owner == self.class_name or name in self.classes else None
            case ast.Name() if known := self.resolve_plan(node):
                return self.class_name, known
        return None

    def find_defining_classes(self, node: ast.AST) -> tuple[str, ...]:
        """Return the classes, empty for the module, whose bodies may define what a name or attribute stands for."""
        match node:
            case ast.Name():
                return ("",) if self.function else tuple(dict.fromkeys((self.class_name, "")))
            case ast.Attribute(value=ast.Name(id=name)):
                return (self.class_name,) if name in _SELF_NAMES else tuple({name} & self.classes)
        return ()
