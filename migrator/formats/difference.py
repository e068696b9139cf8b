"""What `migrator diff` found, in the forms that people and other tools read."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from codemods.comparing.values import Comparison, Difference, Side
from codemods.files.sources import shown
from codemods.inheritance.effective import UNREAD
from migrator.formats.counts import counted
from migrator.formats.github import workflow_command

__all__ = ["Report", "github_lines", "human_summary", "human_table", "report_json"]

_WORDS: Mapping[str, str] = {
    "renamed": "renamed",
    "meaning": "other communication",
    "placement": "other placement",
    "added": "added",
    "removed": "removed",
    "condition": "other condition",
    "unread": "may have changed",
}
_MODELS_SHOWN = 3


@dataclass(frozen=True)
class Report:
    """A comparison and what of it is accepted.

    Args:
        comparison: what was found.
        base: the first revision, as the user calls it.
        head: the second.
        root: the repository.
        allowed: models whose changes are accepted.
    """

    comparison: Comparison
    base: str
    head: str
    root: Path
    allowed: frozenset[str]

    @cached_property
    def failing(self) -> tuple[Difference, ...]:
        """The changes on the mesh that nothing explains and nobody accepted."""
        return tuple(filter(self.fails, self.comparison.differences))

    def fails(self, difference: Difference) -> bool:
        """Say whether a difference changes the mesh, unexplained and not accepted."""
        return difference.changes_mesh and not difference.explained and difference.model not in self.allowed

    @property
    def workspace(self) -> Path:
        """The folder that GitHub counts paths from."""
        return Path(os.environ.get("GITHUB_WORKSPACE") or self.root)


def human_table(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """Return a title, columns and rows: alike differences of many models are one row, failing ones come first."""
    models: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for difference in sorted(report.comparison.differences, key=report.fails, reverse=True):
        models[_row(report, difference)][difference.model] = None
    rows = [[*row, _models(list(names))] for row, names in models.items()]
    return (
        f"{report.base} → {report.head}, {' → '.join(dict.fromkeys(report.comparison.dialects))}",
        ["", "plan", "key", "style", "placement", "models"],
        rows,
    )


def human_summary(report: Report) -> Iterator[str]:
    """Yield a line for each failing difference that is inherited, and one on the whole comparison."""
    for difference in report.failing:
        yield f"unexplained {_where(difference.side)} {_message(difference)}"
    differences = report.comparison.differences
    if not differences:
        yield f"no plan differs between {report.base} and {report.head}"
        return
    kinds = Counter(_WORDS[difference.kind] for difference in differences)
    counts = ", ".join(f"{kinds[word]:,} {word}" for word in _WORDS.values() if kinds[word])
    classes = {(difference.place.path, difference.place.class_name) for difference in differences}
    entries = counted(len(differences), "entry", "entries")
    yield f"{entries} of {counted(len(classes), 'class', 'classes')}: {counts}; {len(report.failing):,} unexplained"


def github_lines(report: Report) -> Iterator[str]:
    """Yield an annotation for every change on the mesh: an error where it is unexplained, else a notice."""
    for difference in report.comparison.differences:
        if difference.changes_mesh:
            level = "error" if report.fails(difference) else "notice"
            path = os.path.relpath(report.root / difference.side.path, report.workspace)
            properties = {"file": path.replace(os.sep, "/"), "line": str(difference.side.line), "title": "plan diff"}
            yield workflow_command(level, properties, _message(difference))
    for error in report.comparison.errors:
        yield workflow_command("error", {"title": type(error).__name__}, f"{error.message}\n{error.hint}")


def report_json(report: Report) -> dict[str, object]:
    """Return a report as JSON values; paths count from the repository's top folder."""
    comparison = report.comparison
    return {
        "base": report.base,
        "head": report.head,
        "dialects": list(comparison.dialects),
        "files": comparison.files,
        "unexplained": len(report.failing),
        "differences": [_difference_json(report, difference) for difference in comparison.differences],
        "errors": [error.to_json() for error in comparison.errors],
    }


def _difference_json(report: Report, difference: Difference) -> dict[str, object]:
    return {
        "model": difference.model,
        "path": difference.place.path.as_posix(),
        "class": difference.place.class_name,
        "plan": difference.place.plan,
        "moved_from": difference.moved_from.plan if difference.moved_from else None,
        "key": difference.key,
        "change": difference.kind,
        "before": _side_json(difference.before),
        "after": _side_json(difference.after),
        "explained": difference.explained,
        "allowed": difference.model in report.allowed,
    }


def _side_json(side: Side | None) -> dict[str, object] | None:
    if side is None:
        return None
    return {
        "style": side.style,
        "placement": side.reading.placement,
        "meaning": side.reading.meaning,
        "path": side.path.as_posix(),
        "line": side.line,
    }


def _row(report: Report, difference: Difference) -> tuple[str, ...]:
    word = _WORDS[difference.kind]
    return (
        f"{word}, unexplained" if report.fails(difference) else word,
        _plans(difference),
        difference.key,
        _styles(difference),
        _placements(difference),
    )


def _message(difference: Difference) -> str:
    """Say whose entry changed how."""
    if difference.kind == "unread":
        named = "" if difference.key == UNREAD else f" {difference.key}"
        plan = f"{difference.place.class_name}.{difference.place.plan}{named}"
        return f"{plan} in {difference.model} may have changed: what it is made of did and cannot be read, look there"
    entry = f"{difference.place.class_name}.{_plans(difference)} {difference.key}"
    inherited = "" if difference.side.path == difference.place.path else f" in {difference.model}, which inherits it"
    return f"{entry}{inherited}: {_styles(difference)}, {_placements(difference)}"


def _plans(difference: Difference) -> str:
    return _change((difference.moved_from or difference.place).plan, difference.place.plan)


def _styles(difference: Difference) -> str:
    before, after = difference.before, difference.after
    return _change(before.style or "computed" if before else None, after.style or "computed" if after else None)


def _placements(difference: Difference) -> str:
    before, after = difference.before, difference.after
    return _change(before.reading.placement if before else None, after.reading.placement if after else None)


def _change(before: str | None, after: str | None) -> str:
    return before or "" if before == after else f"{before or 'none'} → {after or 'none'}"


def _models(names: list[str]) -> str:
    more = len(names) - _MODELS_SHOWN
    return ", ".join(names[:_MODELS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _where(side: Side) -> str:
    return f"{shown(side.path)}:{side.line}"
