"""Names looked up across files: the constant that one stands for, and all that an expression is made of."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from codemods.inheritance.imports import imported, module_files
from codemods.inheritance.lineage import Lineages
from codemods.reading.entries import Entry
from codemods.reading.module import ClassPlans, Module, PlanLiteral, Taken, all_literals
from codemods.reading.names import dotted
from codemods.reading.origins import Origins, expression
from codemods.reading.scope import Scope
from codemods.reading.written import Target, written

__all__ = ["Constant", "Lookup"]


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
class Lookup:
    """Looks names up in files, each parsed at most once.

    Args:
        lineages: the files.
    """

    lineages: Lineages
    _origins: dict[Path, Origins | None] = field(default_factory=dict)

    def constant(self, path: Path, scope: str, name: str) -> Constant | None:
        """Return the constant that a dotted name in a class of a file stands for, None where it is none for sure."""
        return next(self._constants(path, scope, name, frozenset()), None)

    def uses(self, constant: Constant, attribute: str) -> Iterator[PlanLiteral | Taken]:
        """Yield what a constant's value gives to a plan."""
        origins = self._origins_of(constant.path)
        assert origins is not None
        target = Target(constant.scope, attribute, Scope(constant.scope), assigned=True)
        for use in written(constant.value, target, origins.source, origins.definitions):
            if isinstance(use, (PlanLiteral, Taken)):
                yield use

    def style(self, path: Path, scope: str, entry: Entry) -> tuple[str | None, str]:
        """Return an entry's style; of one that is computed from more than a constant, None and what it is made of."""
        if entry.style is not None:
            return entry.style, ""
        origins = self._origins_of(path)
        assert origins is not None
        node = origins.part(entry.style_span)
        name = dotted(node)
        found = self.constant(path, scope, name) if name else None
        if found and isinstance(found.value, ast.Constant) and isinstance(found.value.value, str):
            return found.value.value, ""
        return None, self.behind(path, node)

    def behind(self, path: Path, node: ast.AST) -> str:
        """Return all that an expression is made of: its text, what defines its names, and the files they come from."""
        origins, module = self._origins_of(path), self.lineages.module(path)
        assert origins is not None
        assert module is not None
        texts, names = origins.behind(node)
        sources = filter(None, map(self.lineages.source_of, sorted(_files(path, module, names))))
        return "\n".join([*texts, *(sha256(source.data).hexdigest() for source in sources)])

    def hidden(self, path: Path, owner: ClassPlans) -> Iterator[Taken]:
        """Yield as taken whatever else puts entries into a class's plans that cannot be read."""
        module, origins = self.lineages.module(path), self._origins_of(path)
        assert module is not None
        assert origins is not None
        for use in module.unread:
            if use.class_name != owner.name:
                continue
            function, statement = origins.statement(use.line)
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            if not any(taken.attribute == use.attribute and taken.line in lines for taken in owner.taken):
                text = ast.unparse(statement)
                start = origins.source.offset(statement.lineno, statement.col_offset)
                yield Taken(owner.name, use.attribute, use.line, start, text, function)

    def plan_files(self, path: Path) -> frozenset[Path]:
        """Return the files that a file's plans may take entries or styles from.

        Raises:
            SourceError: the file does not parse.
        """
        origins, module = self._origins_of(path), self.lineages.module(path)
        if origins is None or module is None:
            return frozenset()
        owners = module.classes.values()
        taken = [expression(one.text) for owner in owners for one in (*owner.taken, *self.hidden(path, owner))]
        entries = (entry for literal in all_literals(module) for entry in literal.entries)
        styles = [origins.part(entry.style_span) for entry in entries if entry.style is None]
        names = {name for node in (*taken, *styles) for name in origins.behind(node)[1]}
        return frozenset(_files(path, module, names))

    def _constants(self, path: Path, scope: str, name: str, passed: frozenset[Path]) -> Iterator[Constant]:
        """Yield what a name stands for in a file, or in one that it imports the name from."""
        origins, module = self._origins_of(path), self.lineages.module(path)
        if origins is None or module is None or path in passed:
            return
        value = origins.constant(name, scope)
        if value is not None:
            yield Constant(path, scope, value)
            return
        for meant in imported(module, name):
            for file in module_files(path, meant.level, meant.module):
                yield from self._constants(file, "", meant.class_name, passed | {path})

    def _origins_of(self, path: Path) -> Origins | None:
        if path not in self._origins:
            source = self.lineages.source_of(path)
            self._origins[path] = Origins(source) if source else None
        return self._origins[path]


def _files(path: Path, module: Module, names: Iterable[str]) -> set[Path]:
    """Return where names of a file may be imported from."""
    modules = {(meant.level, meant.module) for name in names for meant in imported(module, name)}
    return {file for level, name in modules for file in module_files(path, level, name)}
