"""`migrator check`: pending rewrites and everything that no rewrite mends; the gate for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.options.source import (
    ProjectRequest,
    emit_machine_format,
    print_errors,
    read_requests,
    source_options,
)
from migrator.terminal import console
from plans.gc_paused import gc_paused

if TYPE_CHECKING:
    from codemods.tree.outcome import Outcome
    from migrator.formats.report import SourceReport

__all__ = ["command", "compute_check_exit_code", "run_check"]


@click.command("check")
@source_options
@gc_paused()
def command(
    paths: tuple[Path, ...],
    source: str | None,
    target: str | None,
    changed_only: bool,
    base_ref: str | None,
    form: str,
    quiet: bool,
) -> int:
    """Report pending rewrites and plan defects; write nothing.

    PATHS are files or folders; the default is the current folder. Exits 1 if a finding is a warning or an error, never
    for notes, and 2 if a file could not be checked.
    """
    requests = read_requests(paths, changed_only=changed_only, base_ref=base_ref, source=source, target=target)
    report = run_check(requests)
    if form != "human":
        emit_machine_format(report, form)
    elif not quiet:
        from migrator.formats.human import check_lines

        for line in check_lines(report):
            console.emit(line)
    print_errors(report.errors)
    return compute_check_exit_code(report)


def run_check(requests: Sequence[ProjectRequest]) -> SourceReport:
    """Look for pending rewrites and defects.

    Args:
        requests: what to look at.
    """
    from codemods.tree.outcome import merge_outcomes
    from migrator.formats.report import build_pending_report

    return build_pending_report(merge_outcomes([_check_project(request) for request in requests]))


def compute_check_exit_code(report: SourceReport) -> int:
    """Return 0, 1 where a finding is a warning or an error, 2 where a file could not be looked at."""
    if report.errors:
        return 2
    return 0 if report.is_clean else 1


def _check_project(request: ProjectRequest) -> Outcome:
    from codemods.checking.check import check_paths
    from codemods.tree.outcome import find_unused_comments
    from codemods.tree.selection import Suppressions

    silencer = Suppressions(request.selection)
    outcome = check_paths(request.paths, silencer, request.source, request.target)
    return replace(outcome, findings=(*outcome.findings, *find_unused_comments(silencer)))
