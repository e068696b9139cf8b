"""Conflicts across files: the code of one file changes or copies the plan of a class in another one.

A class's own file is read together with its plan. Here are all other files of the tree: code that names the class,
code of its bases and subclasses, and code beside it that changes the plan of an object whose class is unknown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

from codemods.inheritance.class_graph import ClassKey
from codemods.inheritance.file_graph import list_module_files
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.inheritance.style_callers import StyleCall, find_style_calls
from codemods.models.framework import FRAMEWORK_FILES, define_base_classes
from codemods.reading.conflicts import find_change_conflicts
from codemods.reading.module import ClassPlans, Conflict
from codemods.reading.scope import ANY_CLASS
from plans.errors import MigratorError
from plans.plan import plan_kind

__all__ = ["OutsideConflict", "find_outside_conflicts", "is_framework_file"]

_MODELS = "models"

OutsideConflict = tuple[Path, Conflict]
"""A conflict with the file of the statement that causes it."""


def find_outside_conflicts(tree: Tree, locations: Iterable[PlanLocation]) -> Sequence[OutsideConflict]:
    """Return the conflicts of an owner's plan and its copies that other files cause.

    Args:
        tree: the files; they must all have been surveyed.
        locations: where the plan is written.

    Raises:
        SourceError: a file that a class inherits from cannot be read or parsed.
    """
    if tree not in _INDEXES:
        _INDEXES[tree] = _Index(tree)
    return list(dict.fromkeys(found for location in locations for found in _INDEXES[tree].find(location)))


@dataclass(frozen=True)
class _Index:
    """The conflicts of a tree's plans that other files cause.

    Args:
        tree: the files.
    """

    tree: Tree

    def find(self, location: PlanLocation) -> Iterator[OutsideConflict]:
        """Yield the conflicts of a plan, and those of its copies in other files."""
        seen = [location]
        for plan in seen:
            found = list(self._find_conflicts(plan))
            if plan is not location:
                found += [(plan.path, conflict) for conflict in self.tree.get_class(plan).conflicts]
            for path, conflict in found:
                if fnmatchcase(plan.attribute, conflict.attribute):
                    yield path, replace(conflict, attribute=location.attribute)
            seen += [copy for copy in self._copies.get((plan.path, plan.class_name), ()) if copy not in seen]

    @cached_property
    def _copies(self) -> Mapping[ClassKey, Sequence[PlanLocation]]:
        """The plans of classes into which other files' plans are copied, by the class of the copied plan."""
        copies: dict[ClassKey, list[PlanLocation]] = defaultdict(list)
        for path in self._code_files:
            module = self.tree.module(path)
            for copy in module.copies:
                if copy.source_class not in module.classes and copy.class_name in module.classes:
                    for key in self._resolve(path, copy.source_class):
                        copies[key].append(PlanLocation(path, copy.class_name, copy.attribute))
        return copies

    def _find_conflicts(self, location: PlanLocation) -> Iterator[OutsideConflict]:
        if not self._code_files:
            return
        name = location.class_name.rpartition(".")[2]
        found = [*self._by_class.get((location.path, location.class_name), ()), *self._by_name.get(name, ())]
        found += self._by_class.get((location.path, ANY_CLASS), ())
        imports = self._list_imported_files(location.path) if self._of_any_class else frozenset()
        found += [
            (path, conflict)
            for path, conflict, imported in self._of_any_class
            if path.parent == location.path.parent
            or name in imported
            or path in imports
            or (conflict.reading and conflict.reading.reaches_tree)
        ]
        found += self._find_inherited(location)
        found = [(path, conflict) for path, conflict in found if path != location.path]
        yield from dict.fromkeys([*found, *self._find_of_target(location), *self._find_style_calls(location)])

    def _find_style_calls(self, location: PlanLocation) -> Iterator[OutsideConflict]:
        """Yield the code that gets the plan's styles from a function of another file, and tells them apart."""
        for call in self._style_calls:
            conflict, source = call.conflict, call.source
            is_unknown = conflict.class_name == ANY_CLASS
            if is_unknown or self._is_inherited(location, source, conflict.class_name):
                yield call.path, conflict
            if not conflict.attribute.startswith("base_model_") and (
                is_unknown or location.path.parent == source.parent
            ):
                # A model's plan has the styles of its configuration's plan.
                yield call.path, replace(conflict, attribute=f"*{plan_kind(conflict.attribute)}_plan")

    def _is_inherited(self, location: PlanLocation, path: Path, name: str) -> bool:
        """Return whether a plan's class is one that another file names, inherits from it, or gives it the plan."""
        keys = [(path, name)] if name in (*self.tree.module(path).classes, "") else self._resolve(path, name)
        own = (location.path, location.class_name)
        related = [own, *((file, base.name) for file, base in self._list_ancestors(*own))]
        return any(
            key in related or own in ((file, base.name) for file, base in self._list_ancestors(*key)) for key in keys
        )

    @cached_property
    def _style_calls(self) -> Sequence[StyleCall]:
        others = [path for path in self.tree.other_files if not is_framework_file(path)]
        return find_style_calls(self.tree, self._code_files, others)

    def _find_of_target(self, location: PlanLocation) -> Iterator[OutsideConflict]:
        """Yield the conflicts of the other class's plan that a literal in code replaces."""
        literal, module = self.tree.plan(location), self.tree.module(location.path)
        if literal.class_name in module.classes or not literal.class_name:
            return
        yield from ((location.path, one) for one in module.outward_conflicts if one.class_name == literal.class_name)
        for path, name in self._resolve(location.path, literal.class_name):
            yield from self._by_class.get((path, name), ())
            target = self.tree.module(path).classes.get(name)
            yield from ((path, conflict) for conflict in (target.conflicts if target else ()))

    def _list_imported_files(self, path: Path) -> frozenset[Path]:
        """Return the files that a file may import from, whether they exist or not."""
        return frozenset(
            file
            for statement in self.tree.module(path).imports.values()
            for module in (statement.module, f"{statement.module}.{statement.name}".strip("."))
            for file in list_module_files(path, statement.level, module)
        )

    @cached_property
    def _code_files(self) -> Sequence[Path]:
        return [path for path in dict.fromkeys(self.tree.code_files) if not is_framework_file(path)]

    @cached_property
    def _changing_classes(self) -> Mapping[ClassKey, ClassPlans]:
        """The classes whose own code changes plans."""
        return {
            (path, owner.name): owner
            for path in self._code_files
            for owner in self.tree.module(path).classes.values()
            if owner.name and (owner.code_literals or owner.removals or any(one.function for one in owner.conflicts))
        }

    @cached_property
    def _by_class(self) -> Mapping[ClassKey, Sequence[OutsideConflict]]:
        conflicts: dict[ClassKey, list[OutsideConflict]] = defaultdict(list)
        for path, conflict, _ in self._named:
            for key in self._resolve(path, conflict.class_name):
                conflicts[key].append((path, conflict))
        for (path, name), owner in self._changing_classes.items():
            for file, base in self._list_ancestors(path, name):
                if file != path:
                    for cause, conflict in _find_code_conflicts((path, owner), (file, base), owner.plans):
                        conflicts[(file if cause == path else path), conflict.class_name].append((cause, conflict))
        return conflicts

    @cached_property
    def _by_name(self) -> Mapping[str, Sequence[OutsideConflict]]:
        """The conflicts of classes that no import leads to, by the name of the class."""
        conflicts: dict[str, list[OutsideConflict]] = defaultdict(list)
        for path, conflict, _ in self._named:
            if not self._resolve(path, conflict.class_name):
                conflicts[conflict.class_name.rpartition(".")[2]].append((path, conflict))
        return conflicts

    @cached_property
    def _of_any_class(self) -> Sequence[tuple[Path, Conflict, frozenset[str]]]:
        return [found for found in self._outward if found[1].class_name == ANY_CLASS]

    @cached_property
    def _named(self) -> Sequence[tuple[Path, Conflict, frozenset[str]]]:
        return [found for found in self._outward if found[1].class_name != ANY_CLASS]

    @cached_property
    def _outward(self) -> Sequence[tuple[Path, Conflict, frozenset[str]]]:
        """The conflicts about classes of other files, each with its file and the names that the file imports."""
        found: list[tuple[Path, Conflict, frozenset[str]]] = []
        for path in self._code_files:
            module = self.tree.module(path)
            if module.outward_conflicts:
                imported = frozenset(statement.name for statement in module.imports.values())
                found += [(path, conflict, imported) for conflict in module.outward_conflicts]
        return found

    def _resolve(self, path: Path, name: str) -> list[ClassKey]:
        """Return the classes of the tree that a dotted name in a file stands for.

        A constant, from which any class of its file may take entries, stands for all classes of the file.
        """
        try:
            keys = list(self.tree.resolve(path, "", name))
            classes = [self.tree.module(file).classes for file, _ in keys]
            is_constant = not name.rpartition(".")[2][:1].isupper() or name.rpartition(".")[2].isupper()
            return [
                (file, key if key in known else ANY_CLASS)
                for (file, key), known in zip(keys, classes, strict=True)
                if key in known or is_constant
            ]
        except MigratorError:
            return []

    def _list_ancestors(self, path: Path, name: str) -> list[tuple[Path, ClassPlans]]:
        try:
            return list(self.tree.mro(path, name)[1:])
        except MigratorError:
            return []

    def _find_inherited(self, location: PlanLocation) -> Iterator[OutsideConflict]:
        """Yield the conflicts with code that the class inherits from other files.

        Bases whose import leads nowhere are looked for by their names.
        """
        owner = self.tree.get_class(location)
        ancestors = self.tree.mro(location.path, location.class_name)
        keys = [(path, base.name) for path, base in ancestors]
        for path, ancestor in ancestors:
            for base in ancestor.bases:
                if not self._resolve(path, base):
                    keys += self._changing_by_name.get(base.rpartition(".")[2], ())
        for path, name in dict.fromkeys(keys):
            base_class = self._changing_classes.get((path, name))
            if base_class is not None and path != location.path:
                for cause, conflict in _find_code_conflicts((path, base_class), (location.path, owner), ()):
                    if conflict.class_name == owner.name:
                        yield cause, conflict

    @cached_property
    def _changing_by_name(self) -> Mapping[str, Sequence[ClassKey]]:
        by_name: dict[str, list[ClassKey]] = defaultdict(list)
        for path, name in self._changing_classes:
            by_name[name.rpartition(".")[2]].append((path, name))
        return by_name


def _find_code_conflicts(
    writer: tuple[Path, ClassPlans], target: tuple[Path, ClassPlans], replaced: Iterable[str]
) -> Iterator[OutsideConflict]:
    """Yield the conflicts between the code of a class and the plans of another one, each with the causing file.

    Args:
        writer: the class with the code.
        target: the class with the plans.
        replaced: the plans that the writer's class body replaces, so that its code does not change the target's.
    """
    path, owner = writer
    attributes = dict.fromkeys([*target[1].plans, *(literal.attribute for literal in target[1].code_literals)])
    for attribute in attributes:
        if attribute in replaced:
            continue
        for conflict in find_change_conflicts(owner, target[1], attribute):
            yield (path if conflict.class_name == target[1].name else target[0]), conflict
    for conflict in owner.conflicts:
        if conflict.function and conflict.attribute not in replaced:
            yield path, replace(conflict, class_name=target[1].name)


@cache
def _is_framework_folder(folder: Path) -> bool:
    if all((folder / name).is_file() for name in FRAMEWORK_FILES):
        return True
    files = sorted(folder.glob("*.py")) if (folder / _MODELS).is_dir() else ()
    return define_base_classes(path.read_bytes() for path in files if path.is_file())


def is_framework_file(path: Path) -> bool:
    """Return whether a file is part of the library around the models, whose use of plans is a dialect's affair."""
    return any(_is_framework_folder(folder) and path.relative_to(folder).parts[0] != _MODELS for folder in path.parents)


_INDEXES: WeakKeyDictionary[Tree, _Index] = WeakKeyDictionary()
