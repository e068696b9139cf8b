"""Ownership: which file a person edits to change a plan, and which files are written from it.

Every plan literal is hand-written, owned by a modular file, inherited (a modular file's class does not name it) or a
copy in a generated file. A copy's owner is found by following the modular file's class, then its bases, from file to
file: a base imported from another model's configuration file leads on through that file's own modular file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from codemods.files.sources import SourceFile, read_source
from codemods.inheritance.imports import (
    find_local_class,
    find_module_file,
    is_from_package,
    resolve_alias,
    resolve_imported_name,
)
from codemods.inheritance.subclasses import index_importers, index_subclasses
from codemods.reading.module import ClassPlans, Module, Opaque, PlanLiteral
from codemods.reading.parse import read_module
from codemods.reading.skim import skim

__all__ = ["MissingOwner", "PlanLocation", "Tree"]


@dataclass(frozen=True)
class PlanLocation:
    """Where plan entries are written down.

    Args:
        path: the file.
        class_name: the class, empty outside of classes.
        attribute: the plan they go into.
        code: which of the class's literals in code it is, None for what the class body assigns.
    """

    path: Path
    class_name: str
    attribute: str
    code: int | None = None


@dataclass(frozen=True)
class MissingOwner:
    """An owner that could not be found.

    Args:
        code: the finding's.
        reason: in words.
        lacks_modular: whether there is no modular file any more; else the plan may be a copy of an owner that will change.
    """

    code: str
    reason: str
    lacks_modular: bool = False


@dataclass
class Tree:
    """Reads each file at most once and answers who owns a plan.

    Args:
        skims: whether plain plans may be read without a parser, which says nothing of the rest of their file.
    """

    skims: bool = False
    _sources: dict[Path, SourceFile] = field(default_factory=dict)
    _modules: dict[Path, Module] = field(default_factory=dict)

    def source(self, path: Path) -> SourceFile:
        """Return a file, read once.

        Raises:
            SourceError: it cannot be read.
        """
        if path not in self._sources:
            self._sources[path] = read_source(path)
        return self._sources[path]

    def add(self, source: SourceFile) -> None:
        """Take a file that was read already."""
        self._sources[source.path] = source

    def module(self, path: Path) -> Module:
        """Return what a file says of plans, parsed once.

        Raises:
            SourceError: it cannot be read, or does not parse.
        """
        if path not in self._modules:
            source = self.source(path)
            skimmed = skim(source) if self.skims else None
            self._modules[path] = skimmed or read_module(source)
        return self._modules[path]

    @property
    def modules(self) -> Mapping[Path, Module]:
        """What the files that were looked into say of plans."""
        return self._modules

    @cached_property
    def modular_subclasses(self) -> Mapping[str, Sequence[tuple[Path, str]]]:
        """The classes of the modular files that were taken, by the names that may give them plans."""
        return index_subclasses(self._iterate_sources("modular_"), self._modules)

    @cached_property
    def configuration_subclasses(self) -> Mapping[str, Sequence[tuple[Path, str]]]:
        """The classes of the configuration files that were taken, by the names that may give them plans."""
        return index_subclasses(self._iterate_sources("configuration_"), self._modules)

    @cached_property
    def importers(self) -> Mapping[str, Sequence[Path]]:
        """The configuration files that mention plans, by the model folders they import from."""
        return index_importers(self._iterate_sources("configuration_"))

    def _iterate_sources(self, prefix: str) -> Iterator[SourceFile]:
        return (source for source in self._sources.values() if source.path.name.startswith(prefix))

    def parse(self, path: Path) -> Module:
        """Return what a parser makes of a file, which leaves nothing of it unread.

        Raises:
            SourceError: it does not parse.
        """
        return read_module(self.source(path))

    def plan(self, location: PlanLocation) -> PlanLiteral | Opaque:
        """Return what is written down at a place; a class that writes nothing there counts as opaque."""
        found = self.get_class(location)
        if location.code is not None:
            return found.code_literals[location.code]
        return found.plans.get(location.attribute) or Opaque(
            location.class_name, location.attribute, self._find_class_line(location)
        )

    def literal(self, location: PlanLocation) -> PlanLiteral:
        """Return the entries written down at a place that was found to have some."""
        plan = self.plan(location)
        assert isinstance(plan, PlanLiteral)
        return plan

    def get_class(self, location: PlanLocation) -> ClassPlans:
        """Return the class of a place, which its file has."""
        return self.module(location.path).classes[location.class_name]

    def find_owner(self, location: PlanLocation) -> PlanLocation | MissingOwner:
        """Return the place a person edits to change the plan at `location`."""
        return self._search_owner(location, self.plan(location), frozenset())

    def find_origin(self, location: PlanLocation) -> PlanLocation | MissingOwner:
        """Return the place that gives a class a plan which the class may not write itself."""
        assert location.code is None
        return self._search_owner(location, None, frozenset())

    def has_plan(self, location: PlanLocation) -> bool:
        """Say whether a class has a plan as Python looks it up, wherever its file comes from."""
        holder = self.find_definition(location)
        return holder is not None and isinstance(self.plan(holder), PlanLiteral)

    def find_definition(self, location: PlanLocation) -> PlanLocation | None:
        """Return where the plan of a class stands as Python looks it up, None where no class has it."""
        lineage = self.mro(location)
        return next((one for one in lineage if one.attribute in self.get_class(one).plans), None)

    def mro(self, location: PlanLocation, seen: frozenset[PlanLocation] = frozenset()) -> Iterator[PlanLocation]:
        """Yield a class and its bases among the models, nearest first, each as a place of the same plan."""
        if location in seen:
            return
        seen |= {location}
        if location.class_name not in self.module(location.path).classes:
            elsewhere = self._resolve_import(location, location.class_name)
            yield from self.mro(elsewhere, seen) if elsewhere else ()
            return
        yield location
        for base in self.get_class(location).bases:
            if parent := self.resolve_name(location, base):
                yield from self.mro(parent, seen)

    def _find_class_line(self, location: PlanLocation) -> int:
        """Return the line of a class, 1 where its header is written in an unusual way."""
        name = location.class_name.rpartition(".")[2].encode()
        header = re.search(rb"^[ \t]*class[ \t]+" + name + rb"\b", self.source(location.path).body, re.MULTILINE)
        return bisect_right(self.source(location.path).line_offsets, header.start()) if header else 1

    def _search_owner(
        self, location: PlanLocation, wanted: PlanLiteral | Opaque | None, seen: frozenset[PlanLocation]
    ) -> PlanLocation | MissingOwner:
        if location in seen:
            return MissingOwner("MIG303", f"{location.class_name} inherits its {location.attribute} from itself")
        seen |= {location}
        generated_from = self.source(location.path).generated_from
        if generated_from is not None:
            modular = location.path.parent / generated_from
            if not modular.is_file():
                return MissingOwner("MIG302", f"{generated_from} does not exist", lacks_modular=True)
            return self._search_owner(replace(location, path=modular), wanted, seen)
        found = self.module(location.path).classes.get(location.class_name)
        if found is None:
            elsewhere = self._resolve_import(location, location.class_name)
            if elsewhere is not None:
                return self._search_owner(elsewhere, wanted, seen)
            return MissingOwner("MIG302", f"{location.path.name} has no class {location.class_name}")
        return self._find_in_class(location, found, wanted) or self._find_in_bases(location, found, wanted, seen)

    def _find_in_class(
        self, location: PlanLocation, owner: ClassPlans, wanted: PlanLiteral | Opaque | None
    ) -> PlanLocation | None:
        """Return where a class writes a plan itself: the attribute, or in code a literal with the same entries."""
        if location.code is None:
            return location if location.attribute in owner.plans else None
        assert isinstance(wanted, PlanLiteral)
        for index, literal in enumerate(owner.code_literals):
            if literal.equals(wanted):
                return replace(location, code=index)
        return None

    def _find_in_bases(
        self,
        location: PlanLocation,
        owner: ClassPlans,
        wanted: PlanLiteral | Opaque | None,
        seen: frozenset[PlanLocation],
    ) -> PlanLocation | MissingOwner:
        lost: MissingOwner | None = None
        for base in owner.bases:
            parent = self.resolve_name(location, base)
            if parent is None:
                continue
            result = self._search_owner(parent, wanted, seen)
            if isinstance(result, PlanLocation) or result.code == "MIG303":
                return result
            lost = lost or result
        return lost or MissingOwner(
            "MIG302", f"no base of {location.class_name} in {location.path.name} assigns {location.attribute}"
        )

    def resolve_name(self, location: PlanLocation, name: str) -> PlanLocation | None:
        """Return what a name in a class stands for, a base for instance, None for anything outside the models."""
        local = find_local_class(self.module(location.path), location.class_name, name)
        if local:
            return replace(location, class_name=local)
        other = resolve_alias(self.source(location.path), name)
        return self.resolve_name(location, other) if other else self._resolve_import(location, name)

    def _resolve_import(self, location: PlanLocation, name: str) -> PlanLocation | None:
        """Return where an import brings a class from, None for anything outside the models."""
        for meant in resolve_imported_name(self.module(location.path), name):
            path = find_module_file(location.path, meant.level, meant.module)
            if path is not None:
                return replace(location, path=path, class_name=meant.class_name)
            if is_from_package(meant):
                return self._resolve_re_export(location, meant.class_name)
        return None

    def _resolve_re_export(self, location: PlanLocation, name: str) -> PlanLocation | None:
        """Return the one configuration class of a name; the package above the models re-exports them all."""
        found = [path for path, heir in self.configuration_subclasses.get(name, ()) if heir == name]
        return replace(location, path=found[0], class_name=name) if len(found) == 1 else None
