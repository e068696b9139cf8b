"""Which names a model's classes could create in any configuration, read from their source without running it."""

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

from plans.plan import to_wildcard

__all__ = ["find_unknown_part"]

Classes = frozenset[type]

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_GENERIC_CLASSES = frozenset((*PreTrainedModel.__mro__, *_CONTAINERS))
"""Classes that assign whatever they are given, and so tell nothing about a model."""
_REGISTER_METHODS = ("register_buffer", "register_parameter", "register_module", "add_module")


@dataclass(frozen=True)
class _AttributeClasses:
    """The classes of the modules that an attribute may hold.

    Args:
        classes: the classes that the module itself may have.
        elements: the classes of a container's modules, which are named by numbers.
        any_class: whether the source leaves the class open, so that it may be any of the model's files.
    """

    classes: Classes = frozenset()
    elements: Classes = frozenset()
    any_class: bool = False

    def __or__(self, other: _AttributeClasses) -> _AttributeClasses:
        return _AttributeClasses(
            self.classes | other.classes, self.elements | other.elements, self.any_class or other.any_class
        )


_NO_CLASSES = _AttributeClasses()
_ANY_CLASS = _AttributeClasses(any_class=True)


@dataclass(frozen=True)
class _ClassAssignments:
    """What the methods of one class assign to `self`.

    Args:
        attributes: the classes assigned, by attribute.
        any_name: whether some attribute's name is computed.
    """

    attributes: Mapping[str, _AttributeClasses]
    any_name: bool


def find_unknown_part(model: nn.Module, key: str) -> tuple[str, str] | None:
    """Walk a plan key through the model's classes.

    A part may follow another if a class that the other may hold assigns it, or if the model has it.

    Args:
        model: the model; its modules count too, since a parent's source does not always tell what it holds.
        key: a key with the prefix of the model's names.

    Returns:
        The first part that no class could create there and the key up to it, None if every part could be created.
    """
    built = _collect_module_classes(model)
    files = sorted({module_class.__module__ for classes in built.values() for module_class in classes})
    file_classes = frozenset(module_class for file in files for module_class in _find_classes_in_file(file))
    current, path = _AttributeClasses(frozenset({type(model)})), ""
    for part in key.split("."):
        path, parent = f"{path}.{part}".lstrip("."), path
        assigned = _descend(current, part, file_classes)
        actual = built.get(path)
        if assigned is None and actual is None:
            return part, parent
        current = (assigned or _NO_CLASSES) | _AttributeClasses(actual or frozenset())
    return None


def _descend(current: _AttributeClasses, name: str, file_classes: Classes) -> _AttributeClasses | None:
    """Return what an attribute of the current modules may hold, None if they cannot have such an attribute."""
    if name == "*":
        has_elements = current.elements or current.any_class
        return _AttributeClasses(current.elements, any_class=current.any_class) if has_elements else None
    result: _AttributeClasses | None = None
    for module_class in current.classes | file_classes if current.any_class else current.classes:
        assigned = _find_attribute_classes(module_class, name)
        if assigned is not None:
            result = (result or _NO_CLASSES) | assigned
    return result


def _find_attribute_classes(module_class: type, attribute: str) -> _AttributeClasses | None:
    """Return what a class's own methods, or those of its bases, assign to an attribute; None if they never do."""
    result: _AttributeClasses | None = None
    for base in module_class.__mro__:
        if base in _GENERIC_CLASSES:
            continue
        assigned = _read_assignments(base)
        if attribute in assigned.attributes:
            result = (result or _NO_CLASSES) | assigned.attributes[attribute]
        elif assigned.any_name:
            result = (result or _NO_CLASSES) | _ANY_CLASS
    return result


def _collect_module_classes(model: nn.Module) -> dict[str, Classes]:
    """Return the classes of the model's modules by wildcarded name; parameters are there without a class."""
    built: dict[str, Classes] = {}
    for name, module in model.named_modules():
        built[to_wildcard(name)] = built.get(to_wildcard(name), frozenset()) | {type(module)}
    for name, _ in model.named_parameters(remove_duplicate=False):
        built.setdefault(to_wildcard(name), frozenset())
    return built


def _find_classes_in_file(module: str) -> Iterator[type]:
    """Yield the module classes that a Python module defines."""
    for value in vars(sys.modules[module]).values():
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module:
            yield value


@lru_cache(maxsize=4096)
def _read_assignments(module_class: type) -> _ClassAssignments:
    tree = _parse_file_classes(module_class.__module__).get(module_class.__name__)
    collector = _AssignmentCollector(vars(sys.modules[module_class.__module__]))
    for node in ast.walk(tree) if tree else ():
        collector.read(node)
    return _ClassAssignments(collector.attributes, collector.any_name)


@lru_cache(maxsize=256)
def _parse_file_classes(module: str) -> Mapping[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}  # Built in, without source.
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@dataclass
class _AssignmentCollector:
    """Collects what the body of one class assigns to `self`.

    Args:
        names: the names of the class's Python module, by which the classes that it calls are resolved.
        attributes: the classes assigned so far, by attribute.
        any_name: whether some attribute's name is computed.
    """

    names: Mapping[str, object]
    attributes: dict[str, _AttributeClasses] = field(default_factory=dict)
    any_name: bool = False

    def read(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value)
            case ast.Call(func=ast.Attribute(value=ast.Name("self"), attr=method), args=[name, *rest]):
                if method in _REGISTER_METHODS:
                    self._add_named(name, rest[0] if rest else None)
            case ast.Call(func=ast.Name("setattr"), args=[ast.Name("self"), name, value]):
                self._add_named(name, value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target:
            case ast.Tuple(elts=parts):
                for part in parts:
                    self._assign(part, value)
            case ast.Attribute(value=ast.Name("self"), attr=name):
                self._add(name, self._infer_classes(value))

    def _add_named(self, name: ast.expr, value: ast.expr | None) -> None:
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            self._add(name.value, self._infer_classes(value) if value else _NO_CLASSES)
        else:
            self.any_name = True

    def _add(self, name: str, classes: _AttributeClasses) -> None:
        self.attributes[name] = self.attributes.get(name, _NO_CLASSES) | classes

    def _infer_classes(self, value: ast.expr) -> _AttributeClasses:
        """Return what an expression may evaluate to; one that is not understood may evaluate to anything."""
        match value:
            case ast.Call(func=function, args=arguments):
                return self._infer_call_classes(self._resolve_name(function), arguments)
            case ast.IfExp(body=body, orelse=orelse):
                return self._infer_classes(body) | self._infer_classes(orelse)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Dict(values=parts):
                return self._infer_all_classes(parts)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.Starred(value=element):
                return self._infer_classes(element)
            case ast.Constant() | ast.BinOp() | ast.Compare() | ast.JoinedStr() | ast.UnaryOp():
                return _NO_CLASSES
        return _NO_CLASSES if _is_config_access(value) else _ANY_CLASS

    def _infer_call_classes(self, called: object, arguments: list[ast.expr]) -> _AttributeClasses:
        if not isinstance(called, type):
            return _ANY_CLASS
        if issubclass(called, _CONTAINERS):
            inside = self._infer_all_classes(arguments)
            return _AttributeClasses(elements=inside.classes | inside.elements, any_class=inside.any_class)
        if issubclass(called, nn.Module) and called is not nn.ModuleDict:
            return _AttributeClasses(frozenset({called}))
        return _NO_CLASSES if issubclass(called, nn.Parameter) else _ANY_CLASS

    def _infer_all_classes(self, parts: list[ast.expr]) -> _AttributeClasses:
        result = _NO_CLASSES
        for part in parts:
            result |= self._infer_classes(part)
        return result

    def _resolve_name(self, function: ast.expr) -> object:
        match function:
            case ast.Name(name):
                return self.names.get(name)
            case ast.Attribute(value=owner, attr=name):
                module = self._resolve_name(owner)
                return vars(module).get(name) if type(module) is ModuleType else None
        return None


def _is_config_access(value: ast.expr) -> bool:
    """Return whether an expression only reads a config: `config.hidden_size`."""
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id == "config"
