"""Ownership: which file a person edits to change a plan, and which files are written from it.

Every plan literal is hand-written, owned by a modular file, inherited (the modular file's class does not name it) or a
copy in a generated file. The owner of a copy is found by following the modular file's class, then its bases, from file
to file: a base imported from another model's configuration file leads on through that file's own modular file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from codemods.files.sources import SourceFile, read_source
from codemods.inheritance.class_graph import ClassGraph, ClassKey, index_importers, index_subclasses, resolve_import
from codemods.reading.module import ClassPlans, Module, Opaque, PlanLiteral
from codemods.reading.parse import read_module
from codemods.reading.skim import skim

__all__ = ["MissingOwner", "PlanLocation", "Tree"]

_MODELS = "models"
"""The package of all models, `transformers.models`: absolute imports from below it stay in the tree."""

_UP_TO_MODELS = 2
"""The dots of an import that lead from a model's file to the folder of all models."""


@dataclass(frozen=True)
class PlanLocation:
    """Where plan entries are written.

    Args:
        path: the file.
        class_name: the qualified name of the class, empty outside of classes.
        attribute: the plan that the entries belong to.
        code: the index among the class's literals in code, None for what the class body assigns.
    """

    path: Path
    class_name: str
    attribute: str
    code: int | None = None


@dataclass(frozen=True)
class MissingOwner:
    """An owner that cannot be found.

    Args:
        code: the finding's code.
        reason: why, in words.
        lacks_modular: whether the modular file is gone; otherwise the plan may be a copy of an owner that will change.
    """

    code: str
    reason: str
    lacks_modular: bool = False


@dataclass(eq=False)
class Tree(ClassGraph):
    """The files of a source tree, each read at most once, and who owns their plans.

    Args:
        skims: whether plain plans may be read without a parser, which leaves the rest of their file unchecked.
        code_files: the files whose code may do more with plans than assign those that are written out.
        other_files: the files that contain no plan's name, but may get styles from functions of others.
    """

    skims: bool = False
    code_files: list[Path] = field(default_factory=list)
    other_files: list[Path] = field(default_factory=list)
    _sources: dict[Path, SourceFile] = field(default_factory=dict)
    _modules: dict[Path, Module] = field(default_factory=dict)
    _origins: dict[PlanLocation, PlanLocation | MissingOwner] = field(default_factory=dict)
    _definitions: dict[PlanLocation, PlanLocation | None] = field(default_factory=dict)

    def source(self, path: Path) -> SourceFile:
        """Return a file, read once.

        Raises:
            SourceError: the file cannot be read.
        """
        if path not in self._sources:
            self._sources[path] = read_source(path)
        return self._sources[path]

    def add(self, source: SourceFile) -> None:
        """Add a file that has already been read."""
        self._sources[source.path] = source

    def module(self, path: Path) -> Module:
        """Return what a file says about plans, read once.

        Raises:
            SourceError: the file cannot be read or parsed.
        """
        if path not in self._modules:
            source = self.source(path)
            skimmed = skim(source) if self.skims else None
            self._modules[path] = skimmed or read_module(source)
        return self._modules[path]

    @property
    def modules(self) -> Mapping[Path, Module]:
        """What the files read so far say about plans."""
        return self._modules

    @cached_property
    def modular_subclasses(self) -> Mapping[str, Sequence[ClassKey]]:
        """The classes of the added modular files, by the names of the classes that may give them plans."""
        return index_subclasses(self._iter_sources("modular_"))

    @cached_property
    def configuration_subclasses(self) -> Mapping[str, Sequence[ClassKey]]:
        """The classes of the added configuration files, by the names of the classes that may give them plans."""
        return index_subclasses(self._iter_sources("configuration_"))

    @cached_property
    def importers(self) -> Mapping[str, Sequence[Path]]:
        """The added configuration files that mention plans, by the model folders they import from."""
        return index_importers(self._iter_sources("configuration_"))

    def _iter_sources(self, prefix: str) -> Iterator[SourceFile]:
        return (source for source in self._sources.values() if source.path.name.startswith(prefix))

    def parse(self, path: Path) -> Module:
        """Return what a parser, which checks the whole file, reads about plans.

        Raises:
            SourceError: the file cannot be read or parsed.
        """
        return read_module(self.source(path))

    def plan(self, location: PlanLocation) -> PlanLiteral | Opaque:
        """Return what is written at a location; a class that writes nothing there counts as opaque."""
        owner = self.get_class(location)
        if location.code is not None:
            return owner.code_literals[location.code]
        return owner.plans.get(location.attribute) or Opaque(
            location.class_name, location.attribute, self._find_class_line(location)
        )

    def literal(self, location: PlanLocation) -> PlanLiteral:
        """Return the entries at a location that is known to hold some."""
        plan = self.plan(location)
        assert isinstance(plan, PlanLiteral)
        return plan

    def get_class(self, location: PlanLocation) -> ClassPlans:
        """Return the class of a location; its file must have it."""
        return self.module(location.path).classes[location.class_name]

    def find_owner(self, location: PlanLocation) -> PlanLocation | MissingOwner:
        """Return the location that a person edits to change the plan at `location`."""
        return self._search_owner(location, self.plan(location), frozenset())

    def find_origin(self, location: PlanLocation) -> PlanLocation | MissingOwner:
        """Return the location that gives a class its plan, which the class need not write itself."""
        assert location.code is None
        return self._search_owner(location, None, frozenset())

    def has_plan(self, location: PlanLocation) -> bool:
        """Return whether a class has a plan when Python looks it up, whatever its file is generated from."""
        definition = self.find_definition(location)
        return definition is not None and isinstance(self.plan(definition), PlanLiteral)

    def find_definition(self, location: PlanLocation) -> PlanLocation | None:
        """Return where Python finds the plan of a class, None if no class has it."""
        way: dict[PlanLocation, None] = {}
        definition: PlanLocation | None = None
        one = replace(location, code=None)
        while one not in way:
            if one in self._definitions:
                definition = self._definitions[one]
                break
            way[one] = None
            owner = self.module(one.path).classes.get(one.class_name)
            if owner is not None and one.attribute in owner.plans:
                definition = one
                break
            bases = self.find_bases(one.path, one.class_name)
            if len(bases) > 1:
                definition = self._find_definition_in(one)
                break
            if bases:
                one = replace(one, path=bases[0][0][0], class_name=bases[0][0][1])
        self._definitions |= dict.fromkeys(way, definition)
        return definition and replace(definition, code=location.code)

    def _find_definition_in(self, location: PlanLocation) -> PlanLocation | None:
        for path, owner in self.mro(location.path, location.class_name):
            if location.attribute in owner.plans:
                return replace(location, path=path, class_name=owner.name)
        return None

    def follow_import(self, path: Path, name: str) -> Iterator[ClassKey]:
        """Yield the class that a file imports under a dotted name; none for anything outside of the models."""
        for target in resolve_import(self.module(path), name):
            file = _find_module_file(path, target.level, target.module)
            if file is not None:
                yield file, target.name
                return
            if _is_from_package(target.level, target.module) and (named := list(self._find_re_export(target.name))):
                yield from named
                return
            if not target.level and (file := self._find_absolute(path, tuple(target.module.split(".")))):
                yield file, target.name
                return

    def _find_absolute(self, path: Path, module: tuple[str, ...]) -> Path | None:
        """Return the file of a module that a file imports by its full name.

        It is looked for in the folders above the file, any of which may be on Python's path, then among the files of
        the tree, by the end of their paths.
        """
        for base in path.parents:
            if found := _find_existing_file(base.joinpath(*module)) or _find_package_file(base.joinpath(*module)):
                return found
        ending = (*module[:-1], f"{module[-1]}.py")
        files = [file for file in self._files_by_name.get(ending[-1], ()) if file.parts[-len(ending) :] == ending]
        return files[0] if len(files) == 1 and len(module) > 1 else None

    @cached_property
    def _files_by_name(self) -> Mapping[str, Sequence[Path]]:
        """The added files by their names."""
        files: dict[str, list[Path]] = defaultdict(list)
        for path in self._sources:
            files[path.name].append(path)
        return files

    def _find_re_export(self, name: str) -> Iterator[ClassKey]:
        """Yield the only configuration class of a name; the package above the models re-exports them all."""
        named = [key for key in self.configuration_subclasses.get(name, ()) if key[1] == name]
        if len(named) == 1:
            yield named[0]

    def _find_class_line(self, location: PlanLocation) -> int:
        """Return the line of a class, 1 if its header is written in an unusual way."""
        name = location.class_name.rpartition(".")[2].encode()
        header = re.search(rb"^[ \t]*class[ \t]+" + name + rb"\b", self.source(location.path).body, re.MULTILINE)
        return bisect_right(self.source(location.path).line_offsets, header.start()) if header else 1

    def _search_owner(
        self, location: PlanLocation, wanted: PlanLiteral | Opaque | None, seen: frozenset[PlanLocation]
    ) -> PlanLocation | MissingOwner:
        """Search a class, then its bases; unlike `mro`, a generated file leads to its modular file.

        As long as there is only one way to go, it is gone in a loop, and all classes on it get the same answer.
        """
        way: dict[PlanLocation, None] = {}
        while True:
            if location in way or location in seen:
                return MissingOwner("MIG303", f"{location.class_name} inherits its {location.attribute} from itself")
            if location in self._origins:
                result = self._origins[location]
                break
            way[location] = None
            following = self._search_class(location, wanted)
            if isinstance(following, (PlanLocation, MissingOwner)):
                result = following
                break
            if len(following) > 1:
                result = self._search_each(following, wanted, seen.union(way))
                break
            (location,) = following
        if location.code is None and not (isinstance(result, MissingOwner) and result.code == "MIG303"):
            self._origins |= dict.fromkeys(way, result)
        return result

    def _search_class(
        self, location: PlanLocation, wanted: PlanLiteral | Opaque | None
    ) -> PlanLocation | MissingOwner | list[PlanLocation]:
        """Return where a class has its plan from: itself, nowhere, or one of the classes to search next, in order."""
        generated_from = self.source(location.path).generated_from
        if generated_from is not None:
            modular = location.path.parent / generated_from
            if not modular.is_file():
                return MissingOwner("MIG302", f"{generated_from} does not exist", lacks_modular=True)
            return [replace(location, path=modular)]
        owner = self.module(location.path).classes.get(location.class_name)
        if owner is None:
            for path, name in self.follow_import(location.path, location.class_name):
                return [replace(location, path=path, class_name=name)]
            return MissingOwner("MIG302", f"{location.path.name} has no class {location.class_name}")
        bases = [
            replace(location, path=path, class_name=name)
            for base in owner.bases
            for path, name in self.resolve(location.path, location.class_name, base)
        ]
        reason = f"no base of {location.class_name} in {location.path.name} assigns {location.attribute}"
        return _find_in_class(location, owner, wanted) or bases or MissingOwner("MIG302", reason)

    def _search_each(
        self, bases: list[PlanLocation], wanted: PlanLiteral | Opaque | None, seen: frozenset[PlanLocation]
    ) -> PlanLocation | MissingOwner:
        missing: list[MissingOwner] = []
        for base in bases:
            result = self._search_owner(base, wanted, seen)
            if isinstance(result, PlanLocation) or result.code == "MIG303":
                return result
            missing.append(result)
        return missing[0]


def _find_in_class(
    location: PlanLocation, owner: ClassPlans, wanted: PlanLiteral | Opaque | None
) -> PlanLocation | None:
    """Return where a class writes a plan itself: its attribute, or a literal in code with the same entries."""
    if location.code is None:
        return location if location.attribute in owner.plans else None
    assert isinstance(wanted, PlanLiteral)
    for index, literal in enumerate(owner.code_literals):
        if literal.equals(wanted):
            return replace(location, code=index)
    return None


def _is_from_package(level: int, module: str) -> bool:
    """Return whether an import is from the package that holds all models: `from transformers import ToyConfig`."""
    return level > _UP_TO_MODELS and not module if level else "." not in module


def _find_module_file(path: Path, level: int, module: str) -> Path | None:
    """Return the file of a module that a model's file imports, None for one of the library around the models."""
    parts = tuple(module.split(".")) if module else ()
    if level:
        bases = path.parents[level - 1 : level]
        bases = [base for base in bases if level <= _UP_TO_MODELS or _MODELS in base.parts + parts]
        return next((_find_existing_file(base.joinpath(*parts)) for base in bases), None)
    if _MODELS in parts:
        return _find_existing_file(path.parents[1].joinpath(*parts[parts.index(_MODELS) + 1 :]))
    return None


def _find_package_file(package: Path) -> Path | None:
    """Return the file in which a package passes on the names of its modules, None if it is no package."""
    file = package / "__init__.py"
    return file if file.is_file() else None


def _find_existing_file(module: Path) -> Path | None:
    """Return the file of a module, or the configuration file of a model package, which re-exports it."""
    if not module.name:
        return None
    candidates = (module.with_suffix(".py"), module / f"configuration_{module.name}.py")
    return next((path for path in candidates if path.is_file()), None)
