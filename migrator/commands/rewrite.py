"""`migrator rewrite`: plan literals in model source, owners first, then every generated copy."""

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
from plans.errors import MigratorError, MismatchError, UsageError
from plans.gc_paused import gc_paused

if TYPE_CHECKING:
    from codemods.tree.outcome import Outcome
    from migrator.formats.report import SourceReport

__all__ = ["command", "compute_rewrite_exit_code", "run_rewrite"]


@click.command("rewrite")
@source_options
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if anything would change.")
@click.option("--diff", is_flag=True, help="Write nothing; print a patch that `git apply` takes.")
@click.option("--verify", is_flag=True, help="First demand that the tree's own modular converter writes the same.")
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
    form: str,
    quiet: bool,
) -> int:
    """Rewrite plan literals to the param-level form or another target.

    PATHS are files or folders; the default is the current folder. Owners are rewritten first, then every generated
    copy, and nothing else. Expert layouts that the param-level styles cannot describe are left alone, with a note that
    says why.
    """
    _refuse_contradictions(check=check, diff=diff, form=form)
    requests = read_requests(paths, changed_only=changed_only, base_ref=base_ref, source=source, target=target)
    report = run_rewrite(requests, write=not (check or diff), verify=verify)
    if form != "human":
        emit_machine_format(report, form)
    else:
        _show_report(report, diff=diff, quiet=quiet)
    print_errors(report.errors)
    return compute_rewrite_exit_code(report) or (1 if check and report.changes else 0)


def run_rewrite(requests: Sequence[ProjectRequest], *, write: bool, verify: bool) -> SourceReport:
    """Compute every rewrite, and write them all where none of the proofs fails.

    Args:
        requests: what to look at.
        write: whether to write.
        verify: whether to demand first that the tree's own modular converter writes the same.
    """
    from codemods.rewriting.migrate import plan_rewrites
    from codemods.rewriting.write import write_changes
    from codemods.tree.outcome import merge_outcomes
    from codemods.tree.selection import Suppressions
    from migrator.formats.report import build_pending_report, build_written_report

    outcome = merge_outcomes(
        [plan_rewrites(one.paths, Suppressions(one.selection), one.target, one.source) for one in requests]
    )
    problems = _verify(outcome, [path for one in requests for path in one.paths]) if verify else ()
    outcome = replace(outcome, errors=(*outcome.errors, *problems))
    if problems or not write:
        return build_pending_report(outcome)
    return build_written_report(outcome, write_changes(outcome.changes))


def compute_rewrite_exit_code(report: SourceReport) -> int:
    """Return 0, 1 where only the converter writes something else, 2 where something could not be done."""
    if not report.errors:
        return 0
    return 1 if all(isinstance(error, MismatchError) for error in report.errors) else 2


def _verify(outcome: Outcome, paths: Sequence[Path]) -> Sequence[MigratorError]:
    from codemods.rewriting.proof import verify_outcome

    return verify_outcome(outcome, paths)


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


def _refuse_contradictions(*, check: bool, diff: bool, form: str) -> None:
    if diff and form != "human":
        raise UsageError(
            f"--diff prints a patch and --format {form} something else", hint="leave one of them out", format=form
        )
    if form in ("github", "sarif") and not check:
        raise UsageError(
            f"--format {form} tells of edits that are still to be made",
            hint="add --check, or use `migrator check`",
            format=form,
        )
