"""`migrator check`: pending rewrites, and defects that no rewrite fixes; the gate for CI."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.actions import check, compute_check_exit_code
from migrator.options.source import emit_machine_format, print_errors, source_options
from migrator.settings import Check
from migrator.terminal import console
from plans.gc_paused import gc_paused

__all__ = ["command"]


@click.command("check")
@source_options
@gc_paused()
def command(
    paths: tuple[Path, ...],
    source: str | None,
    target: str | None,
    changed_only: bool,
    base_ref: str | None,
    output_format: str,
    quiet: bool,
) -> int:
    """Report pending rewrites and plan defects; write nothing.

    PATHS are files or folders; the default is the current folder. Exits 1 if a finding is a warning or an error, never
    for notes, and 2 if a file could not be checked.
    """
    report = check(Check(paths, source, target), changed_only=changed_only, base_ref=base_ref)
    if output_format != "human":
        emit_machine_format(report, output_format)
    elif not quiet:
        from migrator.formats.human import check_lines

        for line in check_lines(report):
            console.emit(line)
    print_errors(report.errors)
    return compute_check_exit_code(report)
