"""Options and checks that several commands share: the mesh and mode, --report, times, and the runtime's packages."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import SupportsFloat

import click

from plans.errors import DependencyError, DestinationError
from plans.mesh import MODES, Mesh, Mode

__all__ = [
    "OUTPUT",
    "OUTPUT_FOLDER",
    "SECONDS",
    "build_mesh",
    "digests_option",
    "follow_links_option",
    "format_option",
    "max_memory_option",
    "mesh_options",
    "reject_empty",
    "reject_empty_patterns",
    "report_option",
    "require_runtime",
]

_Command = Callable[..., object]


def follow_links_option(function: _Command) -> _Command:
    """Add `--follow-links` to a command."""
    text = "Also read links that lead to files outside of the checkpoint's folder."
    return click.option("--follow-links", is_flag=True, help=text)(function)


def digests_option(function: _Command) -> _Command:
    """Add `--digests` to a command."""
    text = "The digests of SOURCE, from `migrator verify SOURCE --record FILE`, if it has no manifest."
    return click.option("--digests", type=click.Path(path_type=Path), metavar="FILE", help=text)(function)


def mesh_options(function: _Command) -> _Command:
    """Add an option for each axis of the mesh, and `--mode`, to a command."""
    options = (
        click.option("--tp", default=1, show_default=True, help="Number of ranks on the tensor parallel axis."),
        click.option("--ep", default=1, show_default=True, help="Number of ranks that share one set of experts."),
        click.option("--fsdp", default=1, show_default=True, help="Number of ranks on the data parallel axis."),
        click.option("--replicate", default=1, show_default=True, help="Number of replicas, which repeat all shards."),
        click.option("--pp", default=1, show_default=True, help="Number of pipeline stages, with --tp alone."),
        click.option(
            "--mode",
            type=click.Choice(MODES),
            help="Which of the model's plans to apply; by default tp, or tp_ep if --ep is more than 1.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def build_mesh(mode: Mode | None, **sizes: int) -> tuple[Mesh, Mode]:
    """Return the mesh of the sizes that the options give, and the mode or its default."""
    mesh = Mesh(**sizes)
    return mesh, mode or ("tp_ep" if mesh.ep > 1 else "tp")


def format_option(*formats: str) -> Callable[[_Command], _Command]:
    """Return an option `--format` that a command receives as `output_format`; the first format is the default."""
    return click.option(
        "--format", "output_format", type=click.Choice(formats), default=formats[0], help="Output format."
    )


def max_memory_option(default: int, help_text: str) -> Callable[[_Command], _Command]:
    """Return an option `--max-memory` in MiB.

    Args:
        default: the default, in MiB.
        help_text: what the limit applies to.
    """
    size = click.IntRange(min=1)
    return click.option("--max-memory", type=size, default=default, show_default=True, metavar="MIB", help=help_text)


class _OutputPath(click.Path):
    """A path that something is written to, which cannot be an address."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        from runtime.formats import check_address

        check_address(os.fspath(value), is_destination=True)
        return super().convert(value, param, ctx)


OUTPUT = _OutputPath(path_type=Path)
OUTPUT_FOLDER = _OutputPath(path_type=Path, file_okay=False)


def _check_report_path(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a report that cannot be written before the work starts, not after it."""
    if value is None:
        return None
    if value.is_dir() or not value.absolute().parent.is_dir():
        problem = "is a folder" if value.is_dir() else f"{value.parent} is not a folder"
        hint = "name a file in a folder that exists"
        raise DestinationError(f"--report {value}: {problem}", hint=hint, path=str(value))
    return value


report_option = click.option(
    "--report",
    type=OUTPUT,
    metavar="FILE",
    callback=_check_report_path,
    help="Also write a report for a browser, as one HTML file.",
)


_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


def require_runtime(*, show_downloads: bool = False) -> None:
    """Check that the runtime's packages are installed, and keep their warnings and progress bars off the terminal.

    Args:
        show_downloads: let the hub's client show its progress on a terminal.

    Raises:
        DependencyError: one of the packages is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"this command needs {missing[0]}, which is not installed",
            hint="pip install 'plan-migrator[runtime]'",
            packages=missing,
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not show_downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")


class _Seconds(click.ParamType[float]):
    """A finite number of seconds above 0."""

    name = "seconds"

    def convert(self, value: str | SupportsFloat, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = click.FLOAT.convert(value, param, ctx)  # type: ignore[arg-type]
        if not (math.isfinite(seconds) and seconds > 0):
            self.fail(f"{value!r} is not a number of seconds above 0", param, ctx)
        return float(seconds)


SECONDS = _Seconds()


def reject_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty argument, such as an unset shell variable; as a path it would mean the current folder."""
    if value is not None and not value.strip():
        raise click.BadParameter("is empty", ctx, param)
    return value


def reject_empty_patterns(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an empty pattern among several, such as an unset shell variable, which would match nothing."""
    for value in values:
        reject_empty(ctx, param, value)
    return values
