"""Which part of a tree a run speaks of: the configuration's files, the models that changed, what comments silence."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from codemods.files.config import Configuration
from codemods.files.sources import SourceFile
from codemods.tree.ignores import Ignore, can_contain_ignores, find_suppressed_lines, find_unused_ignores, read_ignores
from plans.rule import Finding

__all__ = ["Selection", "Suppressions"]


@dataclass(frozen=True)
class Selection:
    """What a run may report on and write; everything else is only looked at.

    Args:
        configuration: the project's.
        changed_folders: folders whose files changed, None for all.
    """

    configuration: Configuration = field(default_factory=Configuration)
    changed_folders: frozenset[Path] | None = None

    def includes(self, path: Path) -> bool:
        """Say whether a file may be reported on and written."""
        return self.configuration.is_included(path)

    def is_in_scope(self, paths: Iterable[Path]) -> bool:
        """Say whether a plan that lies in these files is spoken of: one changed file in one of their folders is enough.

        An owner and its copies change together, so a change beside any of them brings all of them in.
        """
        return self.changed_folders is None or any(path.parent.resolve() in self.changed_folders for path in paths)


@dataclass
class Suppressions:
    """Answers what is ignored, by comments and by configuration, and remembers which comments were of use.

    Args:
        selection: what the run speaks of.
    """

    selection: Selection = field(default_factory=Selection)
    _sources: dict[Path, SourceFile] = field(default_factory=dict)
    _ignores: dict[Path, tuple[Ignore, ...]] = field(default_factory=dict)
    _used: dict[Path, set[tuple[int, str]]] = field(default_factory=dict)

    def read_comments(self, source: SourceFile) -> None:
        """Take the comments of a file."""
        if can_contain_ignores(source.data) and (ignores := read_ignores(source.body)):
            self._sources[source.path] = source
            self._ignores[source.path] = ignores

    def is_suppressed(self, path: Path, lines: Container[int], code: str) -> bool:
        """Say whether a finding is to be kept quiet.

        Args:
            path: of the file.
            lines: those that what is found stands on.
            code: of the finding.
        """
        if found := find_suppressed_lines(self._ignores.get(path, ()), lines, code):
            self._used.setdefault(path, set()).update((line, code) for line in found)
            return True
        return self.selection.configuration.is_ignored(path, code)

    def find_unused(self) -> Iterator[tuple[Path, int, Finding]]:
        """Yield a finding for every comment that silenced nothing, once everything else was asked.

        Generated files are left out: their comments come from the modular file and are mended there. Those that
        ignore an edit which their owner wants are found with it.
        """
        for path, ignores in self._ignores.items():
            if self._sources[path].generated_from or not self.selection.is_in_scope([path]):
                continue
            for line, finding in find_unused_ignores(ignores, self._used.get(path, set())):
                if not self.selection.configuration.is_ignored(path, finding.code):
                    yield path, line, finding
