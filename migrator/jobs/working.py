"""The work of each kind of step, by the functions that the commands call; what comes of it is a plain value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migrator.formats.counts import counted
from migrator.jobs.answers import Answer, Task
from migrator.jobs.foreign import foreign_of
from migrator.jobs.identity import located
from migrator.jobs.stopping import interruptible
from migrator.jobs.values import Check, Reshard, Rewrite, Validate, Verify

if TYPE_CHECKING:
    from migrator.formats.report import Report

__all__ = ["WORK"]

_MIB = 2**20
_AGAINST = {
    "checkpoint": "the same content",
    "manifest": "as the manifest records it",
    "headers": "whole, by its headers",
}


def _rewrite(step: Rewrite, task: Task) -> Answer:
    from migrator.commands.rewrite import exit_code, rewritten
    from migrator.patch import patch
    from migrator.source_options import read_requests

    requests = read_requests(step.paths, changed_only=False, base_ref=None, source=step.source, target=step.target)
    report = rewritten(requests, writes=step.in_place, verifies=step.verify)
    edits = sum(len(change.edits) for change in report.changes)
    did = "rewrote" if report.written else "would rewrite"
    said = f"{did} {counted(edits, 'entry', 'entries')} in {counted(len(report.changes), 'file')}"
    written = tuple(change.path for change in report.changes) if report.written else ()
    pending = None if report.written else patch(report.changes)
    return replace(_of_tree(report, exit_code(report), said), patch=pending, written=written)


def _check(step: Check, task: Task) -> Answer:
    from migrator.commands.check import checked, exit_code
    from migrator.source_options import read_requests

    requests = read_requests(step.paths, changed_only=False, base_ref=None, source=step.source, target=step.target)
    report = checked(requests)
    found = sum(one.finding.severity != "note" for one in report.everything)
    return _of_tree(report, exit_code(report), counted(found, "finding") if found else "clean")


def _of_tree(report: Report, code: int, said: str) -> Answer:
    from migrator.formats.json import report_json

    error = report.errors[0] if report.errors else None
    return Answer(code, said, report_json(report), error=error)


def _reshard(step: Reshard, task: Task) -> Answer:
    from migrator.jobs.resharding import resharded

    return resharded(step, task)


def _verify(step: Verify, task: Task) -> Answer:
    from runtime.checkpoint.verifying.verify import verify

    with interruptible():
        folders = [located(text) for text in (step.source, step.other) if text is not None]
        foreign = foreign_of(step).read(step.source)
        found = verify(*folders, max_memory=step.max_memory * _MIB, progress=task.progress, foreign=foreign)
    said = _AGAINST[found.against] if found.ok else counted(len(found.differences), "difference")
    return Answer(0 if found.ok else 1, said, found.to_json())


def _validate(step: Validate, task: Task) -> Answer:
    from migrator.commands.validate import page_of
    from migrator.report.page import render
    from runtime.validation.request import ValidationRequest, wanted_mesh
    from runtime.validation.worker import run_validation

    with interruptible():
        folder, reference = located(step.source), located(step.reference) if step.reference else None
        sizes = {axis: size for axis in ("tp", "ep", "fsdp") if (size := getattr(step, axis)) is not None}
        mesh, mode = wanted_mesh(folder, sizes, step.mode)
        request = ValidationRequest(folder, mesh, mode, reference, step.device, step.tolerance, step.timeout)
        result = run_validation(request)
        page = render(page_of(request, result))
    wrong = [part for part, check in result.checks.items() if not check.ok]
    verdict = "proven" if result.ok else f"wrong: {', '.join(wrong)}" if wrong else "not proven"
    said = f"{verdict} on {counted(result.world_size, 'rank')}"
    return Answer(0 if result.ok else 1, said, result.to_json(), page)


WORK: Mapping[type, Callable[[Any, Task], Answer]] = {
    Rewrite: _rewrite,
    Check: _check,
    Reshard: _reshard,
    Verify: _verify,
    Validate: _validate,
}
"""What does each kind of step."""
