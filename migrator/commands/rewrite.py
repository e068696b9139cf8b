"""`migrator rewrite`: plan literals in model source, owners first, then every generated copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.actions import compute_rewrite_exit_code, rewrite
from migrator.exit_codes import of_findings
from migrator.options.source import emit_machine_format, print_errors, source_options
from migrator.settings import Rewrite
from migrator.terminal import console
from plans.errors import UsageError
from plans.gc_paused import gc_paused

if TYPE_CHECKING:
    from migrator.formats.report import SourceReport

__all__ = ["command"]


@click.command("rewrite")
@source_options
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if anything would change.")
@click.option("--diff", is_flag=True, help="Write nothing; print a patch that `git apply` takes.")
@click.option("--verify", is_flag=True, help="Write only if the tree's own modular converter produces the same files.")
@gc_paused()
def command(
    paths: tuple[Path, ...],
    target: str | None,
    source: str | None,
    check: bool,
    diff: bool,
    verify: bool,
    changed_only: bool,
    base_ref: str | None,
    output_format: str,
    quiet: bool,
) -> int:
    """Rewrite plan literals to the param-level form or another target.

    PATHS are files or folders; the default is the current folder. Owners are rewritten first, then every generated
    copy, and nothing else. Expert layouts that the param-level styles cannot describe are left alone, with a note that
    says why.
    """
    _refuse_contradictions(check=check, diff=diff, output_format=output_format)
    settings = Rewrite(paths, source, target, verify=verify, in_place=not (check or diff))
    report = rewrite(settings, changed_only=changed_only, base_ref=base_ref)
    if output_format != "human":
        emit_machine_format(report, output_format)
    else:
        _show_report(report, diff=diff, quiet=quiet)
    print_errors(report.errors)
    return compute_rewrite_exit_code(report) or of_findings(check and report.changes)


def _show_report(report: SourceReport, *, diff: bool, quiet: bool) -> None:
    from migrator.formats.human import rewrite_lines, rewrite_summary

    if diff:
        from migrator.formats.patch import format_patch

        console.emit_bytes(format_patch(report.changes))
    if quiet:
        return
    for line in () if diff else rewrite_lines(report):
        console.emit(line)
    for line in rewrite_summary(report):
        (console.say if diff else console.emit)(line)


def _refuse_contradictions(*, check: bool, diff: bool, output_format: str) -> None:
    if diff and output_format != "human":
        raise UsageError(
            f"--diff prints a patch, which is not --format {output_format}",
            hint="leave one of them out",
            format=output_format,
        )
    if output_format in ("github", "sarif") and not check:
        raise UsageError(
            f"--format {output_format} lists pending edits, but without --check they are made",
            hint="add --check, or use `migrator check`",
            format=output_format,
        )
