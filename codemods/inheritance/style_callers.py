"""Style callers: code that gets styles of plans from functions of other files, and tells them apart by their names.

`config.style_of(key) == "rowwise"` names no plan. So the names of all functions, attributes and constants that give
plans or styles to others are looked for in every file of the tree, and then those of the functions that pass them on.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.ownership import Tree
from codemods.reading.escapes import index_parents
from codemods.reading.expressions import walk_statements
from codemods.reading.module import Conflict, StyleReading
from codemods.reading.names import Definitions
from codemods.reading.parse import parse_statements
from codemods.reading.style_flow import Carried, StyleFlow
from codemods.reading.style_reads import StyleReader
from plans.dialect import dialect_names, load_dialect
from plans.errors import SourceError

__all__ = ["StyleCall", "find_style_calls"]

_COMMON_NAMES = frozenset(name for kind in (builtins, dict, list, set, str) for name in dir(kind))
_SELF_NAMES = ("self", "cls")
_SEPARATOR = "\0"
_VAGUE = f"{_SEPARATOR}vague"
_UNPARSED = "may tell styles apart, but does not parse"

_Given = Mapping[str, Mapping[Path, Carried]]
"""What names give to other files: by the name, and by the file that defines it."""


@dataclass(frozen=True)
class StyleCall:
    """Code that tells the styles of another file's plan apart.

    Args:
        path: the file with the code.
        source: the file whose function gives the styles to others.
        conflict: what the code does; the class with the plan is named as in the source.
    """

    path: Path
    source: Path
    conflict: Conflict


def find_style_calls(tree: Tree, code_files: Sequence[Path], other_files: Iterable[Path]) -> Sequence[StyleCall]:
    """Return the code of a tree that tells apart styles which it gets from functions of other files.

    Args:
        tree: the files.
        code_files: the files whose functions may give styles to others.
        other_files: the other files to search.
    """
    given: dict[str, dict[Path, Carried]] = defaultdict(lambda: defaultdict(Carried))
    for path in code_files:
        for one in tree.module(path).style_sources:
            plans = frozenset([(_SEPARATOR.join((str(path), one.class_name)), one.attribute)])
            given[one.name][path] |= Carried(plans) if one.is_plan else Carried(styles=plans)
    files = [*code_files, *other_files] if given else []
    calls: dict[StyleCall, None] = {}
    names = list(given)
    quoted_style = re.compile(rb"[\"'](?:%s)[\"']" % b"|".join(_list_styles())) if names else re.compile(b"")
    while names:
        mention = re.compile(rb"\b(?:%s)\b" % b"|".join(re.escape(name.encode()) for name in names))
        callers = [source for source in map(tree.source, files) if mention.search(source.data)]
        clear = _find_clear_names(callers, given)
        names = []
        for source in callers:
            caller = _Caller(tree, source, given, clear)
            if not caller.is_certain and not quoted_style.search(source.data):
                continue
            calls |= dict.fromkeys(caller.find_calls())
            for name, carried in caller.exports.items() if caller.is_certain else ():
                if given[name][source.path] | carried != given[name][source.path]:
                    given[name][source.path] |= carried
                    names.append(name)
    return list(calls)


def _list_styles() -> list[bytes]:
    dialects = map(load_dialect, dialect_names())
    return sorted({re.escape(style.encode()) for dialect in dialects for style in dialect.styles})


def _find_clear_names(sources: Iterable[SourceFile], given: _Given) -> frozenset[str]:
    """Return the names of functions that give styles to others wherever they are defined, and that no dict has."""
    defining: dict[str, list[Path]] = defaultdict(list)
    for source in sources:
        for name in re.findall(rb"\bdef\s+(\w+)", source.data):
            defining[name.decode(errors="replace")].append(source.path)
    return frozenset(
        name for name, files in given.items() if name in defining and files.keys() >= set(defining[name])
    ).difference(_COMMON_NAMES)


@dataclass(frozen=True)
class _Caller:
    """A file that may get styles from others.

    Args:
        tree: the files.
        source: the file.
        given: what other files give it.
        clear: the names that give styles wherever they occur. By another name a file gets them for sure only if it
            names the class or file that they come from; else it counts only if it compares with styles' names.
    """

    tree: Tree
    source: SourceFile
    given: _Given
    clear: frozenset[str]

    @property
    def is_certain(self) -> bool:
        """Whether any styles are sure to arrive here."""
        plans = (plan for one in self._carried.values() for plan, _ in one.plans | one.styles)
        return not all(plan.endswith(_VAGUE) for plan in plans)

    def find_calls(self) -> Iterator[StyleCall]:
        """Yield the code that tells styles apart."""
        for conflict in self._find_conflicts():
            path, class_name, *vague = conflict.class_name.split(_SEPARATOR)
            if not vague or (conflict.reading and conflict.reading.is_known):
                yield StyleCall(self.source.path, Path(path), replace(conflict, class_name=class_name))

    def _find_conflicts(self) -> Iterator[Conflict]:
        if self._definitions is None:
            for carried in self._carried.values():
                for plan in sorted(carried.plans | carried.styles):
                    yield Conflict(*plan, None, 1, _UNPARSED, reading=StyleReading(is_known=False))
        elif self._flow is not None:
            yield from StyleReader(self._flow, self._definitions, lambda node: "").find_readings()

    @cached_property
    def exports(self) -> Mapping[str, Carried]:
        """What the file in turn gives to others."""
        return self._flow.list_exports() if self._flow else {}

    @cached_property
    def _flow(self) -> StyleFlow | None:
        """The styles in the names of the file, None if it gets none or does not parse."""
        if self._definitions is None:
            return None
        parents = index_parents(self._definitions.statements)
        nodes = (*self._definitions.statements, *parents)
        resolver = _NameResolver(self._definitions, self._carried)
        references: dict[ast.AST, Carried] = {node: carried for node in nodes if (carried := resolver.resolve(node))}
        return StyleFlow(nodes, parents, references.get) if references else None

    @cached_property
    def _definitions(self) -> Definitions | None:
        try:
            return Definitions(parse_statements(self.source))
        except SourceError:
            return None

    @cached_property
    def _carried(self) -> Mapping[str, Carried]:
        """What each name carries that other files give."""
        carried: dict[str, Carried] = defaultdict(Carried)
        words = set(re.findall(rb"\w+", self.source.data))
        for name, files in self.given.items():
            for path, one in files.items() if name.encode() in words else ():
                if path != self.source.path:
                    is_certain = name in self.clear or self._names_file(path)
                    carried[name] |= one if is_certain else _mark_vague(one)
        return carried

    def _names_file(self, path: Path) -> bool:
        """Return whether this file is beside another one, or names it or one of its classes."""
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        words = b"|".join(re.escape(name.encode()) for name in (stem, *self.tree.module(path).classes) if name)
        return path.parent == self.source.path.parent or bool(re.search(rb"\b(?:%s)\b" % words, self.source.data))


@dataclass(frozen=True)
class _NameResolver:
    """Resolves the names in a file that other files may have given something.

    Args:
        definitions: the definitions of the names in the file.
        carried: what each name carries.
    """

    definitions: Definitions
    carried: Mapping[str, Carried]

    def resolve(self, node: ast.AST) -> Carried | None:
        """Return what a call, an attribute or an imported name carries, None if nothing that is known."""
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                return self._get(owner, name)
            case ast.Call(func=function):
                return self.resolve(function)
            case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
                return self._get(owner, name)
            case ast.Name(id=name, ctx=ast.Load()) if name in self.definitions.imported:
                return self.carried.get(self._original_names.get(name, name))
        return None

    def _get(self, owner: ast.AST, name: str) -> Carried | None:
        """Return what an attribute carries, unless the file defines it for its own objects."""
        is_own = isinstance(owner, ast.Name) and owner.id in _SELF_NAMES and self.definitions.is_defined(name)
        return None if is_own else self.carried.get(name)

    @cached_property
    def _original_names(self) -> Mapping[str, str]:
        """The names that imports give other ones, by these."""
        imports = (node for node in walk_statements(self.definitions.statements) if isinstance(node, ast.ImportFrom))
        return {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}


def _mark_vague(carried: Carried) -> Carried:
    """Return what a name carries that may be another thing of the same name."""
    plans, styles = (
        frozenset((name if name.endswith(_VAGUE) else f"{name}{_VAGUE}", plan) for name, plan in names)
        for names in (carried.plans, carried.styles)
    )
    return Carried(plans, styles)
