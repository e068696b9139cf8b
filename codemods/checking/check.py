"""The check of a tree: pending rewrites, copies that differ from their owners, and defects that no rewrite fixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.checking.defects import DefectContext, find_defects
from codemods.files.sources import add_error_once
from codemods.inheritance.ownership import PlanLocation
from codemods.models.describe import Model
from codemods.models.model_files import find_modeling_files
from codemods.reading.module import PlanLiteral
from codemods.rewriting.families import Family, build_plan_finding, group_families
from codemods.rewriting.migrate import TreeReading, read_tree
from codemods.rewriting.transform import find_siblings
from codemods.rewriting.unknown_styles import find_unknown_styles
from codemods.tree.outcome import Outcome
from codemods.tree.selection import Suppressions
from codemods.tree.survey import Survey
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.errors import MigratorError
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
        target: the dialect to which rewrites are pending. Both may be files with a dialect of the user's own.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    reading = read_tree(paths, suppressions, target, source, detects=True)
    resolution = reading.resolution
    mismatches = dict.fromkeys(_find_copy_mismatches(reading.survey, reading.other_plans))
    findings = list(resolution.findings)
    findings += [mismatch for mismatch in mismatches if mismatch not in resolution.findings]
    unread = {(location, finding.key) for location, finding in findings if finding.code == "MIG203"}
    # What prevents reading the layout of an experts module may be that nothing creates it: that is one cause.
    findings += [
        one for one in _find_plan_defects(reading) if one[1].code != "MIG506" or (one[0], one[1].key) not in unread
    ]
    outcome = reading.build_outcome(replace(resolution, findings=findings), every_unresolved=True)
    release = reading.dialect.release if reading.dialect else None
    unknown = find_unknown_styles(reading.survey, release, reading.unknown_uses) if release else ()
    return replace(outcome, findings=(*outcome.findings, *unknown))


def _find_copy_mismatches(survey: Survey, locations: Iterable[PlanLocation]) -> Iterator[_PlanFinding]:
    """Yield the findings about copies that differ from their owner or have none."""
    families, orphans = group_families(survey.tree, locations, survey.errors)
    is_in_scope = survey.suppressions.selection.is_in_scope
    yield from ((location, finding) for location, finding in orphans if is_in_scope([location.path]))
    for family in families:
        if is_in_scope(location.path for location in family.locations):
            yield from _find_differing_copies(survey, family)


def _find_plan_defects(reading: TreeReading) -> Iterator[_PlanFinding]:
    """Yield the defects of every plan that a person wrote; those of tests are made up to be tested."""
    survey = reading.survey
    load_model = cache(partial(_load_model, survey))
    for location in survey.locations:
        is_generated = survey.tree.source(location.path).generated_from is not None
        is_judged = not is_generated and not survey.is_test(location.path)
        if is_judged and survey.suppressions.selection.is_in_scope([location.path]):
            model = load_model(location.path.parent) if location.class_name else None
            for finding in _find_literal_defects(reading, location, model):
                yield location, finding


def _find_differing_copies(survey: Survey, family: Family) -> Iterator[_PlanFinding]:
    owner = survey.tree.plan(family.owner)
    for location in family.copies:
        copy = survey.tree.plan(location)
        if not (isinstance(owner, PlanLiteral) and isinstance(copy, PlanLiteral) and copy.equals(owner)):
            yield location, build_plan_finding(survey.tree, location, "MIG301", family.owner.path.name)


def _find_literal_defects(reading: TreeReading, location: PlanLocation, model: Model | None) -> Iterator[Finding]:
    tree, resolution = reading.survey.tree, reading.resolution
    _, edits = resolution.edits.get(location, (location, ()))
    pending = frozenset(edit.key for edit in edits) | resolution.ignored.get(location, frozenset())
    dialect = reading.dialect.vocabulary.with_overrides(load_dialect(PARAM_LEVEL)) if reading.dialect else None
    context = DefectContext(
        replace(dialect, name=reading.dialect.vocabulary.name) if dialect and reading.dialect else None,
        find_siblings(tree, location),
        pending,
        model.can_exist if model else None,
        reading.dialect.unread if reading.dialect else (),
    )
    # A plan whose rewrite is blocked is half-migrated for that reason, which is reported already.
    blocked = {finding.key for where, finding in resolution.findings if where == location and finding.code == "MIG204"}
    defects = find_defects(tree.literal(location), context)
    return (defect for defect in defects if defect.code != "MIG502" or defect.key not in blocked)


def _load_model(survey: Survey, folder: Path) -> Model | None:
    try:
        return Model(folder) if find_modeling_files(folder) else None
    except MigratorError as error:
        add_error_once(survey.errors, error)
        return None
