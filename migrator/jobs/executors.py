"""The work of each kind of step, by the actions that the commands call too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migrator import actions, proofs
from migrator.exit_codes import of_findings, of_validation
from migrator.jobs.interruption import interruptible
from migrator.jobs.results import ActionOutcome, StepContext
from migrator.settings import Check, Prove, Reshard, Rewrite, Validate, Verify
from plans.text import format_count

if TYPE_CHECKING:
    from migrator.formats.report import SourceReport

__all__ = ["EXECUTORS"]

_VERDICTS = {
    "checkpoint": "the same content",
    "manifest": "as the manifest records it",
    "headers": "whole, by its headers",
}
"""What a verification without differences proves, by what it compared the checkpoint with."""


def _rewrite(step: Rewrite, context: StepContext) -> ActionOutcome:
    from migrator.formats.patch import format_patch

    report = actions.rewrite(step)
    edits = sum(len(change.edits) for change in report.changes)
    verb = "rewrote" if report.written else "would rewrite"
    summary = f"{verb} {format_count(edits, 'entry', 'entries')} in {format_count(len(report.changes), 'file')}"
    outcome = _build_tree_outcome(report, actions.compute_rewrite_exit_code(report), summary)
    if report.written:
        return replace(outcome, written_files=tuple(change.path for change in report.changes))
    return replace(outcome, patch=format_patch(report.changes))


def _check(step: Check, context: StepContext) -> ActionOutcome:
    report = actions.check(step)
    findings = sum(located.finding.severity != "note" for located in report.all_findings)
    summary = format_count(findings, "finding") if findings else "clean"
    return _build_tree_outcome(report, actions.compute_check_exit_code(report), summary)


def _build_tree_outcome(report: SourceReport, code: int, summary: str) -> ActionOutcome:
    from migrator.formats.json import report_as_json

    error = report.errors[0] if report.errors else None
    return ActionOutcome(code, summary, report_as_json(report), error=error)


def _prove(step: Prove, context: StepContext) -> ActionOutcome:
    from migrator.formats.proof import format_counts, proof_as_json

    with interruptible():
        report = proofs.prove(step)
    error = report.errors[0] if report.errors else None
    code = proofs.compute_proof_exit_code(report)
    return ActionOutcome(code, format_counts(report), proof_as_json(report), error=error)


def _reshard(step: Reshard, context: StepContext) -> ActionOutcome:
    from migrator.jobs.resharding import run_step

    return run_step(step, context)


def _verify(step: Verify, context: StepContext) -> ActionOutcome:
    with interruptible():
        verification = actions.verify(step, nullcontext(context.progress))
    differences = len(verification.differences)
    summary = _VERDICTS[verification.against] if verification.ok else format_count(differences, "difference")
    return ActionOutcome(of_findings(differences), summary, verification.to_json())


def _validate(step: Validate, context: StepContext) -> ActionOutcome:
    from migrator.report.from_validation import report_validation
    from migrator.report.page import render_report

    with interruptible():
        validation = actions.validate(step)
        page = render_report(report_validation(validation.request, validation.result))
    result = validation.result
    wrong = [part for part, check in result.checks.items() if not check.ok]
    failed = [f"{part} failed, {reason}" for part, reason in result.failed.items()]
    unexercised = sum(not row.allowed for row in result.unexercised)
    gaps = f": {unexercised} not exercised" if result.verdict == "not fully proven" else ""
    verdict = "; ".join(failed) or (f"wrong: {', '.join(wrong)}" if wrong else f"{result.verdict}{gaps}")
    summary = f"{verdict} on {format_count(result.world_size, 'rank')}"
    return ActionOutcome(of_validation(result), summary, result.to_json(), page)


EXECUTORS: Mapping[type, Callable[[Any, StepContext], ActionOutcome]] = {
    Rewrite: _rewrite,
    Check: _check,
    Prove: _prove,
    Reshard: _reshard,
    Verify: _verify,
    Validate: _validate,
}
"""The function that does the work of each kind of step."""
