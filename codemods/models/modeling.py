"""Modeling source read without running it: a model's classes, their bases, and what the names in them stand for.

Names are followed wherever they lead inside the tree: into other files, through packages that re-export them and
through the branches of `try` and `if`. One that leaves the tree is known only if it is the released framework's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from codemods.models.framework import FRAMEWORK_LEVEL, find_alias, is_framework_name
from codemods.models.model_files import FileState, find_modeling_files, find_parent_files, read_lines, stat_file
from codemods.models.module_text import ClassSource, ImportedName, ModuleText

__all__ = ["Ancestry", "Assigned", "Meaning", "ModelingSource", "Outside", "load_modeling"]

_LACKS = "is not in"
_MAX_ALIASES = 4  # names that stand for other names before a base class counts as unknown


@dataclass(frozen=True)
class Outside:
    """A name that leads to no class and no value of the tree.

    Args:
        dotted: the name with the modules before it, as far as they are known.
        reason: why it is unknown, empty for the framework's names.
    """

    dotted: str
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Assigned:
    """A name that a statement at the top level of a file assigns.

    Args:
        scope: the file's top level.
        offset: where the statement begins.
    """

    scope: ClassSource
    offset: int


Meaning = ClassSource | Assigned | Outside
"""What a name may stand for."""


@dataclass(frozen=True)
class Ancestry:
    """A class with everything that it inherits.

    Args:
        classes: the class and its bases in the tree, nearest first.
        external: the dotted names of its bases in the framework.
        unknown: why the other bases are unknown.
    """

    classes: tuple[ClassSource, ...]
    external: frozenset[str]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ModelingSource:
    """The modeling source of one model.

    Args:
        files: its files; those that their names lead to are read when a question needs them.
    """

    files: Mapping[Path, ModuleText]
    _followed: dict[Path, tuple[FileState, ModuleText | None]] = field(default_factory=dict)
    _meanings: dict[tuple[Path, str], tuple[Meaning, ...]] = field(default_factory=dict)
    _ancestries: dict[ClassSource, Ancestry] = field(default_factory=dict)

    @cached_property
    def classes(self) -> Mapping[str, ClassSource]:
        """The classes of the model's own files by name; of several with one name, the last."""
        return {name: found[-1] for module in self.files.values() for name, found in module.classes.items()}

    @property
    def read_files(self) -> Iterator[ModuleText]:
        """The model's own files, then those that names have led to so far."""
        yield from self.files.values()
        yield from [module for _, module in self._followed.values() if module is not None]

    def is_current(self) -> bool:
        """Return whether the files that names have led to are as they were when they were read."""
        return all(stat_file(path) == state for path, (state, _) in self._followed.items())

    def find_ancestry(self, definition: ClassSource) -> Ancestry:
        """Return a class with its bases; of a base with several meanings, all of them."""
        if definition not in self._ancestries:
            mro, external, unknown = [definition], set[str](), dict[str, None]()
            for current in mro:
                for base in current.bases:
                    for meaning in self.resolve_class(current.path, base):
                        if isinstance(meaning, Outside):
                            known = not meaning.reason
                            external |= {meaning.dotted} if known else set()
                            unknown |= {} if known else {f"its base `{base}` {meaning.reason}": None}
                        elif meaning not in mro:
                            mro.append(meaning)
            self._ancestries[definition] = Ancestry(tuple(mro), frozenset(external), tuple(unknown))
        return self._ancestries[definition]

    def resolve_class(self, path: Path, dotted: str, depth: int = 0) -> Iterator[ClassSource | Outside]:
        """Yield the classes that a dotted name in a file may stand for, aliases followed."""
        for meaning in self.resolve(path, dotted):
            if isinstance(meaning, Outside):
                known = meaning.reason or _is_class_of_framework(meaning.dotted)
                yield meaning if known else Outside(meaning.dotted, "is not known as a base class")
                continue
            if isinstance(meaning, ClassSource):
                yield meaning
                continue
            alias = meaning.scope.data[meaning.offset :].partition(b"\n")[0].partition(b"=")[2].partition(b"#")[0]
            name = alias.strip().decode("utf-8", "replace")
            if name.replace(".", "").isidentifier() and name != dotted and depth < _MAX_ALIASES:
                yield from self.resolve_class(meaning.scope.path, name, depth + 1)
            else:
                yield Outside(dotted, f"is computed in {meaning.scope.format_line(meaning.offset)}")

    def resolve(self, path: Path, dotted: str) -> tuple[Meaning, ...]:
        """Return what a dotted name in a file may stand for, never nothing."""
        key = path, dotted
        if key not in self._meanings:
            root, *rest = dotted.split(".")
            module = self.files.get(path) or self._load(path)
            found = tuple(self._search(module, root, rest, set())) if module else ()
            self._meanings[key] = found or (self._resolve_unbound(dotted),)
        return self._meanings[key]

    def _resolve_unbound(self, dotted: str) -> Meaning:
        """Return what a name stands for that its file does not bind: excerpts of source have no imports."""
        if dotted in self.classes:
            return self.classes[dotted]
        root, _, rest = dotted.partition(".")
        alias = find_alias(root)
        if alias:
            return Outside(f"{alias}.{rest}" if rest else alias)
        return Outside(dotted, "is defined nowhere in the tree")

    def _search(
        self, module: ModuleText, name: str, rest: Sequence[str], visited: set[tuple[Path, str]]
    ) -> Iterator[Meaning]:
        """Yield what a name in a file may stand for, nothing where the file does not bind it."""
        if (module.path, name) in visited:
            return
        visited.add((module.path, name))
        meanings = [*self._search_definitions(module, name, rest)]
        for target in module.imports.get(name, ()):
            meanings += self._follow(module.path, target, rest, visited)
        if not meanings and name != "*":
            for target in module.imports.get("*", ()):
                found = self._follow(module.path, target, (name, *rest), visited)
                meanings += (one for one in found if not (isinstance(one, Outside) and one.reason.startswith(_LACKS)))
        yield from meanings

    def _search_definitions(self, module: ModuleText, name: str, rest: Sequence[str]) -> Iterator[Meaning]:
        classes, assigned = module.classes.get(name, ()), module.find_assignments(name)
        if not rest:
            yield from classes
            yield from (Assigned(module.top_level, offset) for offset in assigned)
        computed = [*(one.start for one in classes), *assigned] if rest else module.find_functions(name)
        for offset in computed:
            yield Outside(".".join((name, *rest)), f"is made by code in {module.top_level.format_line(offset)}")

    def _follow(
        self, path: Path, target: ImportedName, rest: Sequence[str], visited: set[tuple[Path, str]]
    ) -> Iterator[Meaning]:
        """Yield what an imported name may stand for."""
        parts = (*target.parts, *rest)
        if target.level == 0 or target.level >= FRAMEWORK_LEVEL:
            dotted = ".".join(("transformers", *parts) if target.level else parts)
            if is_framework_name(dotted) or parts[:1] == ("torch",):
                yield Outside(dotted)
                return
        dotted = "." * target.level + ".".join(parts)
        found = self._find_module(path, target.level, parts)
        if found is None:
            module_name = dotted.rpartition(".")[0] or dotted
            yield Outside(dotted, f"comes from `{module_name}`, which is not in the tree")
            return
        module, below = found
        if not below:
            yield Outside(dotted, "is a module")
            return
        is_circle = (module.path, below[0]) in visited
        meanings = list(self._search(module, below[0], below[1:], visited))
        yield from meanings
        if not meanings and not is_circle:
            yield Outside(dotted, f"{_LACKS} {module.path.name}")

    def _find_module(self, path: Path, level: int, parts: Sequence[str]) -> tuple[ModuleText, Sequence[str]] | None:
        """Return the file of the tree that an import leads to, and the names below it; None if it leaves the tree."""
        folders = path.parents[level - 1 : level] if level else path.parents
        for size in range(len(parts), -1 if level else 0, -1):
            for folder in folders:
                if module := self._load_module(folder.joinpath(*parts[:size])):
                    return module, parts[size:]
        return None

    def _load_module(self, stem: Path) -> ModuleText | None:
        """Return a module's file, or its package's; None if the tree has neither."""
        if not stem.name:
            return None
        return self._load(stem.with_name(f"{stem.name}.py")) or self._load(stem / "__init__.py")

    def _load(self, path: Path) -> ModuleText | None:
        if path in self.files:
            return self.files[path]
        if path not in self._followed:
            state = stat_file(path)
            self._followed[path] = state, ModuleText(path, read_lines(path)) if any(state) else None
        return self._followed[path][1]


def load_modeling(folder: Path, plan_file: Path | None = None) -> ModelingSource:
    """Return the modeling source of a model; it is read again only when files or their states have changed.

    Args:
        folder: the model's folder.
        plan_file: the file with the model's plan, which may define its modules too.

    Raises:
        SourceError: a file cannot be read.
    """
    paths = find_modeling_files(folder, plan_file) or tuple(sorted(find_parent_files(folder)))
    states = tuple(map(stat_file, paths))
    source = _load_state(paths, states)
    if not source.is_current():
        _load_state.cache_clear()
        source = _load_state(paths, states)
    return source


@lru_cache(maxsize=1024)
def _load_state(paths: tuple[Path, ...], _states: tuple[FileState, ...]) -> ModelingSource:
    return ModelingSource({path: ModuleText(path, read_lines(path)) for path in paths})


def _is_class_of_framework(dotted: str) -> bool:
    return dotted.startswith("torch.nn.") or is_framework_name(dotted, "bases")
