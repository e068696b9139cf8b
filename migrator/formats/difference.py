"""The result of `migrator diff` as a table, as JSON and as GitHub annotations."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from codemods.comparing.pipeline import PIPELINE_PLAN
from codemods.comparing.results import Comparison, PipelineDifference, PlanDifference, Side, name_model
from codemods.files.sources import format_path
from codemods.inheritance.effective import UNRESOLVED
from migrator.formats.github import format_workflow_command
from plans.text import format_count

__all__ = ["DiffReport", "build_diff_table", "diff_as_json", "diff_github_lines", "diff_summary_lines"]

_KIND_LABELS: Mapping[str, str] = {
    "renamed": "renamed",
    "meaning": "other communication",
    "placement": "other placement",
    "added": "added",
    "removed": "removed",
    "condition": "other condition",
    "unread": "may have changed",
}
_MAX_MODELS = 3


@dataclass(frozen=True)
class DiffReport:
    """A comparison, and the models whose changes the user accepts.

    Args:
        comparison: the differences between the two revisions.
        base: the first revision, as the user names it.
        head: the second revision, as the user names it.
        root: the top folder of the repository.
        allowed: the models whose changes are accepted.
    """

    comparison: Comparison
    base: str
    head: str
    root: Path
    allowed: frozenset[str]

    @cached_property
    def failing(self) -> tuple[PlanDifference, ...]:
        """The changes on the mesh that are neither explained nor accepted."""
        return tuple(filter(self.is_failing, self.comparison.differences))

    def is_failing(self, difference: PlanDifference) -> bool:
        """Return whether a difference changes the mesh and is neither explained nor accepted."""
        return difference.changes_mesh and not difference.explained and difference.model not in self.allowed

    @property
    def workspace(self) -> Path:
        """The folder that paths in GitHub annotations are relative to."""
        return Path(os.environ.get("GITHUB_WORKSPACE") or self.root)


def build_diff_table(report: DiffReport) -> tuple[str, list[str], list[list[str]]]:
    """Return a title, columns and rows: failing differences first, equal ones of several models in a row."""
    models: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for difference in sorted(report.comparison.differences, key=report.is_failing, reverse=True):
        models[_build_row(report, difference)][difference.model] = None
    rows = [[*row, _format_models(list(names))] for row, names in models.items()]
    return (
        f"{report.base} → {report.head}, {' → '.join(dict.fromkeys(report.comparison.dialects))}",
        ["", "plan", "key", "style", "placement", "models"],
        rows,
    )


def diff_summary_lines(report: DiffReport) -> Iterator[str]:
    """Yield a line for each failing difference, and a summary."""
    for difference in report.failing:
        yield f"unexplained {_format_location(difference.side)} {_describe_difference(difference)}"
    yield from (f"note {_describe_pipeline(difference)}" for difference in report.comparison.pipeline)
    differences = report.comparison.differences
    if not differences:
        other = "other " if report.comparison.pipeline else ""
        yield f"no {other}plan differs between {report.base} and {report.head}"
        return
    kinds = Counter(_KIND_LABELS[difference.kind] for difference in differences)
    counts = ", ".join(f"{kinds[word]:,} {word}" for word in _KIND_LABELS.values() if kinds[word])
    classes = {(difference.variant.path, difference.variant.class_name) for difference in differences}
    of_classes = format_count(len(classes), "class", "classes")
    entries = format_count(len(differences), "entry", "entries")
    yield f"{entries} of {of_classes}: {counts}; {len(report.failing):,} unexplained"


def diff_github_lines(report: DiffReport) -> Iterator[str]:
    """Yield an annotation for each change on the mesh: an error if it fails the comparison, else a notice."""
    for difference in report.comparison.differences:
        if difference.changes_mesh:
            level = "error" if report.is_failing(difference) else "notice"
            path = os.path.relpath(report.root / difference.side.path, report.workspace)
            properties = {"file": path.replace(os.sep, "/"), "line": str(difference.side.line), "title": "plan diff"}
            yield format_workflow_command(level, properties, _describe_difference(difference))
    for change in report.comparison.pipeline:
        path = os.path.relpath(report.root / change.written_in, report.workspace)
        properties = {"file": path.replace(os.sep, "/"), "line": str(change.line), "title": "plan diff"}
        yield format_workflow_command("notice", properties, _describe_pipeline(change))
    for error in report.comparison.errors:
        yield format_workflow_command("error", {"title": type(error).__name__}, f"{error.message}\n{error.hint}")


def diff_as_json(report: DiffReport) -> dict[str, object]:
    """Return a report as JSON values; paths are relative to the repository's top folder."""
    comparison = report.comparison
    return {
        "base": report.base,
        "head": report.head,
        "dialects": list(comparison.dialects),
        "files": comparison.files,
        "excluded": [path.as_posix() for path in comparison.excluded],
        "unexplained": len(report.failing),
        "differences": [_difference_as_json(report, difference) for difference in comparison.differences],
        "pipeline": [_pipeline_as_json(difference) for difference in comparison.pipeline],
        "errors": [error.to_json() for error in comparison.errors],
    }


def _pipeline_as_json(difference: PipelineDifference) -> dict[str, object]:
    return {
        "model": name_model(difference.path),
        "path": difference.path.as_posix(),
        "class": difference.class_name,
        "plan": PIPELINE_PLAN,
        "key": difference.key,
        "before": difference.before,
        "after": difference.after,
        "written_in": difference.written_in.as_posix(),
        "line": difference.line,
    }


def _difference_as_json(report: DiffReport, difference: PlanDifference) -> dict[str, object]:
    return {
        "model": difference.model,
        "path": difference.variant.path.as_posix(),
        "class": difference.variant.class_name,
        "plan": difference.variant.plan,
        "moved_from": difference.moved_from.plan if difference.moved_from else None,
        "key": difference.key,
        "change": difference.kind,
        "before": _side_as_json(difference.before),
        "after": _side_as_json(difference.after),
        "explained": difference.explained,
        "allowed": difference.model in report.allowed,
    }


def _side_as_json(side: Side | None) -> dict[str, object] | None:
    if side is None:
        return None
    return {
        "style": side.style,
        "placement": side.effect.placement,
        "meaning": side.effect.meaning,
        "path": side.path.as_posix(),
        "line": side.line,
    }


def _build_row(report: DiffReport, difference: PlanDifference) -> tuple[str, ...]:
    word = _KIND_LABELS[difference.kind]
    return (
        f"{word}, unexplained" if report.is_failing(difference) else word,
        _format_plans(difference),
        difference.key,
        _format_styles(difference),
        _format_placements(difference),
    )


def _describe_difference(difference: PlanDifference) -> str:
    """Return which class's entry changed, and how."""
    if difference.kind == "unread":
        named = "" if difference.key == UNRESOLVED else f" {difference.key}"
        plan = f"{_format_owner(difference)}{difference.variant.plan}{named}"
        reason = "something it is built from did, and cannot be read; look there"
        return f"{plan} in {difference.model} may have changed: {reason}"
    entry = f"{_format_owner(difference)}{_format_plans(difference)} {difference.key}"
    inherited = "" if difference.side.path == difference.variant.path else f" in {difference.model}, which inherits it"
    return f"{entry}{inherited}: {_format_styles(difference)}, {_format_placements(difference)}"


def _describe_pipeline(difference: PipelineDifference) -> str:
    """Return which class's pipeline plan changed, how, and that nothing follows from it."""
    entry = f"{difference.class_name}.{PIPELINE_PLAN} {difference.key}".rstrip()
    change = _format_change(difference.before, difference.after)
    return (
        f"{format_path(difference.written_in)}:{difference.line} {entry}: {change}; no release of transformers splits "
        "stages by it"
    )


def _format_owner(difference: PlanDifference) -> str:
    """Return the class before a plan's name; nothing for a plan outside of classes."""
    return f"{difference.variant.class_name}." if difference.variant.class_name else ""


def _format_plans(difference: PlanDifference) -> str:
    return _format_change((difference.moved_from or difference.variant).plan, difference.variant.plan)


def _format_styles(difference: PlanDifference) -> str:
    before, after = difference.before, difference.after
    return _format_change(before.style or "computed" if before else None, after.style or "computed" if after else None)


def _format_placements(difference: PlanDifference) -> str:
    before, after = difference.before, difference.after
    return _format_change(before.effect.placement if before else None, after.effect.placement if after else None)


def _format_change(before: str | None, after: str | None) -> str:
    return before or "" if before == after else f"{before or 'none'} → {after or 'none'}"


def _format_models(names: list[str]) -> str:
    more = len(names) - _MAX_MODELS
    return ", ".join(names[:_MAX_MODELS]) + (f" and {more} more" if more > 0 else "")


def _format_location(side: Side) -> str:
    return f"{format_path(side.path)}:{side.line}"
