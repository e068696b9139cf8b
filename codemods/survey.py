"""A tree surveyed: its files read, the plans written down in them found, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods.module import PlanLiteral
from codemods.ownership import Place, Tree
from codemods.selection import Silencer
from codemods.sources import find_sources, read_source, shown
from plans.decompose import is_decomposed_plan
from plans.errors import MigratorError

__all__ = ["Survey", "Wanted", "every_plan", "expert_plans", "is_model_path", "survey"]

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
        reachable: the files below the given paths that may be reported on and written.
        silencer: says what is spoken of and what is ignored.
        links: below the given paths, to files outside of them.
        places: the plans found, in and beside the given paths.
        errors: files that could not be read or parsed.
        plan_files: how many files mention a plan.
    """

    tree: Tree
    reachable: frozenset[Path]
    silencer: Silencer
    links: list[Path]
    places: list[Place] = field(default_factory=list)
    errors: list[MigratorError] = field(default_factory=list)
    plan_files: int = 0

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
    includes = silencer.selection.includes
    errors: list[MigratorError] = []
    links: list[Path] = []
    reachable = find_sources(paths, errors, links)
    named = frozenset(path.resolve() for path in paths)
    result = Survey(Tree(skims), frozenset(filter(includes, reachable)), silencer, links, errors=errors)
    for path in _with_context(named, reachable):
        try:
            source = read_source(path)
            if path.name.startswith(("modular_", "configuration_")):
                result.tree.add(source)
            if _PLAN not in source.data:
                continue
            result.plan_files += 1
            if path in result.reachable:
                silencer.read(source)
            if path in named or wanted.in_file(source.data):
                result.tree.add(source)
                result.places += _places(result.tree, path, wanted.literal)
        except MigratorError as error:
            if path in result.reachable:
                result.errors.append(error)
    return result


def _with_context(paths: Iterable[Path], reachable: Sequence[Path]) -> list[Path]:
    """Return the files to look at: a plan's copies may live beside the given paths, in sibling model folders."""
    roots = {path.parent.parent if path.is_file() else path.parent for path in paths if is_model_path(path)}
    return list(dict.fromkeys([*reachable, *find_sources(sorted(roots), [])])) if roots else list(reachable)


def is_model_path(path: Path) -> bool:
    """Say whether a path is one model: its folder, or a file in it."""
    folder = path.parent if path.is_file() else path
    return any(folder.glob("configuration_*.py")) or any(folder.glob("modular_*.py"))


def _places(tree: Tree, path: Path, wanted: Callable[[PlanLiteral], bool]) -> Iterator[Place]:
    for owner in tree.module(path).classes.values():
        for attribute, plan in owner.plans.items():
            if isinstance(plan, PlanLiteral) and wanted(plan):
                yield Place(path, owner.name, attribute)
        for index, literal in enumerate(owner.code):
            if wanted(literal):
                yield Place(path, owner.name, literal.attribute, index)
