"""The rewrite of a whole tree: find plans, group them under owners, compute every edit before any is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

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
    get_anchor,
    group_families,
    resolve_edits,
)
from codemods.rewriting.rewrite import rewrite_source
from codemods.rewriting.transform import to_dialect, to_param_level
from codemods.tree.detect import DetectedDialect, detect_dialect, find_version_file, load_source_dialect
from codemods.tree.outcome import Change, LocatedEdit, LocatedFinding, Outcome
from codemods.tree.selection import Suppressions
from codemods.tree.survey import PlanFilter, Survey, every_plan, expert_plans, find_unresolved, survey_tree
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.errors import MigratorError
from plans.rule import Finding, load_rule

__all__ = ["build_outcome", "plan_rewrites", "resolve_dialect", "resolve_survey"]


def plan_rewrites(
    paths: Sequence[Path], suppressions: Suppressions | None = None, target: str = PARAM_LEVEL, source: str = "auto"
) -> Outcome:
    """Compute every rewrite below the paths; nothing is written.

    Args:
        paths: files and folders.
        suppressions: decides which findings are in scope and which are suppressed; by default all are reported.
        target: the dialect to write; `param-level` decomposes expert entries and leaves all others as they are.
        source: the dialect that the tree uses, `auto` to detect it.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    if source != "auto":
        load_source_dialect(source)  # raises for an unknown name even if the target needs no source
    if target == PARAM_LEVEL:
        survey = survey_tree(paths, expert_plans, suppressions, skims=True)
        result = build_outcome(survey, resolve_survey(survey))
        return replace(result, errors=tuple(_collect_parse_errors(survey, result)))
    survey = survey_tree(paths, every_plan, suppressions)
    detected = resolve_dialect(paths, survey, source)
    transform = partial(to_dialect, load_dialect(detected.dialect), load_dialect(target))
    resolution = resolve_survey(survey, transform, every_plan)
    return replace(build_outcome(survey, resolution), dialects=(detected,))


def _collect_parse_errors(survey: Survey, result: Outcome) -> list[MigratorError]:
    """Return the errors of a run, with those of skimmed files that do not parse; changed files are parsed already."""
    errors = list(result.errors)
    for path in sorted({location.path for location in survey.locations} - {change.path for change in result.changes}):
        try:
            if path in survey.scope:
                read_module(survey.tree.source(path))
        except MigratorError as error:
            add_error_once(errors, error)
    return errors


def resolve_dialect(paths: Sequence[Path], survey: Survey, source: str = "auto") -> DetectedDialect:
    """Return the dialect that a tree uses, as asked for or detected, with the reason."""
    if source != "auto":
        return DetectedDialect(load_source_dialect(source).name, "asked for")
    styles = {style for location in survey.locations for style in survey.tree.literal(location).plan.values()}
    versioned = next(filter(find_version_file, paths), None)
    return detect_dialect(versioned or next(iter(paths), Path()), styles)


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
    findings = [*located, *unread, *(link for link in links if not is_ignored(link.path, link.finding.code))]
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
    survey: Survey, transform: Transform = to_param_level, plan_filter: PlanFilter = expert_plans
) -> Resolution:
    """Decide the edits and findings of every family of plans.

    Args:
        survey: the tree.
        transform: computes what changes in the plans of a family.
        plan_filter: selects the plans that the transform is for.
    """
    locations = [
        location for location in survey.locations if plan_filter.matches_literal(survey.tree.literal(location))
    ]
    is_in_scope = survey.suppressions.selection.is_in_scope
    families, about_ownerless = group_families(survey.tree, locations, survey.errors)
    evaluations: list[tuple[Family, Evaluation]] = []
    for family in families:
        if not is_in_scope(location.path for location in family.locations):
            continue
        try:
            evaluations.append((family, evaluate_family(survey.tree, family, survey.explain_out_of_scope, transform)))
        except MigratorError as error:
            survey.errors.append(error)
    orphans = set(locations).difference(location for family in families for location in family.locations)
    resolution = resolve_edits(survey.tree, evaluations, survey.suppressions, orphans)
    in_scope = [(location, finding) for location, finding in about_ownerless if is_in_scope([location.path])]
    return replace(resolution, findings=[*in_scope, *resolution.findings])


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
