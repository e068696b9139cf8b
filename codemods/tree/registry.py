"""A tree's own registry of styles: the names that its text gives to `ALL_PARALLEL_STYLES`.

Releases up to 5.22 write the names into the `_global_mapping` of the registry's class; later ones call `register`. Both
are read from text, as are loops over names and helpers that pass a name on. A registration whose name cannot be read is
recorded, because then the registry may have any name.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from codemods.files.sources import SourceFile, format_path, read_source
from plans.errors import SourceError

__all__ = ["REGISTRY", "Place", "Registry", "find_registry_files", "read_registry"]

REGISTRY = b"ALL_PARALLEL_STYLES"

_NAME = REGISTRY.decode()
_MAPPING = "_global_mapping"
# Files that define the registry or change it; most that mention it only import it or look styles up.
_CHANGES = re.compile(
    rb"ALL_PARALLEL_STYLES\s*(?::[^=\n]+)?\|?=(?!=)|ALL_PARALLEL_STYLES\s*\.\s*(?:register|update|pop|setdefault|_\w+)\b"
    rb"|ALL_PARALLEL_STYLES\s+as\s|=\s*(?:[\w.]+\.)?ALL_PARALLEL_STYLES\s*(?:#|\n|$)|ALL_PARALLEL_STYLES\[[^\]\n]*\]\s*=(?!=)"
    rb"|(?:ParallelInterface|ALL_PARALLEL_STYLES)\s*\.\s*_\w+\s*\|?="
    rb"|del\s+ALL_PARALLEL_STYLES|\w*ParallelInterface\s*\.\s*(?:register|_global_mapping)"
)
_NOT_FRAMEWORK = frozenset({"models", "__pycache__"})
_MAX_DEPTH = 5  # names that stand for other names

Place = tuple[Path, int]
"""A file, and a line in it, counted from 1."""

_Names = frozenset[str] | None
"""Names of styles, None where they cannot be read."""


@dataclass(frozen=True)
class Registry:
    """The styles that a tree registers.

    Args:
        names: the names.
        where: the file that defines the registry, None if the files only add to one that lies elsewhere.
        unread: the places of registrations whose names cannot be read, as text: `distributed/styles.py:12`.
        places: the file and the line, counted from 1, that first register each name.
    """

    names: frozenset[str]
    where: Path | None
    unread: tuple[str, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)


def find_registry_files(package: Path) -> Iterator[SourceFile]:
    """Yield the files of a package, outside of its models, that mention the registry; unreadable ones are left out."""
    for folder, folders, files in os.walk(package):
        folders[:] = sorted(name for name in folders if name not in _NOT_FRAMEWORK and not name.startswith("."))
        for name in sorted(files):
            if name.endswith(".py"):
                try:
                    source = read_source(Path(folder, name))
                except SourceError:
                    continue
                if REGISTRY in source.data:
                    yield source


def read_registry(sources: Iterable[SourceFile]) -> Registry | None:
    """Return what files that mention the registry register, None if they register nothing.

    What a file registers that cannot be parsed is not known.
    """
    files: list[_RegistryFile] = []
    unread: list[str] = []
    for source in sources:
        if _CHANGES.search(source.data):
            try:
                files.append(_RegistryFile(source, ast.parse(source.body)))
            except (SyntaxError, ValueError, RecursionError, MemoryError, SourceError) as error:
                unread.append(f"{format_path(source.path)}:{getattr(error, 'lineno', None) or 1}")
    mappings = {name: value for file in files for name, value in file.mappings.items()}
    places: dict[str, Place] = {}
    removed: set[str] = set()
    where: Path | None = None
    for file in files:
        for change in file.list_changes(mappings):
            if change.defines:
                where = where or file.source.path
            if change.names is None:
                unread.append(f"{format_path(file.source.path)}:{change.line}")
            elif change.removes:
                removed |= change.names
            else:
                for name in change.names - places.keys():
                    places[name] = (file.source.path, file.find_line(name, change.line))
    if where is None and not places and not unread:
        return None
    kept = {name: place for name, place in places.items() if name not in removed}
    return Registry(frozenset(kept), where, tuple(dict.fromkeys(unread)), kept)


@dataclass(frozen=True)
class _Change:
    line: int
    names: _Names
    defines: bool = False
    removes: bool = False


@dataclass(frozen=True)
class _RegistryFile:
    """One file that changes the registry.

    Args:
        source: the file.
        tree: its syntax tree.
    """

    source: SourceFile
    tree: ast.Module

    @cached_property
    def mappings(self) -> Mapping[str, ast.expr]:
        """The value of `_global_mapping` in each class that assigns it or inherits it from another of the file."""
        mappings: dict[str, ast.expr] = {}
        for owner in ast.walk(self.tree):
            if isinstance(owner, ast.ClassDef):
                bases = [base.id for base in owner.bases if isinstance(base, ast.Name)]
                inherited = [mappings[base] for base in bases if base in mappings]
                assigned = [v for body in owner.body for name, v in _iter_assignments(body) if name == _MAPPING]
                if values := (assigned[-1:] or inherited[:1]):
                    mappings[owner.name] = values[0]
        return mappings

    @cached_property
    def _parents(self) -> Mapping[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @cached_property
    def _constants(self) -> Mapping[str, Sequence[ast.expr]]:
        """The values that the file assigns to each name, wherever it does."""
        values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.stmt):
                for name, value in _iter_assignments(node):
                    values.setdefault(name, []).append(value)
        return values

    @cached_property
    def _aliases(self) -> frozenset[str]:
        """The names by which the file calls the registry."""
        aliases = {_NAME}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                aliases |= {alias.asname for alias in node.names if alias.name == _NAME and alias.asname}
            elif isinstance(node, ast.Assign) and self._is_named(node.value, aliases):
                aliases |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return frozenset(aliases)

    def find_line(self, name: str, line: int) -> int:
        """Return the line of a name that a change registers: where its text stands, or else the change's own line.

        Args:
            name: the registered name.
            line: the line of the change. The text may stand before it, in a list that a loop registers.
        """
        return min(self._texts.get(name, ()), key=lambda other: (other < line, abs(other - line)), default=line)

    @cached_property
    def _texts(self) -> Mapping[str, Sequence[int]]:
        """The lines of each string in the file, and of each keyword."""
        lines: dict[str, list[int]] = {}
        for node in ast.walk(self.tree):
            match node:
                case ast.Constant(value=str(text)) | ast.keyword(arg=str(text)):
                    lines.setdefault(text, []).append(node.lineno)
        return lines

    def list_changes(self, mappings: Mapping[str, ast.expr]) -> Iterator[_Change]:
        """Yield what the file does to the registry.

        Args:
            mappings: the `_global_mapping` of classes in any file, for the class that the registry is made of.
        """
        for node in ast.walk(self.tree):
            match node:
                case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                    yield from self._read_assignment(node, mappings)
                case ast.Delete(targets=targets):
                    for target in targets:
                        if isinstance(target, ast.Subscript) and self._is_registry(target.value):
                            yield _Change(node.lineno, self._read_name(target.slice), removes=True)
                case ast.Call(func=ast.Attribute(value=owner, attr=method)) if self._is_registry(owner):
                    yield from self._read_call(node, method)

    def _read_assignment(
        self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, mappings: Mapping[str, ast.expr]
    ) -> Iterator[_Change]:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id == _NAME and node.value is not None:
                if isinstance(node, ast.AugAssign):
                    yield _Change(node.lineno, self._read_keys(node.value))
                elif not self._is_registry(node.value):
                    yield _Change(node.lineno, self._read_definition(node.value, mappings), defines=True)
            elif isinstance(target, ast.Subscript) and self._is_registry(target.value):
                yield _Change(node.lineno, self._read_name(target.slice))
            elif isinstance(target, ast.Attribute) and self._is_registry(target) and node.value is not None:
                yield _Change(node.lineno, self._read_keys(node.value))

    def _read_definition(self, value: ast.expr, mappings: Mapping[str, ast.expr]) -> _Names:
        """Return the names that the registry begins with: those of its class, and of the display it is made from."""
        match value:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in mappings:
                keys = self._read_keys(mappings[name])
                given = [self._read_keys(argument) for argument in value.args]
                return None if keys is None or None in given else keys.union(*filter(None, given))
        return self._read_keys(value)

    def _read_call(self, call: ast.Call, method: str) -> Iterator[_Change]:
        if method in ("register", "setdefault", "__setitem__"):
            name = call.args[0] if call.args else _find_keyword(call, "key")
            yield _Change(call.lineno, self._read_name(name) if name else None)
        elif method == "update":
            keys = [self._read_keys(argument) for argument in call.args]
            named = frozenset(keyword.arg for keyword in call.keywords if keyword.arg)
            is_read = None not in keys and all(keyword.arg for keyword in call.keywords)
            yield _Change(call.lineno, named.union(*filter(None, keys)) if is_read else None)
        elif method in ("pop", "__delitem__") and call.args:
            yield _Change(call.lineno, self._read_name(call.args[0]), removes=True)

    def _is_registry(self, node: ast.expr) -> bool:
        """Return whether an expression is the registry, its class, or the mapping of one of them."""
        if isinstance(node, ast.Attribute) and node.attr in (_MAPPING, "_local_mapping"):
            node = node.value
        is_class = isinstance(node, ast.Name) and (node.id in self.mappings or node.id.endswith("ParallelInterface"))
        return is_class or self._is_named(node, self._aliases)

    def _is_named(self, node: ast.expr, aliases: Iterable[str]) -> bool:
        match node:
            case ast.Name(id=name):
                return name in aliases
            case ast.Attribute(attr=name):
                return name == _NAME
        return False

    def _read_keys(self, value: ast.expr, depth: int = 0) -> _Names:
        """Return the keys of a mapping, None where one of them cannot be read."""
        match value:
            case ast.Dict(keys=keys, values=values):
                parts = [
                    self._read_keys(item, depth) if key is None else self._read_name(key, depth)
                    for key, item in zip(keys, values, strict=True)
                ]
                return _join(parts)
            case ast.IfExp(body=body, orelse=orelse):
                return _join([self._read_keys(body, depth), self._read_keys(orelse, depth)])
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return _join([self._read_keys(left, depth), self._read_keys(right, depth)])
            case ast.Call(func=ast.Name(id="dict"), args=args, keywords=keywords):
                given = [self._read_keys(argument, depth) for argument in args]
                named = [frozenset({word.arg}) if word.arg else self._read_keys(word.value, depth) for word in keywords]
                return _join([*given, *named])
            case ast.DictComp(key=key):
                return self._read_name(key, depth)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if attribute == _MAPPING:
                known = name in self.mappings and depth < _MAX_DEPTH
                return self._read_keys(self.mappings[name], depth + 1) if known else None
            case ast.Name(id=name) if depth < _MAX_DEPTH and name in self._constants:
                return _join([self._read_keys(constant, depth + 1) for constant in self._constants[name]])
        return None

    def _read_name(self, node: ast.expr, depth: int = 0) -> _Names:
        """Return what a key can be: a string, or all that a name stands for."""
        match node:
            case ast.Constant(value=str(text)):
                return frozenset({text})
            case ast.IfExp(body=body, orelse=orelse):
                return _join([self._read_name(body, depth), self._read_name(orelse, depth)])
            case ast.Name(id=name) if depth < _MAX_DEPTH:
                return self._resolve_name(node, name, depth + 1)
        return None

    def _resolve_name(self, node: ast.AST, name: str, depth: int) -> _Names:
        """Return what a name stands for: a loop's variable, a function's parameter, or what the file assigns to it."""
        for scope in self._iter_scopes(node):
            match scope:
                case ast.For(target=target, iter=values) if _binds(target, name):
                    return self._read_items(target, values, name, depth)
                case ast.DictComp(generators=generators):
                    for generator in generators:
                        if _binds(generator.target, name):
                            return self._read_items(generator.target, generator.iter, name, depth)
                case ast.FunctionDef(args=arguments):
                    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
                    if name in names:
                        return self._read_arguments(scope.name, name, names.index(name), depth)
        assigned = self._constants.get(name, ())
        return _join([self._read_name(value, depth) for value in assigned]) if assigned else None

    def _iter_scopes(self, node: ast.AST) -> Iterator[ast.AST]:
        parent = self._parents.get(node)
        while parent is not None:
            yield parent
            parent = self._parents.get(parent)

    def _read_items(self, target: ast.expr, values: ast.expr, name: str, depth: int) -> _Names:
        """Return what a loop's variable stands for."""
        if isinstance(values, ast.Name) and depth < _MAX_DEPTH:
            constants = self._constants.get(values.id, ())
            return _join([self._read_items(target, one, name, depth + 1) for one in constants]) if constants else None
        match values:
            case ast.Call(func=ast.Attribute(value=mapping, attr="items")) if _binds_first(target, name):
                return self._read_keys(mapping, depth)
            case ast.Call(func=ast.Attribute(value=mapping, attr="keys"), args=[]) | (ast.Dict() as mapping):
                return self._read_keys(mapping, depth) if isinstance(target, ast.Name) else None
            case ast.Tuple(elts=listed) | ast.List(elts=listed) | ast.Set(elts=listed):
                return _join([self._read_item(target, item, name, depth) for item in listed])
        return None

    def _read_item(self, target: ast.expr, item: ast.expr, name: str, depth: int) -> _Names:
        if isinstance(target, ast.Name):
            return self._read_name(item, depth)
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(item, (ast.Tuple, ast.List)):
            pairs = zip(target.elts, item.elts, strict=False)
            return next((self._read_name(value, depth) for part, value in pairs if _binds(part, name)), None)
        return None

    def _read_arguments(self, function: str, name: str, index: int, depth: int) -> _Names:
        """Return what a function's parameter stands for: what every call in the file passes."""
        passed = [
            call.args[index] if index < len(call.args) else _find_keyword(call, name)
            for call in ast.walk(self.tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function
        ]
        return _join([self._read_name(value, depth) if value else None for value in passed]) if passed else None


def _iter_assignments(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    match statement:
        case ast.Assign(targets=targets, value=value):
            yield from ((target.id, value) for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value


def _join(parts: Sequence[_Names]) -> _Names:
    return None if None in parts else frozenset().union(*filter(None, parts))


def _find_keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _binds(target: ast.expr, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(target))


def _binds_first(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Tuple) and bool(target.elts) and _binds(target.elts[0], name)
