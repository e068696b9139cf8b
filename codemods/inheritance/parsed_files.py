"""Files parsed at most once, however many questions are asked of them and however many revisions share them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

from codemods.files.sources import SourceFile
from codemods.reading.module import Module
from codemods.reading.names import NameResolver
from codemods.reading.parse import parse_statements, read_statements
from codemods.reading.renamed_locals import restore_local_names
from codemods.reading.skim import skim
from plans.errors import SourceError

__all__ = ["ParsedFiles"]


@dataclass
class ParsedFiles:
    """What was parsed so far, by path and content: a file that two revisions have alike is parsed for one of them.

    Of a file that has an earlier version, functions in which only local variables have other names are read under the
    earlier names.
    """

    _earlier: dict[SourceFile, SourceFile] = field(default_factory=dict)
    _statements: dict[SourceFile, Sequence[ast.stmt]] = field(default_factory=dict)
    _modules: dict[SourceFile, Module] = field(default_factory=dict)
    _resolvers: dict[SourceFile, NameResolver] = field(default_factory=dict)
    _digests: dict[SourceFile, str] = field(default_factory=dict)

    def parse(self, source: SourceFile) -> Sequence[ast.stmt]:
        """Return the statements of a file.

        Raises:
            SourceError: the file cannot be parsed.
        """
        if source not in self._statements:
            statements = parse_statements(source)
            if source in self._earlier:
                self._restore_names(self._earlier[source], source, statements)
            self._statements[source] = statements
        return self._statements[source]

    def add_earlier(self, before: SourceFile, after: SourceFile) -> None:
        """Add the earlier version of a file that has not been parsed yet."""
        self._earlier[after] = before

    def _restore_names(self, before: SourceFile, after: SourceFile, statements: Sequence[ast.stmt]) -> None:
        with suppress(SourceError):
            restore_local_names((before, self.parse(before)), (after, statements))

    def read_module(self, source: SourceFile) -> Module:
        """Return what a file says about plans; plain plans are read without parsing the file.

        Raises:
            SourceError: the file's plans have an unusual form, and it cannot be parsed.
        """
        if source not in self._modules:
            self._modules[source] = skim(source) or read_statements(source, self.parse(source))
        return self._modules[source]

    def is_same_code(self, before: SourceFile, after: SourceFile) -> bool:
        """Return whether two files differ in comments and blank lines at most."""
        if before.data == after.data:
            return True
        return _list_code_lines(before) == _list_code_lines(after) and (
            self.compute_digest(before) == self.compute_digest(after)
        )

    def compute_digest(self, source: SourceFile) -> str:
        """Return a digest that only depends on a file's code; on its bytes if it cannot be parsed."""
        if source not in self._digests:
            self._digests[source] = sha256(self._normalize(source)).hexdigest()
        return self._digests[source]

    def _normalize(self, source: SourceFile) -> bytes:
        try:
            return ast.dump(ast.Module(list(self.parse(source)), [])).encode("utf-8", "surrogatepass")
        except (SourceError, RecursionError):
            return source.data

    def get_resolver(self, source: SourceFile) -> NameResolver:
        """Return the names of a file.

        Raises:
            SourceError: the file cannot be parsed.
        """
        if source not in self._resolvers:
            self._resolvers[source] = NameResolver(source, self.parse(source))
        return self._resolvers[source]


def _list_code_lines(source: SourceFile) -> list[bytes]:
    """Return a file's lines up to the first `#`, which may be in a string, without blank ones."""
    return [code for line in source.data.splitlines() if (code := line.partition(b"#")[0].strip())]
