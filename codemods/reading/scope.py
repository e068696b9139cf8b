"""Where statements stand: what is around them, and which plans their names mean there."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

from codemods.reading.module import Condition
from codemods.reading.plan_names import is_plan_attribute

__all__ = ["Scope"]

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
