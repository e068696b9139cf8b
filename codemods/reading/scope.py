"""Scopes: what encloses a statement, and which plans the names in it refer to."""

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
    """Yield the start and the end of each mention of a plan's name in a source.

    The ending of the word is rare and is searched first, which is several times faster than searching for whole words.
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
    """What encloses a statement.

    Args:
        class_name: the enclosing class, empty outside of classes.
        function: the enclosing function, empty in a class body.
        conditions: the enclosing conditions in that function, outermost first.
        loops: the enclosing `for` statements in that function, innermost first.
        aliases: the local names that refer to a plan, with the plan's attribute.
        free_parameters: the parameters of that function without a default, whose values only its callers know.
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
        """Return the attribute of the plan that an expression refers to, or None."""
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id) or (node.id if is_plan_attribute(node.id) else None)
        return None

    def resolve_class(self, node: ast.expr) -> str:
        """Return the class of the plan that an expression refers to: the one it names, or else the enclosing one."""
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in self.classes:
                return name
        return self.class_name

    def resolve_named_plan(self, node: ast.AST) -> tuple[str, str] | None:
        """Return the class and the attribute of a plan that an expression refers to unambiguously, or None."""
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=plan) if is_plan_attribute(plan):
                owner = self.class_name if name in _SELF_NAMES else name
                return (owner, plan) if owner == self.class_name or name in self.classes else None
            case ast.Name() if attribute := self.resolve_plan(node):
                return self.class_name, attribute
        return None

    def find_defining_classes(self, node: ast.AST) -> tuple[str, ...]:
        """Return the classes whose bodies may define a name or an attribute; an empty name stands for the module."""
        match node:
            case ast.Name():
                return ("",) if self.function else tuple(dict.fromkeys((self.class_name, "")))
            case ast.Attribute(value=ast.Name(id=name)):
                return (self.class_name,) if name in _SELF_NAMES else tuple({name} & self.classes)
        return ()
