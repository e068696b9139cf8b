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

from codemods.files.sources import Source, read_source
from codemods.inheritance.heirs import heirs_by_name, importers_by_folder
from codemods.inheritance.imports import imported, local_class
from codemods.inheritance.model_files import alias, file_of, is_package
from codemods.reading.literals import read_module
from codemods.reading.module import ClassPlans, Module, Opaque, PlanLiteral
from codemods.reading.skim import skim

__all__ = ["Lost", "Place", "Tree"]


@dataclass(frozen=True)
class Place:
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
class Lost:
    """An owner that could not be found.

    Args:
        code: the finding's.
        reason: in words.
        orphan: whether there is no modular file any more; else the plan may be a copy of an owner that will change.
    """

    code: str
    reason: str
    orphan: bool = False


@dataclass
class Tree:
    """Reads each file at most once and answers who owns a plan.

    Args:
        skims: whether plain plans may be read without a parser, which says nothing of the rest of their file.
    """

    skims: bool = False
    _sources: dict[Path, Source] = field(default_factory=dict)
    _modules: dict[Path, Module] = field(default_factory=dict)

    def source(self, path: Path) -> Source:
        """Return a file, read once.

        Raises:
            SourceError: it cannot be read.
        """
        if path not in self._sources:
            self._sources[path] = read_source(path)
        return self._sources[path]

    def add(self, source: Source) -> None:
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
    def heirs(self) -> Mapping[str, Sequence[tuple[Path, str]]]:
        """The classes of the modular files that were taken, by the names that may give them plans."""
        return heirs_by_name(self._files("modular_"), self._modules)

    @cached_property
    def configurations(self) -> Mapping[str, Sequence[tuple[Path, str]]]:
        """The classes of the configuration files that were taken, by the names that may give them plans."""
        return heirs_by_name(self._files("configuration_"), self._modules)

    @cached_property
    def importers(self) -> Mapping[str, Sequence[Path]]:
        """The configuration files that mention plans, by the model folders they import from."""
        return importers_by_folder(self._files("configuration_"))

    def _files(self, prefix: str) -> Iterator[Source]:
        return (source for source in self._sources.values() if source.path.name.startswith(prefix))

    def parse(self, path: Path) -> Module:
        """Return what a parser makes of a file, which leaves nothing of it unread.

        Raises:
            SourceError: it does not parse.
        """
        return read_module(self.source(path))

    def plan(self, place: Place) -> PlanLiteral | Opaque:
        """Return what is written down at a place; a class that writes nothing there counts as opaque."""
        found = self.class_of(place)
        if place.code is not None:
            return found.code[place.code]
        return found.plans.get(place.attribute) or Opaque(place.class_name, place.attribute, self._line(place))

    def literal(self, place: Place) -> PlanLiteral:
        """Return the entries written down at a place that was found to have some."""
        plan = self.plan(place)
        assert isinstance(plan, PlanLiteral)
        return plan

    def class_of(self, place: Place) -> ClassPlans:
        """Return the class of a place, which its file has."""
        return self.module(place.path).classes[place.class_name]

    def owner(self, place: Place) -> Place | Lost:
        """Return the place a person edits to change the plan at `place`."""
        return self._find(place, self.plan(place), frozenset())

    def origin(self, place: Place) -> Place | Lost:
        """Return the place that gives a class a plan which the class may not write itself."""
        assert place.code is None
        return self._find(place, None, frozenset())

    def holds(self, place: Place) -> bool:
        """Say whether a class has a plan as Python looks it up, wherever its file comes from."""
        holder = self.holder(place)
        return holder is not None and isinstance(self.plan(holder), PlanLiteral)

    def holder(self, place: Place) -> Place | None:
        """Return where the plan of a class stands as Python looks it up, None where no class has it."""
        lineage = self.lineage(place)
        return next((one for one in lineage if one.attribute in self.class_of(one).plans), None)

    def lineage(self, place: Place, seen: frozenset[Place] = frozenset()) -> Iterator[Place]:
        """Yield a class and its bases among the models, nearest first, each as a place of the same plan."""
        if place in seen:
            return
        seen |= {place}
        if place.class_name not in self.module(place.path).classes:
            elsewhere = self._imported(place, place.class_name)
            yield from self.lineage(elsewhere, seen) if elsewhere else ()
            return
        yield place
        for base in self.class_of(place).bases:
            if parent := self.meant(place, base):
                yield from self.lineage(parent, seen)

    def _line(self, place: Place) -> int:
        """Return the line of a class, 1 where its header is written in an unusual way."""
        name = place.class_name.rpartition(".")[2].encode()
        header = re.search(rb"^[ \t]*class[ \t]+" + name + rb"\b", self.source(place.path).body, re.MULTILINE)
        return bisect_right(self.source(place.path).line_offsets, header.start()) if header else 1

    def _find(self, place: Place, wanted: PlanLiteral | Opaque | None, seen: frozenset[Place]) -> Place | Lost:
        if place in seen:
            return Lost("MIG303", f"{place.class_name} inherits its {place.attribute} from itself")
        seen |= {place}
        generated_from = self.source(place.path).generated_from
        if generated_from is not None:
            modular = place.path.parent / generated_from
            if not modular.is_file():
                return Lost("MIG302", f"{generated_from} does not exist", orphan=True)
            return self._find(replace(place, path=modular), wanted, seen)
        found = self.module(place.path).classes.get(place.class_name)
        if found is None:
            elsewhere = self._imported(place, place.class_name)
            if elsewhere is not None:
                return self._find(elsewhere, wanted, seen)
            return Lost("MIG302", f"{place.path.name} has no class {place.class_name}")
        return self._written_in(place, found, wanted) or self._find_in_bases(place, found, wanted, seen)

    def _written_in(self, place: Place, found: ClassPlans, wanted: PlanLiteral | Opaque | None) -> Place | None:
        """Return where a class writes a plan itself: the attribute, or in code a literal with the same entries."""
        if place.code is None:
            return place if place.attribute in found.plans else None
        assert isinstance(wanted, PlanLiteral)
        for index, literal in enumerate(found.code):
            if literal.says_the_same_as(wanted):
                return replace(place, code=index)
        return None

    def _find_in_bases(
        self, place: Place, found: ClassPlans, wanted: PlanLiteral | Opaque | None, seen: frozenset[Place]
    ) -> Place | Lost:
        lost: Lost | None = None
        for base in found.bases:
            parent = self.meant(place, base)
            if parent is None:
                continue
            result = self._find(parent, wanted, seen)
            if isinstance(result, Place) or result.code == "MIG303":
                return result
            lost = lost or result
        return lost or Lost("MIG302", f"no base of {place.class_name} in {place.path.name} assigns {place.attribute}")

    def meant(self, place: Place, name: str) -> Place | None:
        """Return what a name in a class stands for, a base for instance, None for anything outside the models."""
        local = local_class(self.module(place.path), place.class_name, name)
        if local:
            return replace(place, class_name=local)
        other = alias(self.source(place.path), name)
        return self.meant(place, other) if other else self._imported(place, name)

    def _imported(self, place: Place, name: str) -> Place | None:
        """Return where an import brings a class from, None for anything outside the models."""
        for meant in imported(self.module(place.path), name):
            path = file_of(place.path, meant.level, meant.module)
            if path is not None:
                return replace(place, path=path, class_name=meant.class_name)
            if is_package(meant):
                return self._re_exported(place, meant.class_name)
        return None

    def _re_exported(self, place: Place, name: str) -> Place | None:
        """Return the one configuration class of a name; the package above the models re-exports them all."""
        found = [path for path, heir in self.configurations.get(name, ()) if heir == name]
        return replace(place, path=found[0], class_name=name) if len(found) == 1 else None
