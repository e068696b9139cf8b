"""SARIF 2.1.0 for code scanning and editors, with fixes that make exactly the edits of `rewrite`.

The edits of one owner's plan and of its copies are one fix, with a change for each file, because they are only right
together. The fix is attached to the first of their results. Applying every fix once is the same as running `rewrite`.

Source: Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from codemods.inheritance.ownership import PlanLocation
from codemods.tree.outcome import Change, LocatedEdit, LocatedFinding, build_pending_findings
from migrator.formats.replacements import Replacement, compute_replacements
from migrator.formats.report import SourceReport
from plans.errors import MigratorError
from plans.rule import Rule, load_rules

__all__ = ["report_as_sarif"]

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_ROOT = "SRCROOT"

_Json = dict[str, object]
_Fixes = dict[PlanLocation, list[tuple[Change, Replacement]]]


def report_as_sarif(report: SourceReport, version: str) -> _Json:
    """Return a report as one SARIF run.

    Args:
        report: the report of a run that wrote nothing.
        version: migrator's version.
    """
    codes = list(load_rules())
    driver = {
        "name": "migrator",
        "semanticVersion": version,
        "rules": [_rule(rule) for rule in load_rules().values()],
    }
    run: _Json = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "newlineSequences": ["\r\n", "\n", "\r"],
        "originalUriBaseIds": {_ROOT: {"uri": Path.cwd().as_uri() + "/"}},
        "artifacts": [_artifact(change) for change in report.changes],
        "invocations": [_invocation(report.errors)],
        "results": list(_results(report, codes)),
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> _Json:
    explanation = " ".join(rule.explanation.split())
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.name.replace("-", " ")},
        "fullDescription": {"text": explanation},
        "help": {"text": f"{explanation}\n\nBefore:\n{rule.before}\nAfter:\n{rule.after}\nNext: {rule.hint}"},
        "helpUri": f"docs/rules/{rule.code}.md",
        "defaultConfiguration": {"level": rule.severity},
    }


def _artifact(change: Change) -> _Json:
    encoding = "utf-8" if change.source.encoding == "utf-8-sig" else change.source.encoding
    return {"location": _artifact_location(change.path), "encoding": encoding, "sourceLanguage": "python"}


def _invocation(errors: Iterable[MigratorError]) -> _Json:
    notifications = [_notification(error) for error in errors]
    return {"executionSuccessful": not notifications, "toolExecutionNotifications": notifications}


def _notification(error: MigratorError) -> _Json:
    path, line = error.data.get("path"), error.data.get("line")
    locations = [_location(Path(str(path)), line if isinstance(line, int) else 1)] if path else []
    message = {"text": f"{error.message}; {error.hint}"}
    return {"level": "error", "message": message, **({"locations": locations} if locations else {})}


def _results(report: SourceReport, codes: list[str]) -> Iterator[_Json]:
    fixes = _group_fixes(report.changes)
    for change in report.changes:
        for edit, located in zip(change.edits, build_pending_findings([change]), strict=True):
            fix = fixes.pop(edit.owner, None)
            yield _result(located, codes) | ({"fixes": [_fix(edit, fix)]} if fix else {})
    for located in report.findings:
        yield _result(located, codes)


def _result(located: LocatedFinding, codes: list[str]) -> _Json:
    finding = located.finding
    name = ".".join(filter(None, (located.class_name, located.attribute)))
    logical = {"logicalLocations": [{"fullyQualifiedName": name, "kind": "member"}]} if name else {}
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": finding.severity,
        "message": {"text": finding.message},
        "locations": [_location(located.path, located.line) | logical],
        # A fingerprint without the line: an entry stays the same when its line moves.
        "partialFingerprints": {"entry/v1": f"{_uri(located.path)}:{name}:{finding.key}:{finding.code}"},
        "properties": {"key": finding.key, "hint": finding.hint},
    }


def _group_fixes(changes: Iterable[Change]) -> _Fixes:
    """Group the replacements of all files by the owner whose edits they make."""
    fixes: _Fixes = {}
    for change in changes:
        for replacement in compute_replacements(change):
            fixes.setdefault(_find_owner(change, replacement), []).append((change, replacement))
    return fixes


def _find_owner(change: Change, replacement: Replacement) -> PlanLocation:
    """Return the owner of the edit in a replacement's lines, or of the nearest edit above it."""
    above = [located for located in change.edits if located.line <= replacement.end[0]]
    return max(above or change.edits[:1], key=lambda located: located.line).owner


def _fix(edit: LocatedEdit, replacements: Iterable[tuple[Change, Replacement]]) -> _Json:
    by_file: dict[Path, list[Replacement]] = {}
    for change, replacement in replacements:
        by_file.setdefault(change.path, []).append(replacement)
    return {
        "description": {"text": f"Rewrite {edit.owner.attribute} of {edit.owner.class_name} and its copies"},
        "artifactChanges": [
            {
                "artifactLocation": _artifact_location(path),
                "replacements": [_replacement(replacement) for replacement in in_file],
            }
            for path, in_file in by_file.items()
        ],
    }


def _replacement(replacement: Replacement) -> _Json:
    (start_line, start_column), (end_line, end_column) = replacement.start, replacement.end
    region = {"startLine": start_line, "startColumn": start_column, "endLine": end_line, "endColumn": end_column}
    return {"deletedRegion": region, "insertedContent": {"text": replacement.text}}


def _location(path: Path, line: int) -> _Json:
    return {"physicalLocation": {"artifactLocation": _artifact_location(path), "region": {"startLine": line}}}


def _artifact_location(path: Path) -> _Json:
    relative = path.is_relative_to(Path.cwd())
    return {"uri": _uri(path), **({"uriBaseId": _ROOT} if relative else {})}


def _uri(path: Path) -> str:
    here = Path.cwd()
    return quote(os.fsencode(path.relative_to(here).as_posix())) if path.is_relative_to(here) else path.as_uri()
