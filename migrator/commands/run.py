"""`migrator run`: declared migrations, from files or from a folder that is watched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.values import SECONDS
from plans.errors import UsageError

if TYPE_CHECKING:
    from migrator.jobs import Forecast, JobResult, Listener

__all__ = ["command"]


@click.command("run")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="JOB.toml|FOLDER...")
@click.option(
    "--dry-run", is_flag=True, help="Only show which steps would be run, why, and what resharding would take."
)
@click.option("--watch", is_flag=True, help="Go on with every job file that appears in FOLDER, until a signal comes.")
@click.option(
    "--interval",
    type=SECONDS,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks of --watch; a file that two of them find the same is taken.",
)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(paths: tuple[Path, ...], dry_run: bool, watch: bool, interval: float, form: str, quiet: bool) -> int:
    """Run the migrations that JOB.toml or all job files of FOLDER declare: rewrite, check, reshard, verify, validate.

    Steps that are done already are skipped. A step that fails ends its own job, never the others. Each job's results,
    reports, events and state go to its output folder, by default JOB.job beside its file. The exit code is the worst
    of all jobs.
    """
    _refuse_contradictions(paths, dry_run=dry_run, watch=watch)
    from migrator.jobs import foresee_files, job_files
    from migrator.jobs_text import make_listener, show_forecasts, show_results

    found: Sequence[Forecast] | Sequence[JobResult]
    if dry_run:
        found = forecasts = foresee_files([file for path in paths for file in job_files(path)])
    else:
        found = results = _run_jobs(paths, watch, interval, make_listener(quiet=quiet))
    code = max((one.code for one in found), default=0)
    if form == "json":
        console.emit_json({"code": code, "jobs": [one.to_json() for one in found]})
    elif dry_run:
        show_forecasts(forecasts)
    elif not quiet:
        show_results(results)
    return code


def _run_jobs(paths: Sequence[Path], watch: bool, interval: float, listen: Listener) -> Sequence[JobResult]:
    from migrator import jobs

    if watch:
        return jobs.watch(paths[0], listen, interval)
    return jobs.run_files([file for path in paths for file in jobs.job_files(path)], listen)


def _refuse_contradictions(paths: Sequence[Path], *, dry_run: bool, watch: bool) -> None:
    if watch and (dry_run or len(paths) != 1):
        raise UsageError("--watch takes one folder and runs its jobs", hint="leave --dry-run and other paths out")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "run is no command for torchrun: its steps start workers of their own",
            hint="start it alone, or run reshard and validate under torchrun",
        )
