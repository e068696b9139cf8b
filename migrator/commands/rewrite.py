"""`migrator rewrite`: plan literals in model source, owners first, then every generated copy."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from codemods.sources import shown
from migrator import console

if TYPE_CHECKING:
    from codemods.migrate import Change, Located, LocatedEdit, Outcome
    from plans.errors import MigratorError

__all__ = ["command"]


@click.command("rewrite")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if anything would change.")
@click.option("--diff", is_flag=True, help="Write nothing; print a patch that `git apply` takes.")
@click.option(
    "--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print the result."
)
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(paths: tuple[Path, ...], check: bool, diff: bool, form: str, quiet: bool) -> int:
    """Rewrite plan literals to the param-level form, below PATHS (files or folders, by default here).

    Owners are rewritten first, then every generated copy, and nothing else. Expert layouts that the param-level
    styles do not describe are left alone, with a note saying why.
    """
    # What is allocated lives to the end of this short process: collecting it takes a tenth of the time for nothing.
    gc.disable()
    from codemods.migrate import plan_rewrites, write_changes

    outcome = plan_rewrites(paths or (Path(),))
    errors = list(outcome.errors)
    if diff:
        from migrator.patch import patch

        console.emit_bytes(patch(outcome.changes))
    elif not check:
        errors += write_changes(outcome.changes)
    if form == "json":
        if not diff:
            console.emit_json(_as_json(outcome, errors, written=not check))
    elif not quiet:
        _summarize(outcome, written=not (check or diff), listed=not diff)
    for error in errors:
        console.error(error)
    if errors:
        return 2
    return 1 if check and outcome.changes else 0


def _summarize(outcome: Outcome, *, written: bool, listed: bool) -> None:
    say = console.emit if listed else console.say
    verb = "rewrote" if written else "would rewrite"
    for change in outcome.changes if listed else ():
        say(f"{verb} {shown(change.path)}  {_count(len(change.edits), 'entry', 'entries')}  {change.role}")
    for found in outcome.findings:
        say(f"{found.finding.severity} {shown(found.path)}:{found.line} {found.finding.code} {found.finding.message}")
    if not outcome.plan_files:
        say(f"no plans found in {_count(outcome.files, 'file', 'files')}")
        return
    roles = Counter(change.role for change in outcome.changes)
    entries = sum(len(change.edits) for change in outcome.changes)
    if not outcome.changes:
        say(f"nothing to rewrite in {_count(outcome.files, 'file', 'files')}")
        return
    say(
        f"{verb} {_count(entries, 'entry', 'entries')} in {_count(len(outcome.changes), 'file', 'files')}: "
        f"{_count(roles['owner'], 'owner', 'owners')}, {_count(roles['copy'], 'generated copy', 'generated copies')}"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _as_json(outcome: Outcome, errors: list[MigratorError], *, written: bool) -> dict[str, object]:
    return {
        "written": written,
        "files": outcome.files,
        "changes": [_change_json(change) for change in outcome.changes],
        "findings": [_finding_json(found) for found in outcome.findings],
        "errors": [{"message": error.message, "hint": error.hint, **error.data} for error in errors],
    }


def _change_json(change: Change) -> dict[str, object]:
    return {"path": shown(change.path), "role": change.role, "edits": [_edit_json(edit) for edit in change.edits]}


def _edit_json(located: LocatedEdit) -> dict[str, object]:
    return {
        "line": located.line,
        "class": located.class_name,
        "plan": located.attribute,
        "code": located.edit.code,
        "key": located.edit.key,
        "style": located.edit.style,
    }


def _finding_json(found: Located) -> dict[str, object]:
    return {
        "path": shown(found.path),
        "line": found.line,
        "class": found.class_name,
        "plan": found.attribute,
        "code": found.finding.code,
        "severity": found.finding.severity,
        "key": found.finding.key,
        "message": found.finding.message,
        "hint": found.finding.hint,
    }
