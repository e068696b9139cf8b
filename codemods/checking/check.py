"""A tree checked: pending rewrites, copies at odds with their owners, and every defect that no rewrite mends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.checking.defects import Around, find_defects
from codemods.inheritance.ownership import Place
from codemods.models.describe import Model
from codemods.models.modeling import modeling_files
from codemods.reading.module import PlanLiteral
from codemods.rewriting.decisions import Decided
from codemods.rewriting.migrate import decide, outcome, tree_dialect
from codemods.rewriting.propagate import Family, about, families
from codemods.rewriting.transform import beside, to_dialect, to_param_level
from codemods.tree.outcome import Outcome
from codemods.tree.selection import Silencer
from codemods.tree.survey import Survey, every_plan, expert_plans, survey
from plans.dialect import PARAM_LEVEL, Dialect, load_dialect
from plans.rule import Finding

__all__ = ["check_paths"]

_Found = tuple[Place, Finding]


def check_paths(
    paths: Sequence[Path], silencer: Silencer | None = None, source: str = "auto", target: str = PARAM_LEVEL
) -> Outcome:
    """Compute every finding below the paths, pending rewrites among the changes; nothing is written.

    Args:
        paths: files and folders.
        silencer: says what of them is spoken of and what is ignored; without it everything is said.
        source: the dialect that the tree speaks, `auto` to find out.
        target: the dialect whose rewrites are pending.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    wanted = load_dialect(target)
    found = survey(paths, every_plan, silencer, skims=True)
    spoken = tree_dialect(paths, found, source)
    speaks = load_dialect(spoken.dialect)
    transform = to_param_level if target == PARAM_LEVEL else partial(to_dialect, speaks, wanted)
    speaks_of = expert_plans if target == PARAM_LEVEL else every_plan
    decided = decide(found, transform, speaks_of)
    others = [place for place in found.places if not speaks_of.literal(found.tree.literal(place))]
    findings = list(decided.findings)
    findings += [one for one in dict.fromkeys(_between(found, others)) if one not in decided.findings]
    findings += _inside(found, speaks.overlaid(load_dialect(PARAM_LEVEL)), decided)
    return replace(outcome(found, replace(decided, findings=findings), every_unread=True), dialects=(spoken,))


def _between(found: Survey, places: Iterable[Place]) -> Iterator[_Found]:
    """Yield what is wrong between owners and their copies."""
    groups, lost = families(found.tree, places, found.errors)
    touches = found.silencer.selection.touches
    yield from ((place, finding) for place, finding in lost if touches([place.path]))
    for family in groups:
        if touches(place.path for place in family.places):
            yield from _at_odds(found, family)


def _inside(found: Survey, dialect: Dialect, decided: Decided) -> Iterator[_Found]:
    """Yield the defects of every plan that a person wrote."""
    model_of = cache(_model)
    for place in found.places:
        is_own = found.tree.source(place.path).generated_from is None
        if is_own and found.silencer.selection.touches([place.path]):
            model = model_of(place.path.parent) if place.class_name else None
            yield from ((place, finding) for finding in _defects(found, place, dialect, decided, model))


def _at_odds(found: Survey, family: Family) -> Iterator[_Found]:
    wanted = found.tree.plan(family.owner)
    for place in family.copies:
        copy = found.tree.plan(place)
        same = isinstance(wanted, PlanLiteral) and isinstance(copy, PlanLiteral) and copy.says_the_same_as(wanted)
        if not same:
            yield place, about(found.tree, place, "MIG301", family.owner.path.name)


def _defects(found: Survey, place: Place, dialect: Dialect, decided: Decided, model: Model | None) -> Iterator[Finding]:
    _, edits = decided.edits.get(place, (place, ()))
    pending = frozenset(edit.key for edit in edits) | decided.ignored.get(place, frozenset())
    exists = model.could_exist if model else None
    held = {finding.key for where, finding in decided.findings if where == place and finding.code == "MIG204"}
    defects = find_defects(found.tree.literal(place), Around(dialect, beside(found.tree, place), pending, exists))
    return (one for one in defects if one.code != "MIG502" or one.key not in held)  # half of what is held back


def _model(folder: Path) -> Model | None:
    return Model(folder) if modeling_files(folder) else None
