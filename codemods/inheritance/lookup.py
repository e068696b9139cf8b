"""Names looked up across files: the constant that one stands for, and all that an expression is made of."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from codemods.inheritance.class_graph import ClassGraph
from codemods.inheritance.imports import list_module_files, resolve_imported_name
from codemods.reading.entries import PlanEntry
from codemods.reading.module import ClassPlans, Module, PlanLiteral, Reference, iter_literals
from codemods.reading.names import NameResolver, get_dotted_name, parse_expression
from codemods.reading.plan_literals import AssignmentTarget, read_assignment
from codemods.reading.scope import Scope

__all__ = ["Constant", "NameLookup"]


@dataclass(frozen=True)
class Constant:
    """What a name always stands for.

    Args:
        path: the file that it is defined in.
        scope: the class that its value is read in, empty for a module's.
        value: the value.
    """

    path: Path
    scope: str
    value: ast.expr


@dataclass
class NameLookup:
    """Looks names up in files, each parsed at most once.

    Args:
        graph: the files.
    """

    graph: ClassGraph
    _origins: dict[Path, NameResolver | None] = field(default_factory=dict)

    def find_constant(self, path: Path, scope: str, name: str) -> Constant | None:
        """Return the constant that a dotted name in a class of a file stands for, None where it is none for sure."""
        return next(self._search_constants(path, scope, name, frozenset()), None)

    def read_plan_uses(self, constant: Constant, attribute: str) -> Iterator[PlanLiteral | Reference]:
        """Yield what a constant's value gives to a plan."""
        origins = self._get_origins(constant.path)
        assert origins is not None
        target = AssignmentTarget(constant.scope, attribute, Scope(constant.scope), is_assigned=True)
        for use in read_assignment(constant.value, target, origins.source, origins.definitions):
            if isinstance(use, (PlanLiteral, Reference)):
                yield use

    def resolve_style(self, path: Path, scope: str, entry: PlanEntry) -> tuple[str | None, str]:
        """Return an entry's style; of one that is computed from more than a constant, None and what it is made of."""
        if entry.style is not None:
            return entry.style, ""
        origins = self._get_origins(path)
        assert origins is not None
        node = origins.parse_span(entry.style_span)
        name = get_dotted_name(node)
        found = self.find_constant(path, scope, name) if name else None
        if found and isinstance(found.value, ast.Constant) and isinstance(found.value.value, str):
            return found.value.value, ""
        return None, self.compute_provenance(path, node)

    def compute_provenance(self, path: Path, node: ast.AST) -> str:
        """Return all that an expression is made of: its text, what defines its names, and the files they come from."""
        origins, module = self._get_origins(path), self.graph.module(path)
        assert origins is not None
        assert module is not None
        texts, names = origins.collect_dependencies(node)
        sources = filter(None, map(self.graph.get_source, sorted(_list_imported_files(path, module, names))))
        return "\n".join([*texts, *(sha256(source.data).hexdigest() for source in sources)])

    def find_unresolved_references(self, path: Path, owner: ClassPlans) -> Iterator[Reference]:
        """Yield as taken whatever else puts entries into a class's plans that cannot be read."""
        module, origins = self.graph.module(path), self._get_origins(path)
        assert module is not None
        assert origins is not None
        for use in module.unresolved:
            if use.class_name != owner.name:
                continue
            function, statement = origins.find_statement(use.line)
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            if not any(taken.attribute == use.attribute and taken.line in lines for taken in owner.references):
                text = ast.unparse(statement)
                start = origins.source.offset(statement.lineno, statement.col_offset)
                yield Reference(owner.name, use.attribute, use.line, start, text, function)

    def find_plan_dependencies(self, path: Path) -> frozenset[Path]:
        """Return the files that a file's plans may take entries or styles from.

        Raises:
            SourceError: the file does not parse.
        """
        origins, module = self._get_origins(path), self.graph.module(path)
        if origins is None or module is None:
            return frozenset()
        owners = module.classes.values()
        taken = [
            parse_expression(one.text)
            for owner in owners
            for one in (*owner.references, *self.find_unresolved_references(path, owner))
        ]
        entries = (entry for literal in iter_literals(module) for entry in literal.entries)
        styles = [origins.parse_span(entry.style_span) for entry in entries if entry.style is None]
        names = {name for node in (*taken, *styles) for name in origins.collect_dependencies(node)[1]}
        return frozenset(_list_imported_files(path, module, names))

    def _search_constants(self, path: Path, scope: str, name: str, visited: frozenset[Path]) -> Iterator[Constant]:
        """Yield what a name stands for in a file, or in one that it imports the name from."""
        origins, module = self._get_origins(path), self.graph.module(path)
        if origins is None or module is None or path in visited:
            return
        value = origins.resolve_constant(name, scope)
        if value is not None:
            yield Constant(path, scope, value)
            return
        for meant in resolve_imported_name(module, name):
            for file in list_module_files(path, meant.level, meant.module):
                yield from self._search_constants(file, "", meant.class_name, visited | {path})

    def _get_origins(self, path: Path) -> NameResolver | None:
        if path not in self._origins:
            source = self.graph.get_source(path)
            self._origins[path] = NameResolver(source) if source else None
        return self._origins[path]


def _list_imported_files(path: Path, module: Module, names: Iterable[str]) -> set[Path]:
    """Return where names of a file may be imported from."""
    modules = {(meant.level, meant.module) for name in names for meant in resolve_imported_name(module, name)}
    return {file for level, name in modules for file in list_module_files(path, level, name)}
