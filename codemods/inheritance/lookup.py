"""Names looked up across the files of a revision: the constant a name stands for, what an expression depends on."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from codemods.inheritance.file_graph import FileGraph
from codemods.inheritance.provenance import ProvenanceTracer
from codemods.reading.entries import PlanEntry
from codemods.reading.module import ClassPlans, PlanLiteral, Reference, iter_literals
from codemods.reading.names import NameResolver, get_dotted_name, parse_expression
from codemods.reading.plan_literals import AssignmentTarget, read_assignment
from codemods.reading.scope import Scope

__all__ = ["Constant", "NameLookup"]


@dataclass(frozen=True)
class Constant:
    """The only value that a name ever has.

    Args:
        path: the file that defines the name.
        scope: the qualified name of the class that defines it, empty at the top level.
        value: the value's expression.
    """

    path: Path
    scope: str
    value: ast.expr


@dataclass
class NameLookup:
    """Looks up names in the files of a graph.

    Args:
        graph: the files.
        is_framework: returns whether a file is the framework's own code, whose plans are those of all models.
    """

    graph: FileGraph
    is_framework: Callable[[Path], bool] = lambda path: False
    _resolvers: dict[Path, NameResolver | None] = field(default_factory=dict)

    def find_constant(self, path: Path, scope: str, name: str) -> Constant | None:
        """Return the constant that a dotted name in a class of a file stands for, None if that is not certain."""
        constants = list(self._search_constants(path, scope, name, frozenset()))
        return constants[0] if len(constants) == 1 else None

    def read_plan_uses(self, constant: Constant, attribute: str) -> Iterator[PlanLiteral | Reference]:
        """Yield the entries and references that a constant's value contributes to a plan."""
        resolver = self._get_resolver(constant.path)
        assert resolver is not None
        target = AssignmentTarget(constant.scope, attribute, Scope(constant.scope), "assigned")
        for use in read_assignment(constant.value, target, resolver.source, resolver.definitions):
            if isinstance(use, (PlanLiteral, Reference)):
                yield use

    def resolve_style(self, path: Path, scope: str, entry: PlanEntry, function: str) -> tuple[str | None, str]:
        """Return an entry's style; if it is computed from more than a constant, None and its provenance."""
        if entry.style is not None:
            return entry.style, ""
        resolver = self._get_resolver(path)
        assert resolver is not None
        node = resolver.parse_span(entry.style_span)
        name = get_dotted_name(node)
        constant = self.find_constant(path, scope, name) if name else None
        match constant:
            case Constant(value=ast.Constant(value=str(style))):
                return style, ""
        return None, self.compute_provenance(path, node, entry.line if function else None)

    def compute_provenance(self, path: Path, node: ast.AST, line: int | None = None) -> str:
        """Return what determines an expression's value: the texts of what its names stand for, and digests of files.

        Args:
            path: the file.
            node: the expression.
            line: the expression's line if it stands in a function, where fewer names matter to the framework's code.
        """
        return "\n".join(sorted(self._provenances.trace(path, node, line)[0]))

    def find_unresolved_references(self, path: Path, owner: ClassPlans) -> Iterator[Reference]:
        """Yield as references the other statements that put entries into a class's plans which cannot be read."""
        module = self.graph.module(path)
        assert module is not None
        if not module.unresolved:
            return
        resolver = self._get_resolver(path)
        assert resolver is not None
        for use in module.unresolved:
            if (use.class_name if use.class_name in module.classes else "") != owner.name:
                continue
            function, statement = resolver.find_statement(use.line)
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            if not any(known.attribute == use.attribute and known.line in lines for known in owner.references):
                text = ast.unparse(statement)
                start = resolver.source.offset(statement.lineno, statement.col_offset)
                yield Reference(owner.name, use.attribute, use.line, start, text, function)

    def find_plan_dependencies(self, path: Path) -> frozenset[Path]:
        """Return the other files that a file's plans may take entries or styles from, however indirectly.

        Raises:
            SourceError: the file cannot be parsed.
        """
        module = self.graph.module(path)
        if module is None or module.plan_classes is not None:  # plain displays depend on nothing
            return frozenset()
        resolver = self._get_resolver(path)
        assert resolver is not None
        owners = [*module.classes.values(), *([] if "" in module.classes else [ClassPlans("")])]
        references = [
            (parse_expression(reference.text), reference.line if reference.function else None)
            for owner in owners
            for reference in (*owner.references, *self.find_unresolved_references(path, owner))
        ]
        references += [
            (resolver.parse_span(entry.style_span), entry.line if literal.function else None)
            for literal in iter_literals(module)
            for entry in literal.entries
            if entry.style is None
        ]
        return frozenset(
            file for node, line in references for file in self._provenances.trace(path, node, line)[1] if file != path
        )

    def _search_constants(self, path: Path, scope: str, name: str, visited: frozenset[Path]) -> Iterator[Constant]:
        """Yield the constants that a name stands for in a file, or in the files that it imports the name from."""
        resolver, module = self._get_resolver(path), self.graph.module(path)
        if resolver is None or module is None or path in visited:
            return
        value = resolver.resolve_constant(name, scope)
        if value is not None:
            yield Constant(path, scope, value)
            return
        for targets in self.graph.list_import_targets(path, name):
            found = (self._search_constants(file, "", target, visited | {path}) for file, target in targets)
            yield from next((constants for one in found if (constants := list(one))), [])

    @cached_property
    def _provenances(self) -> ProvenanceTracer:
        return ProvenanceTracer(self.graph, self._get_resolver, self.is_framework)

    def _get_resolver(self, path: Path) -> NameResolver | None:
        if path not in self._resolvers:
            source = self.graph.source(path)
            self._resolvers[path] = self.graph.files.get_resolver(source) if source else None
        return self._resolvers[path]
