"""A report of what a validation proved, or did not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from migrator.report.from_inspection import inspection_report
from migrator.report.values import Finding, Report
from runtime.inspecting.values import Inspection

__all__ = ["validation_report"]

_PARTS = ("structure", "content", "forward", "backward", "generation")


def validation_report(found: Inspection, answer: Mapping[str, Any]) -> Report:
    """Return the report of a validation: its verdict and every mismatch, above what the checkpoint holds.

    Args:
        found: `runtime.inspecting.inspection.inspect_checkpoint` of the folder that was validated.
        answer: the validation's JSON form, as `--format json` prints it.
    """
    told = inspection_report(found)
    ok = bool(answer["ok"])
    proven = [part for part in _PARTS if answer.get(part) and part not in answer["skipped"]]
    return replace(
        told,
        title=f"{found.folder.name}: {'proven' if ok else 'not as it must be'}",
        summary=f"Looked at {', '.join(proven) or 'nothing'} on {answer['world_size']} ranks.",
        ok=ok,
        facts={**{part: _said(answer[part]) for part in proven}, **told.facts},
        findings=(*_findings(answer), *told.findings),
        timings=answer.get("seconds", {}),
    )


def _findings(answer: Mapping[str, Any]) -> Iterator[Finding]:
    for part in _PARTS:
        for row in (answer.get(part) or {}).get("mismatches", ()):
            where = "" if row["rank"] is None else f" on rank {row['rank']}"
            yield Finding("error", row["name"], f"{part}{where}: expected {row['expected']}, found {row['found']}")
    for part, reason in answer["skipped"].items():
        yield Finding("note", part, f"skipped: {reason}")


def _said(part: Mapping[str, Any]) -> str:
    """Return the numbers of one part of a validation, each with its name."""
    return ", ".join(_numbers(part)) or "looked at"


def _numbers(part: Mapping[str, Any]) -> Iterator[str]:
    for name, value in part.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{words} {' '.join(_numbers(value))}"
        elif isinstance(value, (int, float, str)) and value != "":
            yield f"{words} {_number(value)}"


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
