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
"""Characters; a path has no more."""


class Advance(Protocol):
    """Takes the progress of a piece of work."""

    def __call__(self, done: int, total: int, current: str) -> None:
        """Report bytes done, bytes in all, and what is being worked on."""


def emit(text: str = "") -> None:
    """Print a line of the result."""
    with _translate_output_errors():
        click.echo(text)


def emit_line(text: str) -> None:
    """Print a line of the result in which names that others chose may stand: nothing in it steers a terminal."""
    emit(_escape(text))


def emit_bytes(data: bytes) -> None:
    """Print a piece of the result as it is."""
    with _translate_output_errors():
        click.echo(data, nl=False)


def emit_json(value: object) -> None:
    """Print the result as JSON."""
    import json

    emit(json.dumps(value, indent=2))


@contextmanager
def _translate_output_errors() -> Iterator[None]:
    """Turn what the system says when standard output cannot take more into an error for the user."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        # What is still buffered must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(
            f"standard output cannot be written: {problem.strerror or problem}",
            hint="the work itself is done; send the output elsewhere",
        ) from problem


def say(text: str) -> None:
    """Tell a person something that is not the result; nothing in it steers a terminal."""
    _print_stderr("\n".join(map(_escape, text.split("\n"))))


def error(problem: MigratorError) -> None:
    """Tell a person what is wrong and what to do, in terms of the running command's options."""
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
    """Tell a person that the fault is ours."""
    _say_labelled(click.style("internal error:", fg="red", bold=True), f"{type(problem).__name__}: {problem}")
    _say_labelled(click.style("hint:", fg="cyan"), "run again with MIGRATOR_DEBUG=1 and report the traceback")


def _say_labelled(label: str, text: str) -> None:
    _print_stderr(f"{label} {_escape(text)}")


def _print_stderr(text: str) -> None:
    """Print to standard error; where that takes no more nobody is told, and the work goes on."""
    try:
        click.echo(text, err=True)
    except OSError:
        # What is still buffered must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _escape(text: str) -> str:
    from migrator.terminal.text import sanitize

    return sanitize(text, _MAX_LINE_LENGTH)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], droppable: Sequence[str] = ()
) -> None:
    """Print a table of the result; where no terminal limits it, every row is one line.

    Args:
        title: above it.
        columns: their headings.
        rows: a cell for each column.
        droppable: columns that a terminal too narrow for all does without, the first of them first; what still does not
            fit is folded.
    """
    from rich.console import Console

    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed
    terminal = Console(width=None if is_terminal else _UNLIMITED_WIDTH, markup=False, highlight=False)
    shown = list(columns)
    drawn = _build_table(title, columns, rows, shown)
    for column in droppable:
        if terminal.measure(drawn, options=terminal.options.update(width=_UNLIMITED_WIDTH)).maximum <= terminal.width:
            break
        shown.remove(column)
        drawn = _build_table(title, columns, rows, shown)
    with _translate_output_errors(), terminal.capture() as drawing:  # which it ends by a write
        terminal.print(drawn)
    for line in drawing.get().splitlines():
        emit(line.rstrip())


def _build_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], visible_columns: Sequence[str]
) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in visible_columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(cell for column, cell in zip(columns, row, strict=True) if column in visible_columns))
    return drawn


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Advance]:
    """Show bytes, rate and time left on standard error; silent when it is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[current]}"),
    )
    with Progress(*columns, console=terminal, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(escape(_escape(label)), total=None, current="")

        def advance(done: int, total: int, current: str) -> None:
            bar.update(task, completed=done, total=total, current=escape(_escape(current)))

        yield advance
