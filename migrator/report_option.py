"""The option `--report FILE`, alike for every command that has one."""

from __future__ import annotations

from pathlib import Path

import click

from plans.errors import DestinationError

__all__ = ["report_option"]


def _check_report_path(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written before the work that it is about, not after it."""
    if value is None:
        return None
    if value.is_dir() or not value.absolute().parent.is_dir():
        what = "a folder" if value.is_dir() else f"{value.parent} is not a folder"
        raise DestinationError(f"--report {value}: {what}", hint="name a file in a folder that exists", path=str(value))
    return value


report_option = click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=_check_report_path,
    help="Write a report for a browser too, one file.",
)
