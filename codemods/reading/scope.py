"""Scopes: what encloses a statement, and which plans the names in it refer to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from codemods.reading.module import Condition
from plans.plan import plan_kind

__all__ = ["ANY_CLASS", "Scope", "find_plan_mentions", "is_plan_attribute"]


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
        free_parameters: the parameters of that function without a default, whose values only its callers know.
        classes: the names of the file's classes.
        imported: the names that the file imports.
    """

    class_name: str = ""
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    loops: tuple[ast.For, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    free_parameters: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    imported: frozenset[str] = frozenset()

    def resolve_plan(self, node: ast.expr) -> str | None:
        """Return the attribute of the plan that an expression refers to, or None."""
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name):
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
