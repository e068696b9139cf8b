"""The config classes of a tree that have plans: where each plan is written, and how to import the class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import SourceFile, add_error_once, find_sources, read_source
from codemods.inheritance.conflicts import is_framework_file
from codemods.inheritance.effective import EffectiveEntry, EffectivePlans, file_kind
from codemods.tree.selection import Selection
from plans.errors import MigratorError
from plans.plan import PLAN_KINDS

__all__ = ["ClassPlan", "PlanClass", "find_plan_classes"]

_CONFIG_PLAN = re.compile(rb"base_model_(?:%s)_plan" % "|".join(PLAN_KINDS).encode())
_KINDS: Mapping[str, str] = {f"base_model_{kind}_plan": kind for kind in PLAN_KINDS}
_STACKED_EXPERTS = re.compile(r"(?:.*[._])?(?<!shared_)experts(?:\..*)?")
_NO_MODELS = ("modular_", "test_", "conftest")


@dataclass(frozen=True)
class ClassPlan:
    """A plan of a class, its own or an inherited one.

    Args:
        path: the file that writes it.
        line: the line where it begins there, or its first entry if that cannot be told; counted from 1.
        entries: its entries by key.
    """

    path: Path
    line: int
    entries: Mapping[str, EffectiveEntry]

    def find_location(self, key: str) -> tuple[Path, int]:
        """Return the file and line of an entry, or of the plan if it has none of that key.

        Args:
            key: a key as the plan has it, or with the prefix that a model puts before it.
        """
        for own, entry in self.entries.items():
            if key == own or key.endswith(f".{own}"):
                return entry.path, entry.line
        return self.path, self.line


@dataclass(frozen=True)
class PlanClass:
    """A config class with plans.

    Args:
        path: its file.
        name: its name.
        root: the folder to import it from.
        module: the dotted name of its module there.
        model_type: its model type, empty if the class body does not assign one.
        plans: its plans by kind.
    """

    path: Path
    name: str
    root: Path
    module: str
    model_type: str
    plans: Mapping[str, ClassPlan]

    @property
    def has_experts(self) -> bool:
        """Whether a plan speaks of routed experts."""
        return any(_STACKED_EXPERTS.fullmatch(key) for plan in self.plans.values() for key in plan.entries)


def find_plan_classes(
    paths: Sequence[Path], selection: Selection | None = None, errors: list[MigratorError] | None = None
) -> list[PlanClass]:
    """Return the config classes among and below paths that have a plan, inherited ones included.

    Args:
        paths: files and folders.
        selection: which files may be reported on. With changed folders, a class is taken if a file changed beside it or
            beside a file that writes an entry of its plans.
        errors: a list to which the errors of files that cannot be read are added.

    Raises:
        UsageError: a path does not exist.
    """
    selection = selection or Selection()
    errors = errors if errors is not None else []
    plans = EffectivePlans(lambda path: read_source(path) if path.is_file() else None, is_framework_file)
    found: list[PlanClass] = []
    for path in find_sources(paths, errors):
        try:
            if selection.includes(path) and _can_have_plans(path):
                found += _read_classes(path, plans)
        except MigratorError as error:
            add_error_once(errors, error)
    return [one for one in found if selection.is_in_scope(_list_files(one))]


def _can_have_plans(path: Path) -> bool:
    if file_kind(path) is not None:
        return file_kind(path) == "configuration"
    if path.name.startswith(_NO_MODELS) or is_framework_file(path):
        return False
    return _CONFIG_PLAN.search(read_source(path).data) is not None


def _read_classes(path: Path, plans: EffectivePlans) -> Iterator[PlanClass]:
    by_class: dict[str, dict[str, ClassPlan]] = {}
    for variant, entries in plans.compute_file_plans(path).items():
        attribute, function, conditions = variant.branch
        if variant.class_name and attribute in _KINDS and entries and not function and not conditions:
            plan = _locate(path, variant.class_name, attribute, entries, plans)
            by_class.setdefault(variant.class_name, {})[_KINDS[attribute]] = plan
    if not by_class:
        return
    root, module = _find_import_root(path)
    model_types = _read_model_types(read_source(path))
    for name, of_class in by_class.items():
        yield PlanClass(path, name, root, module, model_types.get(name, ""), of_class)


def _locate(
    path: Path, class_name: str, attribute: str, entries: Mapping[str, EffectiveEntry], plans: EffectivePlans
) -> ClassPlan:
    module = plans.graph.module(path)
    own = module.classes[class_name].plans.get(attribute) if module and class_name in module.classes else None
    first = min(entries.values(), key=lambda entry: entry.line)
    return ClassPlan(path, own.line, entries) if own else ClassPlan(first.path, first.line, entries)


def _find_import_root(path: Path) -> tuple[Path, str]:
    """Return the folder from which a file can be imported, with all packages around it, and its module's name there."""
    folder, names = path.parent, [path.stem]
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        names.insert(0, folder.name)
        folder = folder.parent
    if len(names) == 1 and folder.name.isidentifier():
        # A model outside of packages imports its own files relatively, as remote code does; its folder is the package.
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _read_model_types(source: SourceFile) -> dict[str, str]:
    """Return the model types that class bodies assign, by class."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source.data)):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                match statement:
                    case (
                        ast.Assign(targets=[ast.Name(id="model_type")], value=ast.Constant(value=str(value)))
                        | ast.AnnAssign(target=ast.Name(id="model_type"), value=ast.Constant(value=str(value)))
                    ):
                        found[node.name] = value
    return found


def _list_files(one: PlanClass) -> Iterable[Path]:
    return {one.path, *(entry.path for plan in one.plans.values() for entry in plan.entries.values())}
