"""Plans that use styles which a tree's release has and no known dialect describes: they are held, and reported.

Such a name may bring new meanings of the others with it, so nothing of its plan is rewritten by what older ones meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from codemods.files.sources import format_path
from codemods.inheritance.ownership import PlanLocation
from codemods.rewriting.families import Evaluation, Family, find_line
from codemods.tree.outcome import LocatedFinding
from codemods.tree.release import UnknownRelease
from codemods.tree.survey import Survey
from plans.decompose import find_group_key
from plans.errors import UsageError
from plans.rule import Finding, load_rule
from plans.text import format_count

__all__ = ["UnknownUses", "build_hold_error", "find_unknown_styles", "find_unknown_uses", "hold", "is_held"]

UnknownUses = Mapping[str, tuple[PlanLocation, ...]]
"""The plans that use each unknown style."""


def find_unknown_uses(survey: Survey, release: UnknownRelease | None) -> UnknownUses:
    """Return the unknown styles of a tree's release, each with the plans that use it."""
    uses: dict[str, list[PlanLocation]] = {style: [] for style in release.styles} if release else {}
    for location in survey.locations if release else ():
        for style in dict.fromkeys(survey.tree.literal(location).plan.values()):
            if release and release.is_unknown(style):
                uses.setdefault(style, []).append(location)
    return {style: tuple(locations) for style, locations in uses.items()}


def is_held(family: Family, uses: UnknownUses) -> bool:
    """Return whether any literal of a family's plans uses an unknown style, the literals that code adds included."""
    held = {(each.path, each.class_name, each.attribute) for locations in uses.values() for each in locations}
    return any((each.path, each.class_name, each.attribute) in held for each in family.locations)


def hold(evaluation: Evaluation) -> tuple[Evaluation, Mapping[PlanLocation, frozenset[str]]]:
    """Return a family's evaluation without its edits and findings, and the keys of the edits that are held."""
    keys = {location: frozenset(edit.key for edit in edits) for location, edits in evaluation.edits.items()}
    groups = frozenset(find_group_key(key) for of_plan in keys.values() for key in of_plan)
    return replace(evaluation, edits={}, findings=(), blocked=evaluation.blocked | groups), keys


def build_hold_error(survey: Survey, release: UnknownRelease, uses: UnknownUses) -> UsageError | None:
    """Return the error that plans are held, None if no plan that may be written is."""
    in_scope = {style: places for style, locations in uses.items() if (places := _select(survey, locations))}
    if not in_scope:
        return None
    held = list(dict.fromkeys(location for locations in in_scope.values() for location in locations))
    styles = ", ".join(_describe_style(style, release) for style in in_scope)
    them = "it" if len(held) == 1 else "them"
    return UsageError(
        f"{_name_plans(survey, held, in_scope)} not rewritten: {release.name} has styles for {them} that "
        f"{release.read_as} lacks: {styles}",
        hint=f"set `source` to the dialect of these plans: {release.read_as} if the other styles mean what they mean "
        "there, or a file that describes the new ones",
        styles=list(in_scope),
        plans=[f"{format_path(each.path)}:{_find_line(survey, each, in_scope)}" for each in held],
    )


def find_unknown_styles(survey: Survey, release: UnknownRelease, uses: UnknownUses) -> Iterator[LocatedFinding]:
    """Yield a finding for each unknown style at the place that registers it."""
    for style, (path, line) in release.styles.items():
        users = _select(survey, uses.get(style, ()))
        is_in_scope = bool(users) or survey.suppressions.selection.is_in_scope([path])
        if is_in_scope and not survey.suppressions.is_suppressed(path, (line,), "MIG509"):
            where = f"; {_name_plans(survey, users, {style: users})} not rewritten" if users else ""
            words = {"release": release.name, "dialect": release.read_as, "where": where}
            message = load_rule("MIG509").message.format(key=style, **words)
            yield LocatedFinding(path, line, "", "", Finding("MIG509", style, message))


def _select(survey: Survey, locations: Iterable[PlanLocation]) -> tuple[PlanLocation, ...]:
    """Return the plans that may be reported on."""
    selection = survey.suppressions.selection
    return tuple(each for each in locations if each.path in survey.scope and selection.is_in_scope([each.path]))


def _describe_style(style: str, release: UnknownRelease) -> str:
    path, line = release.styles.get(style, (None, 0))
    return f"{style} ({format_path(path)}:{line})" if path else style


def _name_plans(survey: Survey, locations: tuple[PlanLocation, ...] | list[PlanLocation], uses: UnknownUses) -> str:
    """Return the first plan by its place, and how many others there are, with a verb."""
    first = f"{format_path(locations[0].path)}:{_find_line(survey, locations[0], uses)}"
    more = len(locations) - 1
    return f"{first} and {format_count(more, 'other plan')} are" if more else f"{first} is"


def _find_line(survey: Survey, location: PlanLocation, styles: Iterable[str]) -> int:
    """Return the line of a plan's first entry that has one of the styles."""
    plan = survey.tree.literal(location).plan
    return find_line(survey.tree, location, next(key for key, style in plan.items() if style in styles))
