"""Ownership: which file a person edits to change a plan, and which files are written from it.

Every plan literal is hand-written, owned by a modular file, inherited (a modular file's class does not name it) or a
copy in a generated file. A copy's owner is found by following the modular file's class, then its bases, from file to
file: a base imported from another model's configuration file leads on through that file's own modular file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from codemods.literals import read_module
from codemods.module import ClassPlans, Module, Opaque, PlanLiteral
from codemods.skim import skim
from codemods.sources import Source, read_source

__all__ = ["Lost", "Place", "Tree"]


_MODELS = "models"
"""The package of all models, `transformers.models`: absolute imports from below it stay in the tree."""


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
    """An owner that could not be found, with the reason in words and the finding's code."""

    code: str
    reason: str


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
        """Return a file, read once."""
        if path not in self._sources:
            self._sources[path] = read_source(path)
        return self._sources[path]

    def add(self, source: Source) -> None:
        """Take a file that was read already."""
        self._sources[source.path] = source

    def module(self, path: Path) -> Module:
        """Return what a file says of plans, parsed once."""
        if path not in self._modules:
            source = self.source(path)
            skimmed = skim(source) if self.skims else None
            self._modules[path] = skimmed or read_module(source)
        return self._modules[path]

    def plan(self, place: Place) -> PlanLiteral | Opaque:
        """Return what is written down at a place that exists."""
        found = self.module(place.path).classes[place.class_name]
        return found.plans[place.attribute] if place.code is None else found.code[place.code]

    def owner(self, place: Place) -> Place | Lost:
        """Return the place a person edits to change the plan at `place`."""
        return self._find(place, self.plan(place), frozenset())

    def _find(self, place: Place, wanted: PlanLiteral | Opaque, seen: frozenset[Place]) -> Place | Lost:
        if place in seen:
            return Lost("MIG303", f"{place.class_name} inherits its {place.attribute} from itself")
        seen |= {place}
        generated_from = self.source(place.path).generated_from
        if generated_from is not None:
            modular = place.path.parent / generated_from
            if not modular.is_file():
                return Lost("MIG302", f"{generated_from} does not exist")
            return self._find(replace(place, path=modular), wanted, seen)
        found = self.module(place.path).classes.get(place.class_name)
        if found is None:
            return Lost("MIG302", f"{place.path.name} has no class {place.class_name}")
        return self._written_in(place, found, wanted) or self._find_in_bases(place, found, wanted, seen)

    def _written_in(self, place: Place, found: ClassPlans, wanted: PlanLiteral | Opaque) -> Place | None:
        """Return where a class writes a plan itself: the attribute, or in code a literal with the same entries."""
        if place.code is None:
            return place if place.attribute in found.plans else None
        assert isinstance(wanted, PlanLiteral)
        for index, literal in enumerate(found.code):
            if literal.says_the_same_as(wanted):
                return replace(place, code=index)
        return None

    def _find_in_bases(
        self, place: Place, found: ClassPlans, wanted: PlanLiteral | Opaque, seen: frozenset[Place]
    ) -> Place | Lost:
        lost: Lost | None = None
        for base in found.bases:
            path = place.path if base in self.module(place.path).classes else self._imported_from(place.path, base)
            if path is None:
                continue
            result = self._find(replace(place, path=path, class_name=base.rpartition(".")[2]), wanted, seen)
            if isinstance(result, Place) or result.code == "MIG303":
                return result
            lost = lost or result
        return lost or Lost("MIG302", f"no base of {place.class_name} in {place.path.name} assigns {place.attribute}")

    def _imported_from(self, path: Path, name: str) -> Path | None:
        """Return the file that an import brings a class from, None for anything outside the models."""
        level, module = self.module(path).imports.get(name, (0, ""))
        parts = module.split(".")
        if level:
            return _module_file(path.parents[level - 1].joinpath(*parts))
        if _MODELS in parts:
            return _module_file(path.parents[1].joinpath(*parts[parts.index(_MODELS) + 1 :]))
        return None


def _module_file(module: Path) -> Path | None:
    """Return the file of a module, or the configuration file of a model package that re-exports it."""
    candidates = (module.with_suffix(".py"), module / f"configuration_{module.name}.py")
    return next((path for path in candidates if path.is_file()), None)
