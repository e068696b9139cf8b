"""A tree surveyed: its files read, the plans written down in them found, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from codemods.files.sources import find_sources, read_source, shown
from codemods.inheritance.ownership import Place, Tree
from codemods.reading.module import PlanLiteral
from codemods.tree.selection import Silencer
from plans.decompose import is_decomposed_plan
from plans.errors import MigratorError

__all__ = ["Survey", "Wanted", "every_plan", "expert_plans", "is_model_path", "places_in", "survey"]

_PLAN = b"_plan"
# A string that may be, or begin, the key of experts that are not expert-parallel already; far fewer files hold one than
# mention a plan.
_EXPERTS_ENTRY = re.compile(rb"experts(?:\.[\w{}]*)?[\"'](?!\s*+(?:#[^\n]*+\s*+)*+:\s*[\"'](?:grouped_gemm|ep_))")


@dataclass(frozen=True)
class Wanted:
    """Which plans a survey looks for.

    Args:
        in_file: whether a file's bytes can hold one; those that cannot are not even parsed.
        literal: whether a literal is one.
    """

    in_file: Callable[[bytes], bool]
    literal: Callable[[PlanLiteral], bool]


def _is_expert_plan(literal: PlanLiteral) -> bool:
    return is_decomposed_plan(literal.attribute) and any("experts" in entry.key for entry in literal.entries)


expert_plans = Wanted(lambda data: _EXPERTS_ENTRY.search(data) is not None, _is_expert_plan)
every_plan = Wanted(lambda data: True, lambda literal: True)


@dataclass
class Survey:
    """What was found in a tree.

    Args:
        tree: the files that were read.
        below: the files below the given paths that may be reported on and written.
        silencer: says what is spoken of and what is ignored.
        links: below the given paths, to files outside of them.
        places: the plans found, in and beside the given paths.
        errors: files that could not be read or parsed.
        plan_files: how many files mention a plan.
    """

    tree: Tree
    below: tuple[Path, ...]
    silencer: Silencer
    links: list[Path]
    places: list[Place] = field(default_factory=list)
    errors: list[MigratorError] = field(default_factory=list)
    plan_files: int = 0

    @cached_property
    def reachable(self) -> frozenset[Path]:
        """The files that may be reported on and written, to ask for one of them."""
        return frozenset(self.below)

    def out_of_reach(self, path: Path) -> str | None:
        """Return why a file may not be written, in words; None where it may."""
        if path in self.reachable:
            return None
        pattern = self.silencer.selection.configuration.excluded_by(path)
        why = f"excluded by {pattern!r} in pyproject.toml" if pattern else "outside the given paths"
        return f"{shown(path)} is {why}"


def survey(paths: Sequence[Path], wanted: Wanted, silencer: Silencer | None = None, *, skims: bool = False) -> Survey:
    """Read a tree and find its plans.

    Args:
        paths: files and folders.
        wanted: which plans.
        silencer: says what of them is spoken of and what is ignored; without it everything is said.
        skims: whether files with plain plans need not be parsed.

    Raises:
        UsageError: a path does not exist.
    """
    silencer = silencer or Silencer()
    errors: list[MigratorError] = []
    links: list[Path] = []
    given = find_sources(paths, errors, links)
    below = tuple(filter(silencer.selection.includes, given))
    named = frozenset(path.resolve() for path in paths)
    result = Survey(Tree(skims), below, silencer, links, errors=errors)
    files = frozenset(path for path in named if path.is_file())
    for path in below:  # hashing thousands of paths costs more than asking whether any file was named
        _look_into(path, result, wanted, is_named=bool(files) and path in files, is_below=True)
    for path in _context(named, given, below):
        _look_into(path, result, wanted, is_named=path in files, is_below=False)
    return result


def _look_into(path: Path, found: Survey, wanted: Wanted, *, is_named: bool, is_below: bool) -> None:
    """Read one file and add what it has to what was found."""
    try:
        source = read_source(path)
        if path.name.startswith(("modular_", "configuration_")):
            found.tree.add(source)
        if _PLAN not in source.data:
            return
        found.plan_files += 1
        if is_below:
            found.silencer.read(source)
        if is_named or wanted.in_file(source.data):
            found.tree.add(source)
            found.places += places_in(found.tree, path, wanted)
    except MigratorError as error:
        if is_below:
            found.errors.append(error)


def _context(named: Iterable[Path], given: Sequence[Path], below: Sequence[Path]) -> list[Path]:
    """Return other files to look at: excluded ones, and those of sibling models where copies of a plan may live."""
    roots = {path.parent.parent if path.is_file() else path.parent for path in named if is_model_path(path)}
    if not roots and len(given) == len(below):
        return []
    known = frozenset(below)
    return [path for path in dict.fromkeys([*given, *find_sources(sorted(roots), [])]) if path not in known]


def is_model_path(path: Path) -> bool:
    """Say whether a path is one model: its folder, or a file in it."""
    folder = path.parent if path.is_file() else path
    return any(folder.glob("configuration_*.py")) or any(folder.glob("modular_*.py"))


def places_in(tree: Tree, path: Path, wanted: Wanted) -> Iterator[Place]:
    """Yield the plans of one file, class by class."""
    for owner in tree.module(path).writers:
        for attribute, plan in owner.plans.items():
            if isinstance(plan, PlanLiteral) and wanted.literal(plan):
                yield Place(path, owner.name, attribute)
        for index, literal in enumerate(owner.code):
            if wanted.literal(literal):
                yield Place(path, owner.name, literal.attribute, index)
