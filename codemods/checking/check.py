"""The check of a tree: pending rewrites, copies that differ from their owners, and defects that no rewrite fixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.checking.defects import DefectContext, find_defects
from codemods.inheritance.ownership import PlanLocation
from codemods.models.describe import Model
from codemods.models.modeling import list_modeling_files
from codemods.reading.module import PlanLiteral
from codemods.rewriting.families import Family, Resolution, build_plan_finding, group_families
from codemods.rewriting.migrate import build_outcome, resolve_dialect, resolve_survey
from codemods.rewriting.transform import find_siblings, to_dialect, to_param_level
from codemods.tree.outcome import Outcome
from codemods.tree.selection import Suppressions
from codemods.tree.survey import Survey, every_plan, expert_plans, survey_tree
from plans.dialect import PARAM_LEVEL, Dialect, load_dialect
from plans.rule import Finding

__all__ = ["check_paths"]

_PlanFinding = tuple[PlanLocation, Finding]


def check_paths(
    paths: Sequence[Path], suppressions: Suppressions | None = None, source: str = "auto", target: str = PARAM_LEVEL
) -> Outcome:
    """Return every finding below the paths, and the pending rewrites as changes; nothing is written.

    Args:
        paths: files and folders.
        suppressions: decides which findings are in scope and which are suppressed; by default all are reported.
        source: the tree's dialect, `auto` to detect it.
        target: the dialect to which rewrites are pending.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    target_dialect = load_dialect(target)
    survey = survey_tree(paths, every_plan, suppressions, skims=True)
    detected = resolve_dialect(paths, survey, source)
    dialect = load_dialect(detected.dialect)
    transform = to_param_level if target == PARAM_LEVEL else partial(to_dialect, dialect, target_dialect)
    rewritten = expert_plans if target == PARAM_LEVEL else every_plan
    resolution = resolve_survey(survey, transform, rewritten)
    others = [place for place in survey.locations if not rewritten.matches_literal(survey.tree.literal(place))]
    mismatches = dict.fromkeys(_find_copy_mismatches(survey, others))
    findings = list(resolution.findings)
    findings += [mismatch for mismatch in mismatches if mismatch not in resolution.findings]
    findings += _find_plan_defects(survey, dialect.with_overrides(load_dialect(PARAM_LEVEL)), resolution)
    outcome = build_outcome(survey, replace(resolution, findings=findings), every_unresolved=True)
    return replace(outcome, dialects=(detected,))


def _find_copy_mismatches(survey: Survey, locations: Iterable[PlanLocation]) -> Iterator[_PlanFinding]:
    """Yield the findings about copies that differ from their owner or have none."""
    families, orphans = group_families(survey.tree, locations, survey.errors)
    is_in_scope = survey.suppressions.selection.is_in_scope
    yield from ((location, finding) for location, finding in orphans if is_in_scope([location.path]))
    for family in families:
        if is_in_scope(location.path for location in family.locations):
            yield from _find_differing_copies(survey, family)


def _find_plan_defects(survey: Survey, dialect: Dialect, resolution: Resolution) -> Iterator[_PlanFinding]:
    """Yield the defects of every plan that a person wrote."""
    load_model = cache(_load_model)
    for location in survey.locations:
        is_generated = survey.tree.source(location.path).generated_from is not None
        if is_generated or not survey.suppressions.selection.is_in_scope([location.path]):
            continue
        model = load_model(location.path.parent) if location.class_name else None
        for finding in _find_literal_defects(survey, location, dialect, resolution, model):
            yield location, finding


def _find_differing_copies(survey: Survey, family: Family) -> Iterator[_PlanFinding]:
    owner = survey.tree.plan(family.owner)
    for location in family.copies:
        copy = survey.tree.plan(location)
        if not (isinstance(owner, PlanLiteral) and isinstance(copy, PlanLiteral) and copy.equals(owner)):
            yield location, build_plan_finding(survey.tree, location, "MIG301", family.owner.path.name)


def _find_literal_defects(
    survey: Survey, location: PlanLocation, dialect: Dialect, resolution: Resolution, model: Model | None
) -> Iterator[Finding]:
    _, edits = resolution.edits.get(location, (location, ()))
    pending = frozenset(edit.key for edit in edits) | resolution.ignored.get(location, frozenset())
    context = DefectContext(dialect, find_siblings(survey.tree, location), pending, model.can_exist if model else None)
    # A plan whose rewrite is blocked is half-migrated for that reason, which is reported already.
    blocked = {finding.key for where, finding in resolution.findings if where == location and finding.code == "MIG204"}
    defects = find_defects(survey.tree.literal(location), context)
    return (defect for defect in defects if defect.code != "MIG502" or defect.key not in blocked)


def _load_model(folder: Path) -> Model | None:
    return Model(folder) if list_modeling_files(folder) else None
