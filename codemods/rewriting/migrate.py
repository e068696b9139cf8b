"""A tree through the rules: plans found, grouped under their owners, every edit computed before one is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from codemods.files.sources import add_once, read_source, shown
from codemods.inheritance.ownership import Place, Tree
from codemods.reading.literals import read_module
from codemods.rewriting.decisions import Decided, OwnedEdits, anchor_of, line_of, lines_of, settle
from codemods.rewriting.propagate import Family, Transform, Verdict, families, judge
from codemods.rewriting.rewrite import rewrite_source
from codemods.rewriting.transform import to_dialect, to_param_level
from codemods.tree.detect import Detected, detect, source_dialect, version_file
from codemods.tree.outcome import Change, Located, LocatedEdit, Outcome
from codemods.tree.selection import Silencer
from codemods.tree.survey import Survey, Wanted, every_plan, expert_plans, survey
from codemods.tree.unread import unread_findings
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.errors import MigratorError
from plans.rule import Finding, rule

__all__ = ["decide", "outcome", "plan_rewrites", "tree_dialect"]


def plan_rewrites(
    paths: Sequence[Path], silencer: Silencer | None = None, target: str = PARAM_LEVEL, source: str = "auto"
) -> Outcome:
    """Compute every rewrite below the paths; nothing is written.

    Args:
        paths: files and folders.
        silencer: says what of them is spoken of and what is ignored; without it everything is said.
        target: the dialect to write; `param-level` decomposes expert entries and leaves all else.
        source: the dialect that the tree speaks, `auto` to find out.

    Raises:
        UsageError: a path or a dialect does not exist.
    """
    if source != "auto":
        source_dialect(source)  # refuses a name that no tree speaks, also where the target asks for none
    if target == PARAM_LEVEL:
        found = survey(paths, expert_plans, silencer, skims=True)
        result = outcome(found, decide(found))
        return replace(result, errors=tuple(_with_unparsable(found, result)))
    found = survey(paths, every_plan, silencer)
    spoken = tree_dialect(paths, found, source)
    decided = decide(found, partial(to_dialect, load_dialect(spoken.dialect), load_dialect(target)), every_plan)
    return replace(outcome(found, decided), dialects=(spoken,))


def _with_unparsable(found: Survey, result: Outcome) -> list[MigratorError]:
    """Return the errors of a run once what was read without a parser is parsed, but for what changes, which was."""
    errors = list(result.errors)
    for path in sorted({place.path for place in found.places} - {change.path for change in result.changes}):
        try:
            if path in found.reachable:
                read_module(found.tree.source(path))
        except MigratorError as error:
            add_once(errors, error)
    return errors


def tree_dialect(paths: Sequence[Path], found: Survey, source: str = "auto") -> Detected:
    """Return the dialect that a tree speaks, as asked for or found out, with the reason."""
    if source != "auto":
        return Detected(source_dialect(source).name, "asked for")
    styles = {style for place in found.places for style in found.tree.literal(place).plan.values()}
    telling = next(filter(version_file, paths), None)
    return detect(telling or next(iter(paths), Path()), styles)


def outcome(found: Survey, decided: Decided, *, every_unread: bool = False) -> Outcome:
    """Return the files that the edits make, and the findings below the given paths, with their lines.

    Args:
        found: the tree.
        decided: its edits and findings.
        every_unread: whether to name every use of a plan that cannot be read, not only those beside experts.
    """
    changes = sorted(_changes(found, decided.edits), key=lambda change: (change.role == "copy", change.path))
    said = (
        _located(found.tree, place, finding)
        for place, finding in decided.findings
        if place.path in found.reachable and not _is_silent(found, place, finding)
    )
    links = filter(None, map(_about_link, found.links))
    quiet = found.silencer.selection.configuration.ignores
    unread = (
        Located(path, use.line, use.class_name, use.attribute, finding)
        for path, use, finding in unread_findings(found, experts_only=not every_unread)
    )
    kept = [*said, *unread, *(link for link in links if not quiet(link.path, link.finding.code))]
    return Outcome(tuple(changes), tuple(kept), tuple(found.errors), len(found.below), found.plan_files)


def _is_silent(found: Survey, place: Place, finding: Finding) -> bool:
    return found.silencer.is_silent(place.path, lines_of(found.tree, place, finding.key), finding.code)


def _about_link(link: Path) -> Located | None:
    """Say of a link out of the given paths that the plans behind it are left alone."""
    try:
        leads_to_plans = expert_plans.in_file(read_source(link).data)
    except MigratorError:
        return None
    where = shown(link.resolve())
    finding = Finding("MIG305", link.name, rule("MIG305").message.format(key=link.name, where=where))
    return Located(link, 1, "", "", finding) if leads_to_plans else None


def decide(found: Survey, transform: Transform = to_param_level, wanted: Wanted = expert_plans) -> Decided:
    """Decide the edits of every family of plans, and say what a person should know.

    Args:
        found: the tree.
        transform: works out what becomes of a family.
        wanted: which plans it speaks of.
    """
    places = [place for place in found.places if wanted.literal(found.tree.literal(place))]
    touches = found.silencer.selection.touches
    groups, lost = families(found.tree, places, found.errors)
    verdicts: list[tuple[Family, Verdict]] = []
    for family in groups:
        if not touches(place.path for place in family.places):
            continue
        try:
            verdicts.append((family, judge(found.tree, family, found.out_of_reach, transform)))
        except MigratorError as error:
            found.errors.append(error)
    loose = set(places).difference(place for family in groups for place in family.places)
    decided = settle(found.tree, verdicts, found.silencer, loose)
    about_lost = [(place, finding) for place, finding in lost if touches([place.path])]
    return replace(decided, findings=[*about_lost, *decided.findings])


def _located(tree: Tree, place: Place, finding: Finding) -> Located:
    return Located(place.path, line_of(tree, place, finding.key), place.class_name, place.attribute, finding)


def _changes(found: Survey, edits: Mapping[Place, OwnedEdits]) -> list[Change]:
    """Compute every file's new bytes; where one fails, all that belongs to its owners is given up."""
    by_file: dict[Path, dict[Place, OwnedEdits]] = defaultdict(dict)
    for place, wanted in edits.items():
        by_file[place.path][place] = wanted
    changes: list[Change] = []
    broken: set[Place] = set()
    for path, wanted_here in by_file.items():
        try:
            changes.append(_change(found.tree, path, wanted_here))
        except MigratorError as error:
            found.errors.append(error)
            broken |= {owner for owner, _ in wanted_here.values()}
    if not broken:
        return changes
    return _changes(found, {place: owned for place, owned in edits.items() if owned[0] not in broken})


def _change(tree: Tree, path: Path, edits: Mapping[Place, OwnedEdits]) -> Change:
    source = tree.source(path)
    literals = [(tree.literal(place), wanted) for place, (_, wanted) in edits.items()]
    data = rewrite_source(source, tree.module(path), literals)
    located = tuple(
        LocatedEdit(line_of(tree, place, anchor_of(edit)), place.class_name, place.attribute, edit, owner)
        for place, (owner, wanted) in edits.items()
        for edit in wanted
    )
    return Change(source, data, "copy" if source.generated_from else "owner", located)
