"""Which names a model's classes could create, in any configuration: read from their source, never run."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

from torch import nn
from transformers import PreTrainedModel

from plans.plan import wildcard

__all__ = ["first_unknown_part"]

Classes = frozenset[type]

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_GENERAL = frozenset((*PreTrainedModel.__mro__, *_CONTAINERS))
"""Classes that assign whatever they are told to: they say nothing about a model."""
_REGISTERS = ("register_buffer", "register_parameter", "register_module", "add_module")


@dataclass(frozen=True)
class _Held:
    """What an attribute may hold.

    Args:
        classes: of the module itself.
        elements: of a container's modules, which have numbers for names.
        anything: whether the source does not tell, so that any class of the model's files may be there.
    """

    classes: Classes = frozenset()
    elements: Classes = frozenset()
    anything: bool = False

    def __or__(self, other: _Held) -> _Held:
        return _Held(self.classes | other.classes, self.elements | other.elements, self.anything or other.anything)


_NOTHING = _Held()
_ANYTHING = _Held(anything=True)


@dataclass(frozen=True)
class _Assigned:
    """What the methods of one class assign to `self`, by attribute; `any_name` if a name is computed."""

    held: Mapping[str, _Held]
    any_name: bool


def first_unknown_part(model: nn.Module, key: str) -> tuple[str, str] | None:
    """Walk a plan key through the model's classes.

    A part may follow another if a class that the other may hold assigns it, or if the model has it.

    Args:
        model: whose classes are read; parts of it are looked at too, since a parent's source does not always tell.
        key: prefixed as the model's names are.

    Returns:
        The first part that no class could create there and the key up to it, None where every part could be.
    """
    built = _built(model)
    every = frozenset(kind for kinds in built.values() for kind in kinds)
    files = frozenset(
        kind for module in sorted({kind.__module__ for kind in every}) for kind in _module_classes(module)
    )
    held, path = _Held(frozenset({type(model)})), ""
    for part in key.split("."):
        path, parent = f"{path}.{part}".lstrip("."), path
        step = _step(held, part, files)
        actual = built.get(path)
        if step is None and actual is None:
            return part, parent
        held = (step or _NOTHING) | _Held(actual or frozenset())
    return None


def _step(held: _Held, part: str, files: Classes) -> _Held | None:
    if part == "*":
        return _Held(held.elements, anything=held.anything) if held.elements or held.anything else None
    found = [_held_by(kind, part) for kind in (held.classes | files if held.anything else held.classes)]
    known = [each for each in found if each is not None]
    if not known:
        return None
    result = _NOTHING
    for each in known:
        result |= each
    return result


def _held_by(kind: type, part: str) -> _Held | None:
    """Return what a class's own methods, or those of its bases, assign to an attribute."""
    result: _Held | None = None
    for base in kind.__mro__:
        if base in _GENERAL:
            continue
        assigned = _assigned(base)
        if part in assigned.held:
            result = (result or _NOTHING) | assigned.held[part]
        elif assigned.any_name:
            result = (result or _NOTHING) | _ANYTHING
    return result


def _built(model: nn.Module) -> dict[str, Classes]:
    """Return the classes of the modules that this model has, by wildcarded name; parameters have none."""
    built: dict[str, Classes] = {}
    for name, module in model.named_modules():
        built[wildcard(name)] = built.get(wildcard(name), frozenset()) | {type(module)}
    for name, _ in model.named_parameters(remove_duplicate=False):
        built.setdefault(wildcard(name), frozenset())
    return built


def _module_classes(name: str) -> Iterator[type]:
    for value in vars(sys.modules[name]).values():
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name:
            yield value


@lru_cache(maxsize=4096)
def _assigned(kind: type) -> _Assigned:
    tree = _class_tree(kind)
    names = vars(sys.modules[kind.__module__])
    reader = _Reader(names)
    for node in ast.walk(tree) if tree else ():
        reader.read(node)
    return _Assigned(reader.held, reader.any_name)


@lru_cache(maxsize=256)
def _file_tree(module: str) -> Mapping[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}  # Built in, without source.
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _class_tree(kind: type) -> ast.ClassDef | None:
    return _file_tree(kind.__module__).get(kind.__name__)


@dataclass
class _Reader:
    """Collects what one class's body assigns to `self`; `names` resolves the classes it calls."""

    names: Mapping[str, object]
    held: dict[str, _Held] = field(default_factory=dict)
    any_name: bool = False

    def read(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value)
            case ast.Call(func=ast.Attribute(value=ast.Name("self"), attr=method), args=[name, *rest]):
                if method in _REGISTERS:
                    self._named(name, rest[0] if rest else None)
            case ast.Call(func=ast.Name("setattr"), args=[ast.Name("self"), name, value]):
                self._named(name, value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target:
            case ast.Tuple(elts=parts):
                for part in parts:
                    self._assign(part, value)
            case ast.Attribute(value=ast.Name("self"), attr=name):
                self._add(name, self._holds(value))

    def _named(self, name: ast.expr, value: ast.expr | None) -> None:
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            self._add(name.value, self._holds(value) if value else _NOTHING)
        else:
            self.any_name = True

    def _add(self, name: str, held: _Held) -> None:
        self.held[name] = self.held.get(name, _NOTHING) | held

    def _holds(self, value: ast.expr) -> _Held:
        """Return what an expression may give; what is not understood may give anything."""
        match value:
            case ast.Call(func=function, args=arguments):
                return self._made(self._resolved(function), arguments)
            case ast.IfExp(body=one, orelse=other):
                return self._holds(one) | self._holds(other)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Dict(values=parts):
                return self._all(parts)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.Starred(value=element):
                return self._holds(element)
            case ast.Constant() | ast.BinOp() | ast.Compare() | ast.JoinedStr() | ast.UnaryOp():
                return _NOTHING
        return _NOTHING if _is_setting(value) else _ANYTHING

    def _made(self, kind: object, arguments: list[ast.expr]) -> _Held:
        if not isinstance(kind, type):
            return _ANYTHING
        if issubclass(kind, _CONTAINERS):
            inside = self._all(arguments)
            return _Held(elements=inside.classes | inside.elements, anything=inside.anything)
        if issubclass(kind, nn.Module) and kind is not nn.ModuleDict:
            return _Held(frozenset({kind}))
        return _NOTHING if issubclass(kind, nn.Parameter) else _ANYTHING

    def _all(self, parts: list[ast.expr]) -> _Held:
        result = _NOTHING
        for part in parts:
            result |= self._holds(part)
        return result

    def _resolved(self, function: ast.expr) -> object:
        match function:
            case ast.Name(name):
                return self.names.get(name)
            case ast.Attribute(value=owner, attr=name):
                module = self._resolved(owner)
                return vars(module).get(name) if type(module) is ModuleType else None
        return None


def _is_setting(value: ast.expr) -> bool:
    """Say whether an expression only reads a config: `config.hidden_size`."""
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id == "config"
