"""The only module that prints: data to standard output, everything else to standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from plans.errors import MigratorError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Advance",
    "emit",
    "emit_bytes",
    "emit_json",
    "emit_line",
    "error",
    "internal_error",
    "print_table",
    "progress",
    "say",
]


_ARGUMENT = re.compile(r"`([a-z_]+)(?:=([^`]+))?`")
_UNLIMITED_WIDTH = 1000
_MAX_LINE_LENGTH = 4096
"""In characters; no path is longer."""


class Advance(Protocol):
    """A callback for the progress of a task."""

    def __call__(self, done: int, total: int, current: str) -> None:
        """Report how much is done, how much there is in all, and the name of the current item."""


def emit(text: str = "") -> None:
    """Print a line of the result."""
    with _translate_output_errors():
        click.echo(text)


def emit_line(text: str) -> None:
    """Print a line of the result that may contain untrusted names; control characters in it are escaped."""
    emit(_escape(text))


def emit_bytes(data: bytes) -> None:
    """Print bytes of the result unchanged."""
    with _translate_output_errors():
        click.echo(data, nl=False)


def emit_json(value: object) -> None:
    """Print the result as JSON."""
    import json

    emit(json.dumps(value, indent=2))


@contextmanager
def _translate_output_errors() -> Iterator[None]:
    """Turn a failure to write to standard output into an error for the user."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        # The interpreter flushes the buffer at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(
            f"standard output cannot be written: {problem.strerror or problem}",
            hint="the work itself is done; redirect the output to a place that can take it",
        ) from problem


def say(text: str) -> None:
    """Print a message to standard error; control characters in it are escaped."""
    _print_stderr("\n".join(map(_escape, text.split("\n"))))


def error(problem: MigratorError) -> None:
    """Print an error and its hint, in terms of the running command's options."""
    _say_labelled(click.style("error:", fg="red", bold=True), _name_options(problem.message))
    _say_labelled(click.style("hint:", fg="cyan"), _name_options(problem.hint))


def _name_options(text: str) -> str:
    """Return a message with options in place of the arguments that it names: `max_memory=1` becomes --max-memory 1.

    Arguments that the running command has no option for are left as they are.
    """
    options = {option.opts[0].lstrip("-").replace("-", "_"): option for option in _find_options()}

    def translate(argument: re.Match[str]) -> str:
        name, value = argument.groups()
        if name not in options:
            return argument[0]
        option = options[name]
        if option.is_flag:
            return option.secondary_opts[0] if value == "False" else option.opts[0]
        return option.opts[0] if value is None else f"{option.opts[0]} {value}"

    return _ARGUMENT.sub(translate, text)


def _find_options() -> list[click.Option]:
    """Return the options of the running command, or of the one that has just failed; none outside of a command."""
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    command: click.Command | None = context.command
    if isinstance(command, click.Group):
        command = command.get_command(context, context.invoked_subcommand or "")
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)] if command else []


def internal_error(problem: Exception) -> None:
    """Print an error that is a bug in migrator."""
    _say_labelled(click.style("internal error:", fg="red", bold=True), f"{type(problem).__name__}: {problem}")
    _say_labelled(click.style("hint:", fg="cyan"), "run again with MIGRATOR_DEBUG=1 and report the traceback")


def _say_labelled(label: str, text: str) -> None:
    _print_stderr(f"{label} {_escape(text)}")


def _print_stderr(text: str) -> None:
    """Print to standard error; if that fails, the work goes on without messages."""
    try:
        click.echo(text, err=True)
    except OSError:
        # The interpreter flushes the buffer at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _escape(text: str) -> str:
    from migrator.terminal.text import sanitize

    return sanitize(text, _MAX_LINE_LENGTH)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], droppable: Sequence[str] = ()
) -> None:
    """Print a table of the result; outside of a terminal every row is one line.

    Args:
        title: the line above the table.
        columns: the headings of the columns.
        rows: a cell for each column.
        droppable: the columns to drop, in this order, as long as the terminal is too narrow for the table. Cells that
            still do not fit are folded.
    """
    from rich.console import Console

    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None if it was closed
    terminal = Console(width=None if is_terminal else _UNLIMITED_WIDTH, markup=False, highlight=False)
    visible = list(columns)
    table = _build_table(title, columns, rows, visible)
    for column in droppable:
        if terminal.measure(table, options=terminal.options.update(width=_UNLIMITED_WIDTH)).maximum <= terminal.width:
            break
        visible.remove(column)
        table = _build_table(title, columns, rows, visible)
    with _translate_output_errors(), terminal.capture() as rendering:  # The capture ends with a write.
        terminal.print(table)
    for line in rendering.get().splitlines():
        emit(line.rstrip())


def _build_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], visible_columns: Sequence[str]
) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in visible_columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell for column, cell in zip(columns, row, strict=True) if column in visible_columns))
    return table


@contextmanager
def progress(label: str, *, quiet: bool, unit: str = "") -> Iterator[Advance]:
    """Show what is done, rate and remaining time on standard error, if that is a terminal.

    Args:
        label: the text before the bar.
        quiet: show nothing.
        unit: what is counted, bytes if it is empty.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class CountSpeedColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {unit}/s" if speed else "", style="progress.data.speed")

    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((MofNCompleteColumn(), CountSpeedColumn()) if unit else (DownloadColumn(), TransferSpeedColumn())),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[current]}"),
    )
    with Progress(*columns, console=terminal, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(escape(_escape(label)), total=None, current="")

        def advance(done: int, total: int, current: str) -> None:
            bar.update(task, completed=done, total=total, current=escape(_escape(current)))

        yield advance
