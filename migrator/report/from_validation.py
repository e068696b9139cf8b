"""The report of a validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migrator.report.content import Report, ReportFinding, Severity
from migrator.report.from_inspection import build_inspection_report
from plans.errors import MigratorError
from plans.text import format_numbers
from runtime.inspecting.results import Inspection

if TYPE_CHECKING:
    from runtime.validation.request import ValidationRequest
    from runtime.validation.results import ValidationResult

__all__ = ["build_validation_report", "report_validation"]

_PARTS = ("structure", "content", "forward", "backward", "generation")


def report_validation(request: ValidationRequest, result: ValidationResult) -> Report:
    """Return the report of a validation, with the checkpoint's content as far as it can be read.

    Args:
        request: the request of the validation.
        result: its result.
    """
    from runtime.checkpoint.manifest import find_manifest
    from runtime.checkpoint.open import detect_layout
    from runtime.inspecting.inspection import inspect_checkpoint

    try:
        planned = None if find_manifest(request.folder) else request.mesh
        inspection = inspect_checkpoint(request.folder, planned, request.mode)
    except MigratorError:
        # The mismatches of the result say what is wrong; the page only lacks the unreadable content.
        inspection = Inspection(request.folder, detect_layout(request.folder), "")
    return build_validation_report(inspection, result.to_json())


def build_validation_report(inspection: Inspection, result_json: Mapping[str, Any]) -> Report:
    """Return the report of a validation: its verdict and every mismatch, above the checkpoint's content.

    Args:
        inspection: the inspection of the folder that was validated.
        result_json: the validation's JSON form, as `--format json` prints it.
    """
    report = build_inspection_report(inspection)
    not_run = {*result_json["skipped"], *result_json["failed"]}
    checked = [part for part in _PARTS if result_json.get(part) and part not in not_run]
    return replace(
        report,
        title=f"{inspection.folder.name}: {result_json['verdict']}",
        summary=f"Checked {', '.join(checked) or 'nothing'} on {result_json['world_size']} ranks.",
        ok=bool(result_json["ok"]),
        facts={**{part: _describe_numbers(result_json[part]) for part in checked}, **report.facts},
        findings=(*_findings(result_json), *report.findings),
        timings=result_json.get("seconds", {}),
    )


def _findings(result_json: Mapping[str, Any]) -> Iterator[ReportFinding]:
    for part in _PARTS:
        for row in (result_json.get(part) or {}).get("mismatches", ()):
            where = "" if row["rank"] is None else f" on rank {row['rank']}"
            yield ReportFinding(
                "error", row["name"], f"{part}{where}: expected {row['expected']}, found {row['found']}"
            )
    for part, reason in result_json["failed"].items():
        yield ReportFinding("error", part, f"the model did not run: {reason}")
    for row in result_json["unexercised"]:
        where = f" on rank {format_numbers(row['ranks'])}" if row["ranks"] else ""
        severity: Severity = "note" if row["allowed"] else "warning"
        yield ReportFinding(severity, row["name"], f"not exercised{where}: {row['reason']}")
    for part, reason in result_json["skipped"].items():
        yield ReportFinding("note", part, f"skipped: {reason}")


def _describe_numbers(part: Mapping[str, Any]) -> str:
    """Return the numbers of one part of a validation, each with its name."""
    return ", ".join(_format_numbers(part)) or "checked"


def _format_numbers(part: Mapping[str, Any]) -> Iterator[str]:
    for name, value in part.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{words} {' '.join(_format_numbers(value))}"
        elif isinstance(value, (int, float, str)) and value != "":
            yield f"{words} {_format_number(value)}"


def _format_number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
