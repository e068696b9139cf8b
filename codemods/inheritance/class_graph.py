"""The class graph: what a class's name stands for, its ancestors in Python's order, and its possible subclasses.

Everything is worked out from source alone and across files. `ClassGraph` walks the bases; its
two implementations decide where an import leads: `Tree` follows links between model files on disk, `FileGraph` any
file of a revision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from codemods.files.headers import scan_aliases, scan_classes, scan_imports
from codemods.files.sources import SourceFile
from codemods.reading.module import ClassPlans, Import, Module
from plans.errors import SourceError

__all__ = [
    "Ancestor",
    "ClassGraph",
    "ClassKey",
    "ImportTarget",
    "index_importers",
    "index_subclasses",
    "resolve_import",
    "split_import",
]

ClassKey = tuple[Path, str]
"""A class by its file and its qualified name."""

Ancestor = tuple[Path, ClassPlans]
"""A class that another one inherits from, with its file."""


@dataclass(frozen=True)
class ImportTarget:
    """A name in another file, as far as the importing file tells.

    Args:
        level: the number of leading dots of the import, 0 where absolute.
        module: the module after the dots.
        name: the qualified name in that module.
    """

    level: int
    module: str
    name: str


class ClassGraph(ABC):
    """The classes of a set of files and what they inherit from."""

    @abstractmethod
    def source(self, path: Path) -> SourceFile | None:
        """Return a file, None if there is none."""

    @abstractmethod
    def module(self, path: Path) -> Module | None:
        """Return what a file says about plans, None if there is no such file."""

    @abstractmethod
    def follow_import(self, path: Path, name: str) -> Iterator[ClassKey]:
        """Yield the classes that an imported dotted name may stand for."""

    def resolve(self, path: Path, scope: str, name: str) -> Iterable[ClassKey]:
        """Return the classes that a dotted name may stand for: one of the same file, else imported ones.

        Args:
            path: the file.
            scope: the qualified name of the class in whose header or body the name stands.
            name: the name, which may be an alias of another: `Base = ToyConfig`.
        """
        module, source = self.module(path), self.source(path)
        if module is None or source is None:
            return ()
        names = [name]
        for candidate in names:
            if local := _find_local_class(module, scope, candidate):
                return ((path, local),)
            alias = _find_alias(source, candidate)
            names += [alias] if alias and alias not in names else []
        return self.follow_import(path, names[-1])

    def mro(self, path: Path, class_name: str) -> tuple[Ancestor, ...]:
        """Return a class and its bases in the order in which Python looks an attribute up.

        Raises:
            SourceError: a file on the way cannot be read or parsed.
        """
        key = path, class_name
        if key not in self._mros:
            self._mros[key] = ()  # a class that inherits from itself ends here
            try:
                ancestors = list(self._walk_ancestors(key))
            except BaseException:
                del self._mros[key]
                raise
            last = {(file, owner.name): (file, owner) for file, owner in reversed(ancestors)}
            self._mros[key] = tuple(reversed(last.values()))
        return self._mros[key]

    @cached_property
    def _mros(self) -> dict[ClassKey, tuple[Ancestor, ...]]:
        return {}

    def find_bases(self, path: Path, class_name: str) -> tuple[tuple[ClassKey, ...], ...]:
        """Return the direct bases of a class that can be found, each as the classes that its name may stand for.

        The only base of a name that its file imports and passes on is the class that it stands for elsewhere.
        """
        module = self.module(path)
        if module is None:
            return ()
        if owner := module.classes.get(class_name):
            bases = [tuple(self.resolve(path, class_name, base)) for base in owner.bases]
        else:
            bases = [tuple(self.follow_import(path, class_name))]
        return tuple(alternatives for alternatives in bases if alternatives)

    def _walk_ancestors(self, key: ClassKey) -> Iterator[Ancestor]:
        """Yield a class, then the ancestors of each base; those that two bases share come twice.

        Only where a class has several bases are those of each worked out on their own.
        """
        way: set[ClassKey] = set()
        while key not in way:
            way.add(key)
            module = self.module(key[0])
            if module is not None and (owner := module.classes.get(key[1])):
                yield key[0], owner
            bases = [alternatives[0] for alternatives in self.find_bases(*key)]
            if len(bases) != 1:
                for base in bases:
                    yield from self.mro(*base)
                return
            (key,) = bases
            if key in self._mros:
                yield from self._mros[key]
                return


def resolve_import(module: Module, name: str) -> Iterator[ImportTarget]:
    """Yield what a dotted name may stand for that a file imports: `Config`, `configuration.Config`, `Outer.Config`."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        if statement := module.imports.get(".".join(parts[:size])):
            yield from split_import(statement, parts[size:])
            return
    if len(parts) > 1:
        yield from split_import(Import(0, "", ""), parts)
    elif everything := module.imports.get("*"):
        yield ImportTarget(everything.level, everything.module, name)


def split_import(base: Import, rest: Sequence[str]) -> Iterator[ImportTarget]:
    """Yield the ways to split the names below an import into modules and classes, the longest module first."""
    below = [base.name, *rest] if base.name else rest
    for size in range(len(below) - 1, -1, -1):
        module = ".".join(filter(None, [base.module, *below[:size]]))
        if base.level or module:
            yield ImportTarget(base.level, module, ".".join(below[size:]))


def _find_local_class(module: Module, scope: str, name: str) -> str | None:
    """Return the class of the same file that a name in another class stands for, None if it is none of them."""
    outer, _, _ = scope.rpartition(".")
    names = (f"{outer}.{name}", name) if outer else (name,)
    return next((known for known in names if known in module.classes and known != scope), None)


def _find_alias(source: SourceFile, name: str) -> str | None:
    """Return the other name that a file's top level assigns to a name once: `Base = ToyConfig`."""
    if b"\n" + name.encode() + b" = " not in source.data:
        return None
    meanings = [meant for alias, meant in scan_aliases(_read_lines(source)) if alias == name]
    return meanings[0] if len(meanings) == 1 else None


def index_subclasses(sources: Iterable[SourceFile]) -> dict[str, list[ClassKey]]:
    """Return the classes that may have a plan of a class by that class's name, the class itself included.

    Only headers and imports are scanned, and names are compared without their modules: what the index leads to must be
    confirmed by `ClassGraph.mro`.
    """
    index: dict[str, list[ClassKey]] = defaultdict(list)
    for source in sources:
        lines = _read_lines(source)
        aliases = _scan_bound_names(lines)
        for header in scan_classes(lines, nested=True):
            key = source.path, header.name
            index[header.name].append(key)
            for word in header.words:
                index[aliases.get(word, word)].append(key)
    return dict(index)


def index_importers(sources: Iterable[SourceFile]) -> dict[str, list[Path]]:
    """Return the files that mention plans by the parts of the modules they import from, model folders among them."""
    index: dict[str, dict[Path, None]] = defaultdict(dict)
    for source in sources:
        for statement in scan_imports(_read_lines(source)) if b"_plan" in source.data else ():
            for part in statement.module.split("."):
                index[part][source.path] = None
    return {part: list(paths) for part, paths in index.items()}


def _scan_bound_names(lines: bytes) -> dict[str, str]:
    """Return the names that imports and assignments before a file's first class give to others, with those others."""
    head = lines[: lines.find(b"\nclass ")]
    bound: dict[str, str] = {}
    for statement in scan_imports(head) if b" as " in head else ():
        bound |= {alias: name for name, alias in statement.names} if b" as " in statement.listed else {}
    for alias, name in scan_aliases(head) if b" = " in head else ():
        bound[alias] = bound.get(name, name.rpartition(".")[2])
    return bound


def _read_lines(source: SourceFile) -> bytes:
    """Return a file's text after a line end; its bytes where they are no text, which only a parser should report."""
    try:
        return source.lines
    except SourceError:
        return b"\n" + source.data
