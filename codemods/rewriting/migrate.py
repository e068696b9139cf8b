"""A tree through the rules: plans found, grouped under their owners, every edit computed before one is written."""

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
        suppressions: says what of them is spoken of and what is ignored; without it everything is said.
        target: the dialect to write; `param-level` decomposes expert entries and leaves all else.
        source: the dialect that the tree speaks, `auto` to find out.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    if source != "auto":
        load_source_dialect(source)  # refuses a name that no tree speaks, also where the target asks for none
    if target == PARAM_LEVEL:
        found = survey_tree(paths, expert_plans, suppressions, skims=True)
        result = build_outcome(found, resolve_survey(found))
        return replace(result, errors=tuple(_collect_parse_errors(found, result)))
    found = survey_tree(paths, every_plan, suppressions)
    spoken = resolve_dialect(paths, found, source)
    decided = resolve_survey(found, partial(to_dialect, load_dialect(spoken.dialect), load_dialect(target)), every_plan)
    return replace(build_outcome(found, decided), dialects=(spoken,))


def _collect_parse_errors(survey: Survey, result: Outcome) -> list[MigratorError]:
    """Return the errors of a run once what was read without a parser is parsed, but for what changes, which was."""
    errors = list(result.errors)
    for path in sorted({place.path for place in survey.locations} - {change.path for change in result.changes}):
        try:
            if path in survey.scope:
                read_module(survey.tree.source(path))
        except MigratorError as error:
            add_error_once(errors, error)
    return errors


def resolve_dialect(paths: Sequence[Path], survey: Survey, source: str = "auto") -> DetectedDialect:
    """Return the dialect that a tree speaks, as asked for or found out, with the reason."""
    if source != "auto":
        return DetectedDialect(load_source_dialect(source).name, "asked for")
    styles = {style for place in survey.locations for style in survey.tree.literal(place).plan.values()}
    telling = next(filter(find_version_file, paths), None)
    return detect_dialect(telling or next(iter(paths), Path()), styles)


def build_outcome(survey: Survey, resolution: Resolution, *, every_unresolved: bool = False) -> Outcome:
    """Return the files that the edits make, and the findings below the given paths, with their lines.

    Args:
        survey: the tree.
        resolution: its edits and findings.
        every_unresolved: whether to name every use of a plan that cannot be read, not only those beside experts.
    """
    changes = sorted(_build_changes(survey, resolution.edits), key=lambda change: (change.role == "copy", change.path))
    said = (
        _locate(survey.tree, place, finding)
        for place, finding in resolution.findings
        if place.path in survey.scope and not _is_suppressed(survey, place, finding)
    )
    links = filter(None, map(_build_link_finding, survey.links))
    quiet = survey.suppressions.selection.configuration.is_ignored
    unread = (
        LocatedFinding(path, use.line, use.class_name, use.attribute, finding)
        for path, use, finding in find_unresolved(survey, experts_only=not every_unresolved)
    )
    kept = [*said, *unread, *(link for link in links if not quiet(link.path, link.finding.code))]
    return Outcome(tuple(changes), tuple(kept), tuple(survey.errors), len(survey.files_in_scope), survey.plan_files)


def _is_suppressed(survey: Survey, location: PlanLocation, finding: Finding) -> bool:
    return survey.suppressions.is_suppressed(
        location.path, find_lines(survey.tree, location, finding.key), finding.code
    )


def _build_link_finding(link: Path) -> LocatedFinding | None:
    """Say of a link out of the given paths that the plans behind it are left alone."""
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
    """Decide the edits of every family of plans, and say what a person should know.

    Args:
        survey: the tree.
        transform: works out what becomes of a family.
        plan_filter: which plans it speaks of.
    """
    places = [place for place in survey.locations if plan_filter.matches_literal(survey.tree.literal(place))]
    touches = survey.suppressions.selection.is_in_scope
    groups, lost = group_families(survey.tree, places, survey.errors)
    verdicts: list[tuple[Family, Evaluation]] = []
    for family in groups:
        if not touches(place.path for place in family.locations):
            continue
        try:
            verdicts.append((family, evaluate_family(survey.tree, family, survey.explain_out_of_scope, transform)))
        except MigratorError as error:
            survey.errors.append(error)
    loose = set(places).difference(place for family in groups for place in family.locations)
    decided = resolve_edits(survey.tree, verdicts, survey.suppressions, loose)
    about_lost = [(place, finding) for place, finding in lost if touches([place.path])]
    return replace(decided, findings=[*about_lost, *decided.findings])


def _locate(tree: Tree, location: PlanLocation, finding: Finding) -> LocatedFinding:
    return LocatedFinding(
        location.path, find_line(tree, location, finding.key), location.class_name, location.attribute, finding
    )


def _build_changes(survey: Survey, edits: Mapping[PlanLocation, OwnedEdits]) -> list[Change]:
    """Compute every file's new bytes; where one fails, all that belongs to its owners is given up."""
    by_file: dict[Path, dict[PlanLocation, OwnedEdits]] = defaultdict(dict)
    for place, wanted in edits.items():
        by_file[place.path][place] = wanted
    changes: list[Change] = []
    broken: set[PlanLocation] = set()
    for path, wanted_here in by_file.items():
        try:
            changes.append(_build_change(survey.tree, path, wanted_here))
        except MigratorError as error:
            survey.errors.append(error)
            broken |= {owner for owner, _ in wanted_here.values()}
    if not broken:
        return changes
    return _build_changes(survey, {place: owned for place, owned in edits.items() if owned[0] not in broken})


def _build_change(tree: Tree, path: Path, edits: Mapping[PlanLocation, OwnedEdits]) -> Change:
    source = tree.source(path)
    literals = [(tree.literal(place), wanted) for place, (_, wanted) in edits.items()]
    data = rewrite_source(source, tree.module(path), literals)
    located = tuple(
        LocatedEdit(find_line(tree, place, get_anchor(edit)), place.class_name, place.attribute, edit, owner)
        for place, (owner, wanted) in edits.items()
        for edit in wanted
    )
    return Change(source, data, "copy" if source.generated_from else "owner", located)
