"""The work of each kind of step, by the functions that the commands call; what comes of it is a plain value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migrator.jobs.cache_key import locate_checkpoint
from migrator.jobs.interruption import interruptible
from migrator.jobs.results import ActionOutcome, StepContext
from migrator.jobs.steps import Check, Reshard, Rewrite, Validate, Verify
from migrator.options.external import read_external_settings
from plans.text import format_count

if TYPE_CHECKING:
    from migrator.formats.report import SourceReport

__all__ = ["EXECUTORS"]

_MIB = 2**20
_COMPARED_WITH = {
    "checkpoint": "the same content",
    "manifest": "as the manifest records it",
    "headers": "whole, by its headers",
}


def _rewrite(step: Rewrite, context: StepContext) -> ActionOutcome:
    from migrator.commands.rewrite import compute_rewrite_exit_code, run_rewrite
    from migrator.formats.patch import format_patch
    from migrator.options.source import read_requests

    requests = read_requests(step.paths, changed_only=False, base_ref=None, source=step.source, target=step.target)
    report = run_rewrite(requests, write=step.in_place, verify=step.verify)
    edits = sum(len(change.edits) for change in report.changes)
    did = "rewrote" if report.written else "would rewrite"
    said = f"{did} {format_count(edits, 'entry', 'entries')} in {format_count(len(report.changes), 'file')}"
    written = tuple(change.path for change in report.changes) if report.written else ()
    pending = None if report.written else format_patch(report.changes)
    return replace(
        _build_tree_outcome(report, compute_rewrite_exit_code(report), said), patch=pending, written_files=written
    )


def _check(step: Check, context: StepContext) -> ActionOutcome:
    from migrator.commands.check import compute_check_exit_code, run_check
    from migrator.options.source import read_requests

    requests = read_requests(step.paths, changed_only=False, base_ref=None, source=step.source, target=step.target)
    report = run_check(requests)
    found = sum(one.finding.severity != "note" for one in report.all_findings)
    return _build_tree_outcome(
        report, compute_check_exit_code(report), format_count(found, "finding") if found else "clean"
    )


def _build_tree_outcome(report: SourceReport, code: int, summary: str) -> ActionOutcome:
    from migrator.formats.json import report_as_json

    error = report.errors[0] if report.errors else None
    return ActionOutcome(code, summary, report_as_json(report), error=error)


def _reshard(step: Reshard, context: StepContext) -> ActionOutcome:
    from migrator.jobs.resharding import run_reshard

    return run_reshard(step, context)


def _verify(step: Verify, context: StepContext) -> ActionOutcome:
    from runtime.checkpoint.verifying.verify import verify

    with interruptible():
        folders = [locate_checkpoint(text) for text in (step.source, step.other) if text is not None]
        foreign = read_external_settings(step, step.source)
        found = verify(*folders, max_memory=step.max_memory * _MIB, progress=context.progress, external=foreign)
    said = _COMPARED_WITH[found.against] if found.ok else format_count(len(found.differences), "difference")
    return ActionOutcome(0 if found.ok else 1, said, found.to_json())


def _validate(step: Validate, context: StepContext) -> ActionOutcome:
    from migrator.commands.validate import build_report
    from migrator.report.page import render_report
    from runtime.validation.request import ValidationRequest, resolve_mesh
    from runtime.validation.worker import run_validation

    with interruptible():
        folder, reference = (
            locate_checkpoint(step.source),
            locate_checkpoint(step.reference) if step.reference else None,
        )
        sizes = {axis: size for axis in ("tp", "ep", "fsdp") if (size := getattr(step, axis)) is not None}
        mesh, mode = resolve_mesh(folder, sizes, step.mode)
        request = ValidationRequest(folder, mesh, mode, reference, step.device, step.tolerance, step.timeout)
        result = run_validation(request)
        page = render_report(build_report(request, result))
    wrong = [part for part, check in result.checks.items() if not check.ok]
    verdict = "proven" if result.ok else f"wrong: {', '.join(wrong)}" if wrong else "not proven"
    said = f"{verdict} on {format_count(result.world_size, 'rank')}"
    return ActionOutcome(0 if result.ok else 1, said, result.to_json(), page)


EXECUTORS: Mapping[type, Callable[[Any, StepContext], ActionOutcome]] = {
    Rewrite: _rewrite,
    Check: _check,
    Reshard: _reshard,
    Verify: _verify,
    Validate: _validate,
}
"""What does each kind of step."""
