"""The rewrite of a whole tree: find plans, group them under owners, compute every edit before any is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from codemods.files.sources import add_error_once, format_path, read_source
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.reading.parse import read_module
from codemods.rewriting.families import (
    Evaluation,
    Family,
    OwnedEdits,
    Resolution,
    Transform,
    evaluate_family,
    find_line,
    find_lines,
    group_families,
    resolve_edits,
)
from codemods.rewriting.rewrite import rewrite_source
from codemods.rewriting.transform import to_dialect, to_param_level
from codemods.rewriting.unknown_styles import UnknownUses, build_hold_error, find_unknown_uses, hold, is_held
from codemods.tree.detect import (
    DetectedDialect,
    TreeDialect,
    detect_tree_dialect,
    detect_unknown_release,
    load_source_dialect,
)
from codemods.tree.outcome import Change, LocatedEdit, LocatedFinding, Outcome
from codemods.tree.release import find_version_file
from codemods.tree.selection import Suppressions
from codemods.tree.survey import PlanFilter, Survey, every_plan, expert_plans, find_unresolved, survey_tree
from plans.decompose import get_anchor
from plans.dialect import PARAM_LEVEL
from plans.dialect_file import load_named_dialect
from plans.errors import MigratorError
from plans.rule import Finding, load_rule

__all__ = ["TreeReading", "build_outcome", "plan_rewrites", "read_tree", "resolve_survey"]


def plan_rewrites(
    paths: Sequence[Path], suppressions: Suppressions | None = None, target: str = PARAM_LEVEL, source: str = "auto"
) -> Outcome:
    """Compute every rewrite below the paths; nothing is written.

    Args:
        paths: files and folders.
        suppressions: decides which findings are in scope and which are suppressed; by default all are reported.
        target: the dialect to write; `param-level` decomposes expert entries and leaves all others as they are.
        source: the dialect that the tree uses, `auto` to detect it. Both may be files with a dialect of the user's own.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    reading = read_tree(paths, suppressions, target, source, detects=target != PARAM_LEVEL)
    group_families(reading.survey.tree, reading.other_plans, reading.survey.errors)  # what `check` reads of them
    outcome = reading.build_outcome(reading.resolution)
    release = reading.dialect.release if reading.dialect else None
    held = build_hold_error(reading.survey, release, reading.unknown_uses) if release else None
    return replace(outcome, errors=(*outcome.errors, held)) if held else outcome


@dataclass(frozen=True)
class TreeReading:
    """A tree as `rewrite` and `check` both read it, so that they report the same errors.

    Args:
        survey: the tree's plans.
        resolution: the edits and findings of the plans that the target concerns; none if the dialect is not known.
        dialect: the tree's dialect, None if it was not asked for or cannot be known, which is then an error.
        plan_filter: selects the plans that the target concerns.
        unknown_uses: the plans that are held, because no dialect describes what they use.
    """

    survey: Survey
    resolution: Resolution
    dialect: TreeDialect | None
    plan_filter: PlanFilter
    unknown_uses: UnknownUses = field(default_factory=dict)

    @property
    def other_plans(self) -> list[PlanLocation]:
        """The plans that the target does not concern."""
        literal = self.survey.tree.literal
        return [each for each in self.survey.locations if not self.plan_filter.matches_literal(literal(each))]

    def build_outcome(self, resolution: Resolution, *, every_unresolved: bool = False) -> Outcome:
        """Return the outcome of a run that resolved the tree's plans, as `build_outcome` does."""
        result = build_outcome(self.survey, resolution, every_unresolved=every_unresolved)
        findings = tuple(map(self._excuse_test, result.findings))
        dialects = (self.dialect.detected,) if self.dialect else ()
        errors = tuple(self._collect_parse_errors(result))
        return replace(result, findings=findings, errors=errors, dialects=dialects)

    def _excuse_test(self, located: LocatedFinding) -> LocatedFinding:
        """Turn a finding about a test's plan, which may be made up, into a note."""
        finding = located.finding
        if finding.severity == "note" or not self.survey.is_test(located.path):
            return located
        where = finding.message.removeprefix(f"{finding.key}: ")
        message = load_rule("MIG107").message.format(key=finding.key, where=f"{finding.code} elsewhere: {where}")
        return replace(located, finding=Finding("MIG107", finding.key, message))

    def _collect_parse_errors(self, result: Outcome) -> list[MigratorError]:
        """Return the errors of a run, with those of skimmed files that do not parse; changed files are parsed already.

        Files without a plan that the target concerns may stay skimmed: parsing them all would double the time of a run.
        """
        errors, tree = list(result.errors), self.survey.tree
        concerned = {
            each.path for each in self.survey.locations if self.plan_filter.matches_literal(tree.literal(each))
        }
        for path in sorted(concerned - {change.path for change in result.changes}) if tree.skims else ():
            try:
                if path in self.survey.scope:
                    read_module(tree.source(path))
            except MigratorError as error:
                add_error_once(errors, error)
        return errors


def read_tree(
    paths: Sequence[Path], suppressions: Suppressions | None, target: str, source: str, *, detects: bool
) -> TreeReading:
    """Read a tree, and resolve the plans that the target concerns.

    Args:
        paths: files and folders.
        suppressions: decides which findings are in scope and which are suppressed.
        target: the dialect to write, by its name or file.
        source: the dialect that the tree uses, by its name or file, `auto` to detect it.
        detects: whether the dialect is needed. Without it a tree is still refused whose release is too old.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    target_dialect = load_named_dialect(target)
    asked = load_source_dialect(source) if source != "auto" else None
    plan_filter = expert_plans if target == PARAM_LEVEL else every_plan
    survey = survey_tree(paths, every_plan, suppressions, skims=target == PARAM_LEVEL)
    dialect = TreeDialect(DetectedDialect(asked.name, "asked for"), asked) if asked and detects else None
    try:
        if asked is None and detects:
            dialect = _detect(paths, survey)
        elif asked is None:
            dialect = detect_unknown_release(_find_start(paths), survey.registering)
    except MigratorError as error:
        add_error_once(survey.errors, error)
        return TreeReading(survey, Resolution({}, (), {}), None, plan_filter)
    transform: Transform = to_param_level
    if target != PARAM_LEVEL:
        assert dialect is not None
        transform = partial(to_dialect, dialect.vocabulary, target_dialect)
    uses = find_unknown_uses(survey, dialect.release if dialect else None)
    return TreeReading(survey, resolve_survey(survey, transform, plan_filter, uses), dialect, plan_filter, uses)


def _detect(paths: Sequence[Path], survey: Survey) -> TreeDialect:
    styles = {style for location in survey.locations for style in survey.tree.literal(location).plan.values()}
    return detect_tree_dialect(_find_start(paths), styles, survey.registering)


def _find_start(paths: Sequence[Path]) -> Path:
    """Return the path to look for the tree's release and registry from: the first that a version file belongs to."""
    return next(filter(find_version_file, paths), None) or next(iter(paths), Path())


def build_outcome(survey: Survey, resolution: Resolution, *, every_unresolved: bool = False) -> Outcome:
    """Return the changed files, and the findings below the given paths with their lines.

    Args:
        survey: the tree.
        resolution: its edits and findings.
        every_unresolved: whether to report every use of a plan that cannot be read, not only those beside experts.
    """
    changes = sorted(_build_changes(survey, resolution.edits), key=lambda change: (change.role == "copy", change.path))
    located = (
        _locate(survey.tree, location, finding)
        for location, finding in resolution.findings
        if location.path in survey.scope and not _is_suppressed(survey, location, finding)
    )
    links = filter(None, map(_build_link_finding, survey.links))
    is_ignored = survey.suppressions.selection.configuration.is_ignored
    unread = (
        LocatedFinding(path, use.line, use.class_name, use.attribute, finding)
        for path, use, finding in find_unresolved(survey, experts_only=not every_unresolved)
    )
    unknown = (
        LocatedFinding(path, line, "", name, Finding("MIG510", name, load_rule("MIG510").message.format(key=name)))
        for name, (path, line) in survey.unknown_plans.items()
        if not survey.suppressions.is_suppressed(path, (line,), "MIG510")
    )
    findings = [*located, *unread, *unknown, *(link for link in links if not is_ignored(link.path, link.finding.code))]
    return Outcome(tuple(changes), tuple(findings), tuple(survey.errors), len(survey.files_in_scope), survey.plan_files)


def _is_suppressed(survey: Survey, location: PlanLocation, finding: Finding) -> bool:
    return survey.suppressions.is_suppressed(
        location.path, find_lines(survey.tree, location, finding.key), finding.code
    )


def _build_link_finding(link: Path) -> LocatedFinding | None:
    """Return a finding that the plans behind a link out of the given paths are not rewritten, None without plans."""
    try:
        leads_to_plans = expert_plans.matches_file(read_source(link).data)
    except MigratorError:
        return None
    where = format_path(link.resolve())
    finding = Finding("MIG305", link.name, load_rule("MIG305").message.format(key=link.name, where=where))
    return LocatedFinding(link, 1, "", "", finding) if leads_to_plans else None


def resolve_survey(
    survey: Survey,
    transform: Transform = to_param_level,
    plan_filter: PlanFilter = expert_plans,
    unknown_uses: UnknownUses = MappingProxyType({}),
) -> Resolution:
    """Decide the edits and findings of every family of plans.

    Args:
        survey: the tree.
        transform: computes what changes in the plans of a family.
        plan_filter: selects the plans that the transform is for.
        unknown_uses: the plans that stay as they are, by the unknown styles that they use.
    """
    locations = [
        location for location in survey.locations if plan_filter.matches_literal(survey.tree.literal(location))
    ]
    is_in_scope = survey.suppressions.selection.is_in_scope
    families, about_ownerless = group_families(survey.tree, locations, survey.errors)
    evaluations: list[tuple[Family, Evaluation]] = []
    held: dict[PlanLocation, frozenset[str]] = {}
    for family in families:
        if not is_in_scope(location.path for location in family.locations):
            continue
        try:
            evaluation = evaluate_family(survey.tree, family, survey.explain_out_of_scope, transform)
        except MigratorError as error:
            survey.errors.append(error)
            continue
        if is_held(family, unknown_uses):
            evaluation, keys = hold(evaluation)
            held |= keys
        evaluations.append((family, evaluation))
    orphans = set(locations).difference(location for family in families for location in family.locations)
    resolution = resolve_edits(survey.tree, evaluations, survey.suppressions, orphans)
    in_scope = [(location, finding) for location, finding in about_ownerless if is_in_scope([location.path])]
    findings = [*in_scope, *resolution.findings]
    return replace(resolution, findings=findings, ignored={**resolution.ignored, **held})


def _locate(tree: Tree, location: PlanLocation, finding: Finding) -> LocatedFinding:
    return LocatedFinding(
        location.path, find_line(tree, location, finding.key), location.class_name, location.attribute, finding
    )


def _build_changes(survey: Survey, edits: Mapping[PlanLocation, OwnedEdits]) -> list[Change]:
    """Compute every file's new bytes; if one fails, no plan that shares an owner with it is changed."""
    by_file: dict[Path, dict[PlanLocation, OwnedEdits]] = defaultdict(dict)
    for location, owned in edits.items():
        by_file[location.path][location] = owned
    changes: list[Change] = []
    failed: set[PlanLocation] = set()
    for path, edits_of_file in by_file.items():
        try:
            changes.append(_build_change(survey.tree, path, edits_of_file))
        except MigratorError as error:
            survey.errors.append(error)
            failed |= {owner for owner, _ in edits_of_file.values()}
    if not failed:
        return changes
    return _build_changes(survey, {location: owned for location, owned in edits.items() if owned[0] not in failed})


def _build_change(tree: Tree, path: Path, edits: Mapping[PlanLocation, OwnedEdits]) -> Change:
    source = tree.source(path)
    literals = [(tree.literal(location), wanted) for location, (_, wanted) in edits.items()]
    data = rewrite_source(source, tree.module(path), literals)
    located = tuple(
        LocatedEdit(find_line(tree, location, get_anchor(edit)), location.class_name, location.attribute, edit, owner)
        for location, (owner, wanted) in edits.items()
        for edit in wanted
    )
    return Change(source, data, "copy" if source.generated_from else "owner", located)
