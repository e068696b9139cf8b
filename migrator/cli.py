"""The command group and the one place where errors become messages and exit codes.

`migrator.exit_codes` says what the exit codes mean. An error is never 0.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import click

from migrator import __version__
from migrator.exit_codes import ExitCode
from migrator.terminal import console
from plans.errors import MigratorError

__all__ = ["main"]

_SECTIONS: Mapping[str, Sequence[str]] = {
    "Source": ("rewrite", "check", "diff", "prove", "explain"),
    "Checkpoints": ("plan", "reshard", "inspect", "verify", "validate"),
    "Jobs": ("run",),
    "Other": ("env",),
}
"""The commands by the heading under which the help lists them; each is a module of `migrator.commands`."""


class _CommandGroup(click.Group):
    """Imports a command's module when that command is called, or when the help lists all of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in _SECTIONS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"migrator.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for heading, names in _SECTIONS.items():
            commands = [(name.ljust(width), self.get_command(ctx, name)) for name in names]
            limit = formatter.width - width - 6
            with formatter.section(heading):
                formatter.write_dl([(name, command.get_short_help_str(limit)) for name, command in commands if command])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except MigratorError as error:
            if _is_debugging():
                raise
            # Reported here, where the context still knows the command whose options the message may name.
            console.error(error)
            return ExitCode.FAILED


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="migrator")
def group() -> None:
    """Move models from module-level to param-level parallel plans, and take their checkpoints along.

    \b
    migrator rewrite src/models                            rewrite the plans in model source
    migrator check src/models                              list what is left to do, for CI
    migrator diff main                                     show what the branch changes on the mesh
    migrator prove src/models                              run its plans on tiny models, beside the unsharded ones
    migrator explain MIG001                                explain a rule
    migrator plan CHECKPOINT --tp 2                        show where each parameter goes, and why
    migrator reshard CHECKPOINT OUT --tp 2 --layout ranks  write the checkpoint for another plan and mesh
    migrator verify OUT CHECKPOINT                         check that both hold the same bytes
    migrator validate OUT --tp 2 --reference CHECKPOINT    run it on real processes and compare
    migrator run JOB.toml                                  run all of these as a file declares them
    """


def main() -> None:
    """Run the command line; the entry point of the `migrator` script."""
    atexit.register(gc.freeze)  # so that the interpreter does not look for garbage once more as it ends
    try:
        code = group.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.FAILED)
    except (KeyboardInterrupt, click.Abort):
        console.say("interrupted")
        sys.exit(ExitCode.FAILED)
    except BrokenPipeError:
        # The reader is gone. The interpreter flushes standard output at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        if _is_debugging():
            raise
        console.internal_error(error)
        sys.exit(ExitCode.FAILED)


def _is_debugging() -> bool:
    return os.environ.get("MIGRATOR_DEBUG") == "1"
