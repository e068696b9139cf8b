"""`migrator check`: pending rewrites and everything that no rewrite mends; the gate for CI."""

from __future__ import annotations

import gc
from pathlib import Path

import click

from migrator import console
from migrator.source_options import emit_machine_format, read_request, report_errors, source_options
from plans.errors import UsageError

__all__ = ["command"]


@click.command("check")
@source_options
def command(
    paths: tuple[Path, ...], source: str | None, changed_only: bool, base_ref: str | None, form: str, quiet: bool
) -> int:
    """Report pending rewrites and plan defects below PATHS (files or folders, by default here); write nothing.

    Exits 1 where a finding is a warning or an error, never for notes, and 2 where a file could not be looked at.
    """
    gc.disable()  # for the same reason as in rewrite
    from codemods.check import check_paths
    from codemods.pending import unused_comments
    from codemods.selection import Silencer
    from migrator.formats.report import pending_report
    from plans.dialect import PARAM_LEVEL

    request = read_request(paths, changed_only=changed_only, base_ref=base_ref, source=source)
    if request.target != PARAM_LEVEL:
        raise UsageError(
            f"check knows what is pending for the target {PARAM_LEVEL} only, not for {request.target!r}",
            hint=f"use `migrator rewrite --check --target {request.target}` for what is pending",
            target=request.target,
        )
    silencer = Silencer(request.selection)
    outcome = check_paths(request.paths, silencer, request.source)
    report = pending_report(outcome, unused_comments(silencer))
    if form != "human":
        emit_machine_format(report, form)
    elif not quiet:
        from migrator.formats.human import check_lines

        for line in check_lines(report):
            console.emit(line)
    report_errors(report.errors)
    if report.errors:
        return 2
    return 0 if report.is_clean else 1
