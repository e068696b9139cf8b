"""The command group and the one place where errors become messages and exit codes.

Exit codes: 0 clean; 1 found something; 2 could not do its work. An error is never 0.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from migrator.terminal import console
from plans.errors import MigratorError

__all__ = ["main"]

_COMMANDS = ("rewrite", "check", "diff", "explain", "plan", "reshard", "inspect", "verify", "validate", "run")


class _LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"migrator.commands.{cmd_name}").command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="plan-migrator", prog_name="migrator")
def group() -> None:
    """Move models from module-level to param-level parallel plans, and take their checkpoints along.

    \b
    migrator rewrite src/models                            rewrite the plans in model source
    migrator check src/models                              what is still to be done, for CI
    migrator diff main                                     what the branch really changes on the mesh
    migrator explain MIG001                                what a rule does, and why
    migrator plan CHECKPOINT --tp 2                        where each parameter goes, and why
    migrator reshard CHECKPOINT OUT --tp 2 --layout ranks  lay a checkpoint out for the plan
    migrator verify OUT CHECKPOINT                         that both hold the same, byte for byte
    migrator validate OUT --tp 2 --reference CHECKPOINT    prove it on real processes
    migrator run JOB.toml                                  all of these, as a file declares them
    """


def main() -> None:
    """Run the command line; the entry point of the `migrator` script."""
    debug = os.environ.get("MIGRATOR_DEBUG") == "1"
    try:
        code = group.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        console.say("interrupted")
        sys.exit(2)
    except BrokenPipeError:
        # The reader went away; nobody is left to tell, and the interpreter must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except MigratorError as error:
        if debug:
            raise
        console.error(error)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        console.internal_error(error)
        sys.exit(2)
