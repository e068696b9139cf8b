"""Kinds of values on the command line that click does not have."""

from __future__ import annotations

import math
from typing import SupportsFloat

import click

__all__ = ["SECONDS", "reject_empty"]


class _Seconds(click.ParamType[float]):
    """A time to wait, more than nothing and less than for ever."""

    name = "seconds"

    def convert(self, value: str | SupportsFloat, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = click.FLOAT.convert(value, param, ctx)  # type: ignore[arg-type]
        if not (math.isfinite(seconds) and seconds > 0):
            self.fail(f"{value!r} is no number of seconds above 0", param, ctx)
        return float(seconds)


SECONDS = _Seconds()


def reject_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty argument, which a shell makes of a variable that is not set; a path would read it as `.`."""
    if value is not None and not value.strip():
        raise click.BadParameter("is empty", ctx, param)
    return value
