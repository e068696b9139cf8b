"""A survey of a tree: its files read, and the locations of the plans in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from codemods.files.sources import SourceFile, find_sources, format_path, read_source
from codemods.inheritance.conflicts import is_framework_file
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.reading.module import PlanLiteral, Unresolved
from codemods.tree.registry import REGISTRY, Place
from codemods.tree.selection import Suppressions
from plans.decompose import is_decomposable_plan
from plans.errors import MigratorError
from plans.plan import OTHER_PLAN_KINDS, PLAN_KINDS
from plans.rule import Finding

__all__ = [
    "PlanFilter",
    "Survey",
    "every_plan",
    "expert_plans",
    "find_plans",
    "find_unresolved",
    "is_model_path",
    "survey_tree",
]


_PLAN = b"_plan"
_TEST_FOLDERS = frozenset({"test", "tests"})
_ROOT_FILES = (".git", "pyproject.toml", "setup.py")
_MODEL_FILES = ("configuration_", "modular_", "modeling_")
# A plan's name on a config class that is assigned or passed, and that no known release has.
_UNKNOWN_PLAN = re.compile(
    rb"(?<!\w)(?P<name>base_model_(?!(?:%s)_plan\b)\w+_plan)[ \t]*(?::[^=\n]*)?=(?!=)"
    % "|".join((*PLAN_KINDS, *OTHER_PLAN_KINDS)).encode()
)
# A string that may be, or begin, the key of experts that are not expert-parallel already. Far fewer files contain one
# than mention a plan.
_EXPERTS_ENTRY = re.compile(rb"experts(?:\.[\w{}]*)?[\"'](?!\s*+(?:#[^\n]*+\s*+)*+:\s*[\"'](?:grouped_gemm|ep_))")


@dataclass(frozen=True)
class PlanFilter:
    """Which plans a survey looks for.

    Args:
        matches_file: returns whether a file's bytes can hold such a plan; other files are not parsed.
        matches_literal: returns whether a literal is such a plan.
    """

    matches_file: Callable[[bytes], bool]
    matches_literal: Callable[[PlanLiteral], bool]


def _is_expert_plan(literal: PlanLiteral) -> bool:
    return is_decomposable_plan(literal.attribute) and any("experts" in entry.key for entry in literal.entries)


expert_plans = PlanFilter(lambda data: _EXPERTS_ENTRY.search(data) is not None, _is_expert_plan)
every_plan = PlanFilter(lambda data: True, lambda literal: True)


@dataclass
class Survey:
    """The plans of a tree and the files they are in.

    Args:
        tree: the files that were read.
        files_in_scope: the files below the given paths that may be reported on and written.
        suppressions: decides which findings are in scope and which are suppressed.
        links: the links below the given paths that lead to files outside of them.
        locations: where plans were found, in and beside the given paths.
        errors: the errors of files that could not be read or parsed.
        plan_files: how many files mention a plan.
        unknown_plans: the first place of each plan attribute that no known release has.
        registering: the files below the given paths, tests aside, that mention the registry of styles.
        roots: the folders that were given, and those of the given files.
    """

    tree: Tree
    files_in_scope: tuple[Path, ...]
    suppressions: Suppressions
    links: list[Path]
    locations: list[PlanLocation] = field(default_factory=list)
    errors: list[MigratorError] = field(default_factory=list)
    plan_files: int = 0
    unknown_plans: dict[str, Place] = field(default_factory=dict)
    registering: list[SourceFile] = field(default_factory=list)
    roots: frozenset[Path] = frozenset()

    @cached_property
    def scope(self) -> frozenset[Path]:
        """The files that may be reported on and written, as a set."""
        return frozenset(self.files_in_scope)

    def is_test(self, path: Path) -> bool:
        """Return whether a file belongs to a test suite, going by its name and the folders of the project it is in."""
        name = path.stem
        is_named_so = name == "conftest" or name.startswith("test_") or name.endswith("_test")
        return (is_named_so and not is_model_file(path)) or _is_in_tests(path.parent, self.roots)

    def explain_out_of_scope(self, path: Path) -> str | None:
        """Return in words why a file may not be written, None if it may."""
        if path in self.scope:
            return None
        pattern = self.suppressions.selection.configuration.find_exclude_pattern(path)
        why = f"excluded by {pattern!r} in pyproject.toml" if pattern else "outside the given paths"
        return f"{format_path(path)} is {why}"


def survey_tree(
    paths: Sequence[Path], plan_filter: PlanFilter, suppressions: Suppressions | None = None, *, skims: bool = False
) -> Survey:
    """Read a tree and find its plans.

    Args:
        paths: files and folders.
        plan_filter: which plans to look for.
        suppressions: decides which findings are in scope and which are suppressed; by default all are reported.
        skims: whether files with plain plans may be read without a parser.

    Raises:
        UsageError: a path does not exist.
    """
    suppressions = suppressions or Suppressions()
    errors: list[MigratorError] = []
    links: list[Path] = []
    given = find_sources(paths, errors, links)
    below = tuple(filter(suppressions.selection.includes, given))
    named = frozenset(path.resolve() for path in paths)
    roots = frozenset(path if path.is_dir() else path.parent for path in named)
    result = Survey(Tree(skims), below, suppressions, links, errors=errors, roots=roots)
    files = frozenset(path for path in named if path.is_file())
    for path in below:  # hashing thousands of paths costs more than asking whether any file was named
        _survey_file(path, result, plan_filter, is_named=bool(files) and path in files, is_below=True)
    for path in _find_context_files(named, given, below):
        _survey_file(path, result, plan_filter, is_named=path in files, is_below=False)
    return result


def _survey_file(path: Path, survey: Survey, plan_filter: PlanFilter, *, is_named: bool, is_below: bool) -> None:
    """Read one file and add its plans to the survey."""
    try:
        source = read_source(path)
        if path.name.startswith(("modular_", "configuration_")):
            survey.tree.add(source)
        if is_below and REGISTRY in source.data and not survey.is_test(path):
            survey.registering.append(source)
            survey.suppressions.read_comments(source)
        if _PLAN not in source.data:
            survey.tree.other_files += [] if survey.is_test(path) else [path]
            return
        survey.plan_files += 1
        if is_below:
            survey.suppressions.read_comments(source)
            _find_unknown_plans(source, survey)
        survey.tree.add(source)
        if survey.tree.module(path).plan_classes is None and not survey.is_test(path):
            survey.tree.code_files.append(path)
        if is_named or plan_filter.matches_file(source.data):
            survey.locations += find_plans(survey.tree, path, plan_filter)
    except MigratorError as error:
        if is_below:
            survey.errors.append(error)


def _find_unknown_plans(source: SourceFile, survey: Survey) -> None:
    """Add a file's plan attributes that no known release has to the survey; tests make names up."""
    for match in _UNKNOWN_PLAN.finditer(source.data) if not survey.is_test(source.path) else ():
        start = source.data.rfind(b"\n", 0, match.start()) + 1
        if b"#" not in source.data[start : match.start()]:
            line = source.data.count(b"\n", 0, start) + 1
            survey.unknown_plans.setdefault(match["name"].decode(), (source.path, line))


def _find_context_files(named: Iterable[Path], given: Sequence[Path], below: Sequence[Path]) -> list[Path]:
    """Return other files to read: excluded ones, and those of sibling models, where copies of a plan may be."""
    roots = {path.parent.parent if path.is_file() else path.parent for path in named if is_model_path(path)}
    if not roots and len(given) == len(below):
        return []
    known = frozenset(below)
    return [path for path in dict.fromkeys([*given, *find_sources(sorted(roots), [])]) if path not in known]


def is_model_path(path: Path) -> bool:
    """Return whether a path is a model's folder, or a file in one."""
    folder = path.parent if path.is_file() else path
    return any(folder.glob("configuration_*.py")) or any(folder.glob("modular_*.py"))


def is_model_file(path: Path) -> bool:
    """Return whether a file is one of those that make up a model."""
    return path.name.startswith(_MODEL_FILES)


@cache
def _is_in_tests(folder: Path, roots: frozenset[Path]) -> bool:
    """Return whether a folder is below one for tests; folders outside of the project do not count."""
    folders = (folder, *folder.parents)
    project = next((each for each in folders if any((each / name).exists() for name in _ROOT_FILES)), None)
    root = project or next((each for each in folders if each in roots), folder)
    return not _TEST_FOLDERS.isdisjoint(folder.relative_to(root).parts)


def find_plans(tree: Tree, path: Path, plan_filter: PlanFilter) -> Iterator[PlanLocation]:
    """Yield the locations of one file's plans, class by class."""
    for owner in tree.module(path).writers:
        for attribute, plan in owner.plans.items():
            if isinstance(plan, PlanLiteral) and plan_filter.matches_literal(plan):
                yield PlanLocation(path, owner.name, attribute)
        for index, literal in enumerate(owner.code_literals):
            if plan_filter.matches_literal(literal):
                yield PlanLocation(path, owner.name, literal.attribute, index)


def find_unresolved(survey: Survey, *, experts_only: bool) -> Iterator[tuple[Path, Unresolved, Finding]]:
    """Yield a finding for every statement that puts entries into a plan which cannot be read.

    Generated files are left out, because their owners decide, and so are tests and the library around the models.

    Args:
        survey: the survey of a tree.
        experts_only: whether to report only statements near a mention of experts.
    """
    for path, module in survey.tree.modules.items():
        if not module.unresolved or path not in survey.scope or survey.tree.source(path).generated_from is not None:
            continue
        if is_framework_file(path) or survey.is_test(path):
            continue
        for use in module.unresolved if survey.suppressions.selection.is_in_scope([path]) else ():
            silent = survey.suppressions.is_suppressed(path, (use.line,), "MIG204")
            if not silent and (use.mentions_experts or not experts_only):
                message = f"{use.attribute}: gets entries here {use.reason}"
                yield path, use, Finding("MIG204", use.attribute, message)
