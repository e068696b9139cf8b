"""`migrator diff`: what plan edits between two git revisions change on the mesh."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.exit_codes import of_findings
from migrator.options.common import format_option
from migrator.terminal import console
from plans.errors import UsageError
from plans.gc_paused import gc_paused
from plans.text import format_count

if TYPE_CHECKING:
    from codemods.files.revisions import Snapshot

__all__ = ["command"]


@click.command("diff")
@click.argument("base")
@click.argument("head", required=False)
@click.option("--allow", multiple=True, metavar="MODEL", help="Accept all changes to this model; repeatable.")
@format_option("human", "json", "github")
@gc_paused()
def command(base: str, head: str | None, allow: tuple[str, ...], output_format: str) -> int:
    """Show what plan edits between two revisions change on the mesh.

    Compares the plans of revision BASE with those of HEAD, by default the working tree, as models inherit them, in
    every Python file that pyproject.toml does not exclude. Each entry is read in its own release's dialect, so that
    another name for the same placement is not a change. A change is explained if the text diff touches the entry's line
    in the model's own file. Exits 1 if a change is unexplained, for example because a class inherits it. A plan that
    cannot be read is reported as possibly changed if anything that it is built from has changed. What the framework's
    own functions do to every model's plan is reported once, for the framework.
    """
    from codemods.comparing.difference import compare
    from codemods.files.config import find_configuration
    from codemods.files.revisions import find_repository
    from codemods.files.sources import format_path
    from migrator.formats.difference import (
        DiffReport,
        build_diff_table,
        diff_as_json,
        diff_github_lines,
        diff_summary_lines,
    )

    # Handled like Ctrl-C, which removes the temporary folder; the default would leave it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    repository = find_repository(Path())
    before = repository.read_revision(base)
    after = repository.read_revision(head) if head is not None else repository.read_working_tree()
    _check_allowed(allow, before, after)
    configuration = find_configuration(Path())
    root = repository.root.resolve()
    comparison = compare(before, after, lambda path: configuration.is_included(root / path))
    report = DiffReport(comparison, before.name, after.name, repository.root, frozenset(allow))
    if output_format == "json":
        console.emit_json(diff_as_json(report))
    elif output_format == "github":
        for line in diff_github_lines(report):
            console.emit(line)
    else:
        if report.comparison.differences:
            console.print_table(*build_diff_table(report))
        for line in diff_summary_lines(report):
            console.emit(line)
    for name in sorted(allow):
        if name not in {difference.model for difference in report.comparison.differences}:
            console.say(f"--allow {name}: no plan of this model changed")
    if excluded := report.comparison.excluded:
        files = format_count(len(excluded), "changed file")
        console.say(f"pyproject.toml excludes {files} with plans, such as {format_path(excluded[0])}: not compared")
    for error in report.comparison.errors:
        console.error(error)
    return of_findings(report.failing, report.comparison.errors)


def _check_allowed(allow: Sequence[str], before: Snapshot, after: Snapshot) -> None:
    """Refuse an `--allow` of a model that neither tree has."""
    from codemods.comparing.results import name_model

    known = {name_model(path) for snapshot in (before, after) for path in snapshot.blobs}
    unknown = sorted(set(allow) - known)
    if unknown:
        raise UsageError(
            f"--allow {unknown[0]}: neither {before.name} nor {after.name} has a model of this name",
            hint="give the name of the model's folder, such as mixtral",
            model=unknown[0],
        )
