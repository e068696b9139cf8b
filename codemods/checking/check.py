"""A tree checked: pending rewrites, copies at odds with their owners, and every defect that no rewrite mends."""

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
    """Compute every finding below the paths, pending rewrites among the changes; nothing is written.

    Args:
        paths: files and folders.
        suppressions: says what of them is spoken of and what is ignored; without it everything is said.
        source: the dialect that the tree speaks, `auto` to find out.
        target: the dialect whose rewrites are pending.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    wanted = load_dialect(target)
    found = survey_tree(paths, every_plan, suppressions, skims=True)
    spoken = resolve_dialect(paths, found, source)
    speaks = load_dialect(spoken.dialect)
    transform = to_param_level if target == PARAM_LEVEL else partial(to_dialect, speaks, wanted)
    speaks_of = expert_plans if target == PARAM_LEVEL else every_plan
    decided = resolve_survey(found, transform, speaks_of)
    others = [place for place in found.locations if not speaks_of.matches_literal(found.tree.literal(place))]
    findings = list(decided.findings)
    findings += [one for one in dict.fromkeys(_find_copy_mismatches(found, others)) if one not in decided.findings]
    findings += _find_plan_defects(found, speaks.with_overrides(load_dialect(PARAM_LEVEL)), decided)
    return replace(build_outcome(found, replace(decided, findings=findings), every_unresolved=True), dialects=(spoken,))


def _find_copy_mismatches(survey: Survey, locations: Iterable[PlanLocation]) -> Iterator[_PlanFinding]:
    """Yield what is wrong between owners and their copies."""
    groups, lost = group_families(survey.tree, locations, survey.errors)
    touches = survey.suppressions.selection.is_in_scope
    yield from ((place, finding) for place, finding in lost if touches([place.path]))
    for family in groups:
        if touches(place.path for place in family.locations):
            yield from _find_differing_copies(survey, family)


def _find_plan_defects(survey: Survey, dialect: Dialect, resolution: Resolution) -> Iterator[_PlanFinding]:
    """Yield the defects of every plan that a person wrote."""
    model_of = cache(_load_model)
    for place in survey.locations:
        is_own = survey.tree.source(place.path).generated_from is None
        if is_own and survey.suppressions.selection.is_in_scope([place.path]):
            model = model_of(place.path.parent) if place.class_name else None
            yield from (
                (place, finding) for finding in _find_literal_defects(survey, place, dialect, resolution, model)
            )


def _find_differing_copies(survey: Survey, family: Family) -> Iterator[_PlanFinding]:
    wanted = survey.tree.plan(family.owner)
    for place in family.copies:
        copy = survey.tree.plan(place)
        same = isinstance(wanted, PlanLiteral) and isinstance(copy, PlanLiteral) and copy.equals(wanted)
        if not same:
            yield place, build_plan_finding(survey.tree, place, "MIG301", family.owner.path.name)


def _find_literal_defects(
    survey: Survey, location: PlanLocation, dialect: Dialect, resolution: Resolution, model: Model | None
) -> Iterator[Finding]:
    _, edits = resolution.edits.get(location, (location, ()))
    pending = frozenset(edit.key for edit in edits) | resolution.ignored.get(location, frozenset())
    exists = model.can_exist if model else None
    held = {finding.key for where, finding in resolution.findings if where == location and finding.code == "MIG204"}
    defects = find_defects(
        survey.tree.literal(location), DefectContext(dialect, find_siblings(survey.tree, location), pending, exists)
    )
    return (one for one in defects if one.code != "MIG502" or one.key not in held)  # half of what is held back


def _load_model(folder: Path) -> Model | None:
    return Model(folder) if list_modeling_files(folder) else None
